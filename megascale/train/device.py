"""What the device can do and what it holds: peak arithmetic by GPU name, peak memory of this process."""

import re
import resource
import sys

import torch

# TFLOP/s of (bf16 tensor cores, TF32 tensor cores, plain fp32), dense, by NVIDIA's data sheets: where those print
# figures "with sparsity", half of them. A name's words must all occur; the first match counts. None: no such units.
# Sheets: A100 (2021), A30, A10, H100 (SXM, PCIe, NVL), H200 (SXM, NVL), GH200, HGX B200, L40S, V100.
_PEAK_TFLOPS: tuple[tuple[str, tuple[float | None, float | None, float]], ...] = (
    ("B200", (2250, 1100, 75)),
    ("H200 NVL", (835.5, 417.5, 60)),
    ("H200", (989.4, 494.7, 67)),
    ("GH200", (989.4, 494.7, 67)),
    ("H100 NVL", (835.5, 417.5, 60)),
    ("H100 PCIe", (756, 378, 51)),
    ("H100 HBM3", (989.4, 494.7, 67)),  # how the SXM card calls itself: "NVIDIA H100 80GB HBM3"
    ("A100", (312, 156, 19.5)),
    ("A30", (165, 82, 10.3)),
    ("A10", (125, 62.5, 31.2)),
    ("L40S", (362, 183, 91.6)),
    ("V100 PCIE", (None, None, 14)),
    ("V100", (None, None, 15.7)),
)
# what a plan without a GPU is made for
REFERENCE_GPU = "NVIDIA H100 80GB HBM3"


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return a GPU's peak, in 10^12 operations a second, for matrix products as torch would do them now.

    Args:
        device_name: as `torch.cuda.get_device_name` says, such as "NVIDIA A100-SXM4-80GB".
        precision: `bf16` or `fp32`; fp32 products run on TF32 tensor cores only where torch was told that they may.

    Returns:
        None for a GPU that is not in the table, a slice of one (MIG), or a precision it has no units for.
    """
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words:
        return None
    for name, (bf16, tf32, fp32) in _PEAK_TFLOPS:
        if set(name.split()) <= words:
            if precision == "bf16":
                return bf16
            return fp32 if torch.get_float32_matmul_precision() == "highest" else tf32 or fp32
    return None


def device_name() -> str | None:
    """Return the name of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_gib() -> float:
    """Return the most memory this process has held so far, GiB: tensors on its GPU, or the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
