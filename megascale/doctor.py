"""The checks of `megascale doctor` on this machine: torch, ranks, memory, disk, Ray. (Services: `doctor_services.py`.)

Each tries the thing itself (ranks that add up a tensor, an object that is written and read back), takes seconds, and
leaves nothing behind. What is absent (a GPU, a network, an extra) is a finding like any other.
"""

import contextlib
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil

from megascale import local_disk, storage
from megascale.errors import StorageError
from megascale.ports import free_port

GPU_TORCH = 'make clean install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"'
_ROOM = "make room, or --disk FOLDER on another disk, or --disk-gb N"
_CONNECT_SECONDS = 5.0
_ADDED_UP = "megascale doctor: added up"  # what a rank says when every rank has the sum
_FAILED = "megascale doctor: "  # before what a rank says went wrong; libraries have last words of their own


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "warn", "FAIL", "skip"]
    found: str
    fix: str = ""  # a command or a setting; only what is ok needs none

    def __str__(self) -> str:
        line = f"{self.state:<4}  {self.name:<9}  {' '.join(self.found.split())}"
        return f"{line} -> {self.fix}" if self.fix else line


# --------------------------------------------------------------------------------------------------- torch, compiler


def check_torch(devices: Path = Path("/dev")) -> Finding:
    """Look whether torch is built for what is here; `devices` is where NVIDIA's driver shows its GPUs."""
    try:
        import torch
    except (ImportError, OSError) as failure:  # the second: a library that it is linked to
        return Finding("torch", "FAIL", f"cannot be imported: {failure}", "make clean install")
    built = f"{torch.__version__}, {torch.get_num_threads()} threads"
    cards = sorted(path.name for path in devices.glob("nvidia[0-9]*") if _is_given(path))
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
        found = f"{built}, CUDA {torch.version.cuda}, driver {_driver()}, {len(gpus)} GPUs: {names}"
        return Finding("torch", "ok", found)
    if not cards:
        return Finding("torch", "ok", f"{built}, no GPU for this process")
    if torch.version.cuda is None:
        return Finding("torch", "FAIL", f"{built}: a build for CPUs, but here is a GPU ({', '.join(cards)})", GPU_TORCH)
    found = f"{built}: CUDA {torch.version.cuda} finds none of {', '.join(cards)} (driver {_driver()})"
    return Finding("torch", "FAIL", found, f"a driver for that CUDA, or a build for the driver: {GPU_TORCH}")


def _is_given(card: Path) -> bool:
    """Return whether this process may use a GPU: a container, or a job of a scheduler, may see one that it may not open."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "any") in ("", "-1", "NoDevFiles"):
        return False
    try:
        os.close(os.open(card, os.O_RDWR))
    except PermissionError:
        return False
    except OSError:  # a driver that does not work
        return True
    return True


def _driver() -> str:
    """Return the version of NVIDIA's driver, from a line such as `NVRM version: NVIDIA … Kernel Module  570.86.15  …`."""
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
        return next((word for word in words if word.replace(".", "").isdecimal()), "unknown")
    return "unknown"


def check_compiler() -> Finding:
    """Look for the C++ compiler that torch's and DeepSpeed's own compilers call."""
    name = os.environ.get("CXX", "g++")
    where = shutil.which(name)
    if where is None:
        needed = "only train.compile=true and kernels that a zero.deepspeed_json asks for need one"
        return Finding("compiler", "warn", f"no {name}; {needed}", "apt-get install g++")
    return Finding("compiler", "ok", where)


# ------------------------------------------------------------------------------------------------------ memory, disk


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that this process's container may use, or the machine's."""
    limits = [psutil.virtual_memory().total]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups v2, v1
        with contextlib.suppress(OSError, ValueError):  # the second: `max`
            limits.append(int((cgroup / name).read_text()))
    return min(limits)


def check_shared_memory(folder: Path = Path("/dev/shm"), memory: int | None = None) -> Finding:
    """Hold shared memory against what Ray's object store takes of it: 30% of the memory (bytes), and 10 GB at most."""
    memory = memory or memory_bytes()
    wanted = min(0.3 * memory, 10e9)
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    found = f"{folder} has {free / 1e9:.2f} GB free; memory: {memory / 1e9:.1f} GB"
    if free >= wanted:
        return Finding("shm", "ok", found)
    found += f". Ray's object store wants {wanted / 1e9:.1f} GB there, or lies on the disk; NCCL wants 1 GB"
    size = math.ceil(max(wanted, 1e9) / 2**30)
    fix = f"docker run --shm-size={size}g; Kubernetes: an emptyDir of medium Memory there"
    return Finding("shm", "warn", found, fix)


def check_disk(folder: str, gigabytes: float, name: str = "disk", room: str = _ROOM) -> Finding:
    """Look whether a folder, which need not be there yet, can be written, and whether its disk has so much room; `room`
    says what to do if it has not."""
    path, probe = Path(folder).absolute(), probe_name()
    try:
        storage.check_writable(str(path / probe))
        local_disk.check_room_and_locks(path)
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free / 1e9
    except (StorageError, OSError) as failure:
        fix = f"--disk FOLDER, where runs go; user {os.getuid()} has to be let in (Kubernetes: a volume, and fsGroup)"
        return Finding(name, "FAIL", str(failure).replace(str(path / probe), str(path)), fix)
    if free < gigabytes:
        found = f"{path} has {free:.1f} GB free, {gigabytes:g} are wanted"
        return Finding(name, "FAIL", found, room)
    return Finding(name, "ok", f"{path} can be written, {free:.1f} GB free")


def check_temporary() -> Finding:
    """Look at the folder for temporary files, as Python finds it."""
    try:
        folder = tempfile.gettempdir()
    except OSError as failure:
        return Finding("tmp", "FAIL", str(failure.strerror), "TMPDIR=FOLDER; Kubernetes: an emptyDir at /tmp")
    return check_disk(
        folder, 1.0, "tmp", "make room, or TMPDIR=FOLDER on another disk; Kubernetes: a larger emptyDir there"
    )


# -------------------------------------------------------------------------------------------------------- ranks, Ray


def check_ranks(num_ranks: int | None = None, seconds: float = 120.0) -> list[Finding]:
    """Let ranks on this machine add up a tensor (NCCL on GPUs, else gloo), then do one update with DeepSpeed.

    Args:
        num_ranks: how many; None takes one for each GPU, or two on CPUs; 0 leaves the check out.
        seconds: how long they may take.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = num_ranks if num_ranks is not None else gpus or 2
    deepspeed = metadata.version("deepspeed")
    name, made_with = "gloo", f"torch {torch.__version__}"
    fix = "GLOO_SOCKET_IFNAME=lo, or the network card that the machines share (`ip addr` lists them)"
    if gpus:
        count = min(count, gpus)
        name, made_with = "nccl", ".".join(map(str, torch.cuda.nccl.version()))
        fix = "a larger /dev/shm (see above), NCCL_SOCKET_IFNAME=CARD, or NCCL_P2P_DISABLE=1 between virtual GPUs"
    if count == 0:
        again = "leave --ranks 0 out"
        return [Finding(name, "skip", made_with, again), Finding("deepspeed", "skip", deepspeed, again)]
    started = time.monotonic()
    outputs, reason = _run_ranks(count, seconds)
    ranks, took = "1 rank" if count == 1 else f"{count} ranks", f"{time.monotonic() - started:.0f} s"
    if not any(_ADDED_UP in output for output in outputs):
        added = Finding(name, "FAIL", f"{made_with}: {ranks} could not add up a tensor: {reason}", fix)
        return [added, Finding("deepspeed", "skip", deepspeed, f"mend {name} first")]
    added = Finding(name, "ok", f"{made_with}: {ranks} added up a tensor")
    if reason:
        fix = "mend what FAILs above, else make clean install"
        return [added, Finding("deepspeed", "FAIL", f"{deepspeed}: no update was done: {reason}", fix)]
    # its own kernels are not asked for: our AdamW is torch's, on GPUs, on CPUs and under zero.offload_optimizer
    found = f"{deepspeed}: an update under ZeRO-1 by {ranks}, {took}; needs no kernel compiled"
    return [added, Finding("deepspeed", "ok", found)]


def _run_ranks(count: int, seconds: float) -> tuple[list[str], str]:
    """Run `be_a_rank` in `count` processes; return what each printed, and what went wrong, if anything did."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"DOCTOR_SECONDS": str(math.ceil(seconds)), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", "from megascale.doctor import be_a_rank; be_a_rank()"]
    ranks: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(count) as pool:
        try:
            for number in map(str, range(count)):
                environment = {**os.environ, **shared, "RANK": number, "LOCAL_RANK": number}
                out, err = subprocess.PIPE, subprocess.STDOUT
                ranks.append(
                    subprocess.Popen(line, env=environment, stdout=out, stderr=err, text=True, errors="replace")
                )
            printed = [pool.submit(rank.communicate) for rank in ranks]
            end = time.monotonic() + seconds
            codes = [rank.poll() for rank in ranks]
            while None in codes and not any(codes) and time.monotonic() < end:  # the others wait for one that failed
                time.sleep(0.1)
                codes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    outputs = [future.result()[0] for future in printed]
    failed = next((i for i, code in enumerate(codes) if code), None)
    if failed is not None:
        said = [line for line in outputs[failed].splitlines() if line.strip()] or ["it said nothing"]
        told = [line.removeprefix(_FAILED) for line in said if line.startswith(_FAILED) and line != _ADDED_UP]
        return outputs, f"rank {failed} ended with {codes[failed]}: {[*said, *told][-1]}"
    return outputs, f"not done after {seconds:g} s (--seconds gives more)" if None in codes else ""


def be_a_rank() -> None:
    """Be one of the processes of `check_ranks`, as its environment says; end with 1 after a line on what does not work."""
    try:
        _add_up_and_update()
    except Exception as failure:  # a broken package raises anything
        print(f"{_FAILED}{type(failure).__name__}: {' '.join(str(failure).split())}", flush=True)
        sys.exit(1)


def _add_up_and_update() -> None:
    import torch
    from torch import distributed

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    patience = timedelta(seconds=float(os.environ["DOCTOR_SECONDS"]))
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    sums = torch.full((1_000_000,), rank + 1.0, device="cuda" if cuda else "cpu")
    distributed.all_reduce(sums)
    if not bool((sums == count * (count + 1) / 2).all()):
        raise ArithmeticError(f"the sum over {count} ranks is wrong: {sums[0]}")
    distributed.barrier()
    print(_ADDED_UP, flush=True)

    from megascale.train.engine import Engine, init_distributed
    from megascale.train.schedule import OptimConfig
    from megascale.train.zero import ZeroConfig

    init_distributed()
    engine = Engine(torch.nn.Linear(8, 8), OptimConfig(), ZeroConfig(), micro_batch=1, accumulation=1, num_steps=1)
    engine.train_step(0, [{"input": torch.ones(1, 8)}], lambda y_BD, batch: (y_BD.square().mean(), {}))
    distributed.destroy_process_group()


def check_ray() -> Finding:
    """Look whether the cluster that the environment names, if any, can be reached."""
    version, address = metadata.version("ray"), os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Finding("ray", "ok", f"{version}, no RAY_ADDRESS: jobs join a Ray that runs here, or start one")
    if address == "auto":
        return Finding("ray", "skip", f"{version}, RAY_ADDRESS=auto: jobs need a Ray that runs here", "ray status")
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        port = url.port or {"http": 80, "https": 443, "ray": 10001}.get(url.scheme, 6379)
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as failure:
        found = f"{version}, RAY_ADDRESS={address} does not answer: {failure}"
        return Finding("ray", "FAIL", found, "start that cluster's head, or unset RAY_ADDRESS")
    return Finding("ray", "ok", f"{version}, RAY_ADDRESS={address} answers")


def probe_name() -> str:
    """Return a hidden name that nothing has."""
    return f".megascale-doctor-{secrets.token_hex(8)}"
