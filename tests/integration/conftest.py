"""Real jobs in real processes: each helper runs a script of launch/ as a user does."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import write_paced_tokens

from megascale.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def command(script: str, *arguments: str) -> list[str]:
    """Return the command line of one job."""
    return [sys.executable, str(ROOT / "launch" / script), *arguments]


def deepspeed(ranks: int, script: str, *arguments: str) -> list[str]:
    """Return the command line of one job under the deepspeed launcher, on a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), str(ROOT / "launch" / script), *arguments]


def torchrun(ranks: int, script: Path | str, *arguments: str) -> list[str]:
    """Return the command line of one job under torchrun, which starts sooner than the deepspeed launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, str(ROOT / "launch" / script), *arguments]


def run(line: list[str], exit_code: int = 0, timeout: float = 240) -> str:
    """Run a command to its end, check its exit code, and return what it printed."""
    done = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    printed = done.stdout + done.stderr
    assert done.returncode == exit_code, f"exit code {done.returncode}, expected {exit_code}:\n{printed[-3000:]}"
    return printed


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen]]:
    """Start commands whose processes are all gone after the test."""
    started: list[subprocess.Popen] = []

    def begin(line: list[str]) -> subprocess.Popen:
        process = subprocess.Popen(
            line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """40 clips that can be learned."""
    folder = tmp_path_factory.mktemp("paced")
    write_paced_tokens(folder, 40)
    return folder


@pytest.fixture(scope="module", params=["moto", "rclone"])
def server(request, tmp_path_factory):
    """An S3 server with an empty bucket, of each kind in turn."""
    from s3_servers import keys_in_environment, moto, rclone  # which itself needs this file

    opened = moto() if request.param == "moto" else rclone(tmp_path_factory.mktemp("rclone"))
    with keys_in_environment(), opened as started:
        yield started
