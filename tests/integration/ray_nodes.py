"""Ray nodes on this machine, each a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megascale.ports import free_port


def start_node(
    python: Path, folder: Path, environment: dict[str, str], *arguments: str, cpus: int = 1, work: Path | None = None
) -> subprocess.Popen:
    """Start a head or a worker; `folder` takes its session and its log, and jobs begin in `work`, or there."""
    agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    ports = [f"--{name}-port={free_port()}" for name in agents]
    common = [f"--num-cpus={cpus}", "--object-store-memory=100000000", "--block", f"--temp-dir={folder}/ray"]
    line = [str(python), "-m", "ray.scripts.scripts", "start", *arguments, *common, *ports]
    with (folder / "nodes.log").open("a") as log:
        return subprocess.Popen(
            line, cwd=work or folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def wait_for_port(port: int, node: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert node.poll() is None, f"the head did not start:\n{log.read_text()[-3000:]}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError("the dashboard never came up")


def processes(nodes: Sequence[subprocess.Popen]) -> list[psutil.Process]:
    """Return every process of the nodes that still run."""
    alive = [psutil.Process(node.pid) for node in nodes if node.poll() is None]
    return [child for process in alive for child in process.children(recursive=True)]


def stop(nodes: Sequence[subprocess.Popen]) -> None:
    """End the nodes' processes and nothing else: `ray stop` would end every Ray on the machine."""
    running = processes(nodes)
    for node in reversed(nodes):
        node.terminate()
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
