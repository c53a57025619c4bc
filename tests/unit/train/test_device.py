"""Peaks by the names that GPUs give themselves."""

import pytest
import torch

from megascale.train.device import REFERENCE_GPU, peak_memory_gib, peak_tflops


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60),
        ("NVIDIA H200", 989.4, 494.7, 67),
        ("NVIDIA H200 NVL", 835.5, 417.5, 60),
        ("NVIDIA B200", 2250, 1100, 75),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("Tesla V100-SXM2-32GB", None, 15.7, 15.7),
        ("Tesla V100-PCIE-16GB", None, 14, 14),
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
    ],
)
def test_peak_is_the_data_sheets(name, bf16, tf32, fp32):
    assert peak_tflops(name, "bf16") == bf16
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_tflops(name, "fp32") == tf32
        torch.set_float32_matmul_precision("highest")
        assert peak_tflops(name, "fp32") == fp32
    finally:
        torch.set_float32_matmul_precision(before)


def test_plans_without_a_gpu_have_a_peak():
    assert peak_tflops(REFERENCE_GPU, "bf16") is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts tensors of a GPU there")
def test_peak_memory_grows_with_what_was_held_and_never_shrinks():
    before = peak_memory_gib()
    block = torch.ones(64 * 2**20)  # 256 MiB, written to
    held = peak_memory_gib()
    del block
    # what was held before was less than the peak by what had been freed again
    assert before <= held == peak_memory_gib()
    assert 0.25 < held < 64
