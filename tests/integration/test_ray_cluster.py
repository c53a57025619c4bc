"""Tokenization and the table on a real Ray cluster of two nodes here: `ray job submit`, `ray submit`, `ray job stop`.

The nodes' Python has every dependency and no megascale, as on a cluster where nobody installed it.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, run
from fault_proxy import FaultProxy
from ray.autoscaler._private.util import prepare_config, validate_config
from ray_nodes import processes, start_node, stop, wait_for_port
from s3_servers import KEYS, keys_in_environment, moto
from support import write_tones
from test_table1_job import write_inputs
from test_tokenize import SMOKE, hashes, same_codec, tokenize

from megascale.ports import free_port

_LAST = "next: python launch/pretrain.py CONFIG data.url="
_COPIES = "ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"  # of the working directory, on a node


@dataclass(frozen=True)
class Cluster:
    checkout: Path  # what jobs are submitted from
    python: Path  # of the nodes
    environment: dict[str, str]  # what a shell on a node, or a user's, holds
    nodes: list[subprocess.Popen]
    port: int  # of the head

    def ray(self, *arguments: str, exit_code: int = 0, **variables: str) -> str:
        """Run the `ray` command in the checkout; return what it printed, or its output if that is JSON."""
        line = [str(Path(sys.executable).with_name("ray")), *arguments]
        shell = {**self.environment, **variables}
        done = subprocess.run(
            line, cwd=self.checkout, env=shell, capture_output=True, text=True, timeout=240, check=False
        )
        printed = done.stdout + done.stderr
        assert done.returncode == exit_code, f"exit code {done.returncode}, expected {exit_code}:\n{printed[-3000:]}"
        return done.stdout if "--format=json" in arguments else printed

    def submit(
        self, job: str, *arguments: str, script: str = "tokenize_audio.py", wait: bool = True, exit_code: int = 0
    ) -> str:
        """Submit a script as the README says; return the job's log."""
        line = ["job", "submit", "--submission-id", job, *([] if wait else ["--no-wait"]), "--working-dir", ".", "--"]
        return self.ray(*line, "python", f"launch/{script}", *arguments, exit_code=exit_code)

    def processes(self) -> list[psutil.Process]:
        return processes(self.nodes)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets lie under this folder, and a socket's path has 107 characters at most
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    python = node_python(folder / "env")
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {
        **{name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")},
        **KEYS,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),  # where a bare ray.init() looks for the cluster that runs on this machine
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    port, dashboard, client = (free_port() for _ in range(3))
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    made = Cluster(copy_checkout(folder / "checkout"), python, environment, [], port)
    try:
        made.nodes.append(start_node(python, folder, environment, *head))
        wait_for_port(dashboard, made.nodes[0], folder / "nodes.log")
        made.nodes.append(start_node(python, folder, environment, f"--address=127.0.0.1:{port}"))
        yield made
    finally:
        stop(made.nodes)
        shutil.rmtree(folder, ignore_errors=True)


def node_python(folder: Path) -> Path:
    """Make an environment with this one's dependencies and without megascale, whose own `.pth` file is not read there."""
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(here + "\n")
    python = folder / "bin" / "python"
    asked = "import ray, importlib.util as u; raise SystemExit(u.find_spec('megascale') is not None)"
    assert subprocess.run([python, "-c", asked], cwd=folder, check=False).returncode == 0
    return python


def copy_checkout(folder: Path) -> Path:
    """Copy what a job needs of the checkout, and put beside it what must not travel."""
    for name in ("launch", "megascale", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("runs/small/tokens-000000.tar", ".venv/bin/python", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"large")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, Path]:
    """The audio, and the run without a cluster that the others are held against."""
    folder = tmp_path_factory.mktemp("local")
    write_tones(folder / "audio", 24)
    run(tokenize(folder / "audio", folder / "out", "shards.clips=4"))
    return folder / "audio", folder / "out"


def arguments(local: tuple[Path, Path], output: Path) -> list[str]:
    audio, reference = local
    return [f"source.url={audio}", f"output.url={output}", "shards.clips=4", same_codec(reference)]


def test_submitted_job_spreads_over_the_nodes_and_makes_the_shards_of_a_local_run(cluster, local, tmp_path):
    line = [SMOKE, *arguments(local, tmp_path / "out")]
    printed = cluster.submit("first", *line)
    assert "24 clips in 6 shards with 2 workers" in printed
    assert "Job 'first' succeeded" in printed
    assert f"{_LAST}{tmp_path / 'out'}\n" in printed
    assert hashes(tmp_path / "out") == hashes(local[1])
    actors = json.loads(cluster.ray("list", "actors", "--detail", "--format=json", "--filter=class_name=ShardWorker"))
    assert len({actor["node_id"] for actor in actors}) == 2
    assert "already done: 24 clips in 6 shards" in cluster.submit("again", *line)
    names = {path.name for path in next(cluster.checkout.parent.glob(_COPIES)).iterdir()}
    assert {"megascale", "launch", "configs"} <= names and not names & {"runs", ".venv", ".git"}


def test_bad_input_fails_the_job_with_its_one_line(cluster, local, tmp_path):
    """The working directory is Ray's copy here, so a relative output would be lost with it."""
    line = [SMOKE, *arguments(local, tmp_path / "out"), "output.url=runs/out"]
    printed = cluster.submit("bad", *line, exit_code=1)
    assert "\nConfigError: tokenize.output.url=runs/out: lies in Ray's copy of the working directory" in printed
    assert "Traceback" not in printed
    assert "failed with exit code 2" in cluster.ray("job", "status", "bad")


@pytest.mark.slow
def test_submitted_table_spreads_its_cells_over_the_nodes_and_is_made_once(cluster, tmp_path):
    line = ["configs/table1/smoke.yaml", *write_inputs(tmp_path)]
    lost = cluster.submit("lost", *line, "output.url=runs/table1", script="table1.py", exit_code=1)
    assert "\nConfigError: table1.output.url=runs/table1: lies in Ray's copy of the working directory" in lost
    assert "failed with exit code 2" in cluster.ray("job", "status", "lost")

    line.append(f"output.url={tmp_path / 'out'}")
    printed = cluster.submit("table", *line, script="table1.py")
    assert "18/18 runs" in printed and "Job 'table' succeeded" in printed
    table = json.loads((tmp_path / "out" / "table1.json").read_text())
    assert len(table["summary"]) == 18 and all(len(found) == 4 for found in table["baselines"].values())
    assert (tmp_path / "out" / "table1.html").exists()
    cells = json.loads(
        cluster.ray("list", "tasks", "--detail", "--format=json", "--limit=1000", "--filter=name=_one_thread_on_cpus")
    )
    assert len(cells) == 18 and len({cell["node_id"] for cell in cells}) == 2
    assert f"{tmp_path / 'out' / 'table1.json'}: already done" in cluster.submit(
        "table-again", *line, script="table1.py"
    )


def test_stopped_job_leaves_what_the_same_command_finishes(cluster, local, tmp_path):
    line = [SMOKE, *arguments(local, tmp_path / "out"), "workers.count=1"]
    cluster.submit("stopped", *line, wait=False)
    worker = wait_until(lambda: next((p for p in cluster.processes() if is_worker(p)), None))
    wait_until(lambda: list((tmp_path / "out").glob("tokens-*.json")))
    worker.suspend()  # so that the job cannot end before it is stopped
    cluster.ray("job", "stop", "stopped")
    assert "Job 'stopped' was stopped" in cluster.ray("job", "status", "stopped")
    assert not (tmp_path / "out" / "manifest.json").exists()
    cluster.submit("continued", *line)
    assert hashes(tmp_path / "out") == hashes(local[1])


def test_node_that_is_lost_while_it_encodes_costs_no_shard(cluster, local, tmp_path):
    """Of a head and two workers, one with all its processes, while the store keeps it waiting for a shard's audio."""
    address = f"--address=127.0.0.1:{cluster.port}"
    lost = start_node(cluster.python, cluster.checkout.parent, cluster.environment, address)
    cluster.nodes.append(lost)
    wait_until(lambda: cluster.ray("status").count("node_") == 3)
    with keys_in_environment(), moto() as server, FaultProxy(server.endpoint, 0.0, kinds=("held",)) as store:
        server.upload(local[0], "audio")
        line = [SMOKE, *arguments(local, tmp_path / "out"), "source.url=s3://bucket/audio"]
        cluster.submit("lost-node", *line, f"storage.endpoint_url={store.url}", wait=False)
        wait_until(lambda: any(is_worker(process) for process in cluster.processes()))
        store.share = 1.0  # the audio is listed, and no worker has loaded its codec
        wait_until(lambda: any(is_worker(p) and is_connected(p, store) for p in processes([lost])))
        for process in processes([lost]):
            process.kill()
        lost.kill()
        store.share = 0.0
        store.release.set()
        wait_until(lambda: "succeeded" in cluster.ray("job", "status", "lost-node"))
    assert "its worker died; trying again" in cluster.ray("job", "logs", "lost-node")
    assert hashes(tmp_path / "out") == hashes(local[1])


def is_connected(process: psutil.Process, store: FaultProxy) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(c.raddr and c.raddr.port == store.server_address[1] for c in process.net_connections())
    return False


def is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "ShardWorker" in "".join(process.cmdline())
    return False


def wait_until(ready: Callable[[], Any]) -> Any:
    for _ in range(6000):
        if found := ready():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_ray_submit_installs_the_package_and_makes_the_shards_of_a_local_run(cluster, local, tmp_path):
    """The launcher's own commands and ours, on a head that is this machine: see this_machine.py for what is not shown."""
    cloud = prepare_config(yaml.safe_load((ROOT / "launch" / "ray_cluster.yaml").read_text()))
    cloud["provider"] = {"type": "external", "module": "this_machine.ThisMachine"}
    cloud["docker"] = {}
    cloud["file_mounts"] = {name.replace("/home/ray", "~"): here for name, here in cloud["file_mounts"].items()}
    # the head runs already, and the launcher's own lines begin with `ray stop`
    cloud["head_start_ray_commands"] = cloud["worker_start_ray_commands"] = []
    (tmp_path / "cloud.yaml").write_text(yaml.safe_dump(cloud))
    home = tmp_path / "home"
    home.mkdir()
    shell = {
        "HOME": str(home),
        "PYTHONPATH": str(Path(__file__).parent),
        "TMPDIR": str(tmp_path),  # of the launcher's cache
        "PIP_NO_INDEX": "1",  # every dependency is there
        "PIP_NO_BUILD_ISOLATION": "0",  # which turns isolation off: pip reads this one the other way round
    }
    config = str(tmp_path / "cloud.yaml")
    cluster.ray("up", "--yes", config, **shell)
    shutil.copytree(local[0], home / "audio")
    # relative URLs: the job begins in the home folder, and the nodes' workers do not
    line = ["checkout/configs/tokenize/smoke.yaml", *arguments(local, tmp_path), "source.url=audio", "output.url=out"]
    printed = cluster.ray("submit", config, "launch/tokenize_audio.py", *line, **shell)
    assert "24 clips in 6 shards with 2 workers" in printed
    assert f"{_LAST}out\n" in printed
    assert hashes(home / "out") == hashes(local[1])


def test_cluster_file_holds_what_rays_launcher_accepts():
    cloud = yaml.safe_load((ROOT / "launch" / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(cloud))
    assert all((ROOT / here).exists() for here in cloud["file_mounts"].values())
    rays_version = cloud["docker"]["image"].split(":")[1].split("-")[0]
    assert f"ray=={rays_version}" in (ROOT / "constraints.txt").read_text().split()
