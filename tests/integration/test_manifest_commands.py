"""Every command of the manifests, as they spell it: audio in a bucket to the table, a process and a disk for each step.

Rendered from the overlay `local`, with the bucket, its keys and the run folders of this test; Kubernetes' part (variables,
DNS, which node a pod is) is played by `Pod`, and the submitter by the shell line that KubeRay makes, but for its wait.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT
from manifests import one_pod, render
from ray_nodes import start_node, stop, wait_for_port
from s3_servers import KEYS, Server, moto
from test_pretrain import arguments
from test_tokenize import wait_for

from megascale.config import load_config
from megascale.corpora import write_corpora
from megascale.log import read_metrics
from megascale.ports import free_port
from megascale.quickstart import QuickstartConfig
from megascale.tokenize.plan import CODEC_FILE
from megascale.train import checkpoint

_SMOKE = load_config(QuickstartConfig, "quickstart", str(ROOT / "configs" / "quickstart" / "smoke.yaml"), [])


@dataclass(frozen=True)
class Stage:
    """The bucket and the rendered manifests; `runs` of each step is a folder that no other step sees."""

    server: Server
    folder: Path

    def objects(self, step: str) -> list[dict[str, Any]]:
        made = self.folder / step
        (made / "runs").mkdir(parents=True)
        settings = {
            "AWS_ENDPOINT_URL": self.server.endpoint,
            "AUDIO_URL": "s3://bucket/audio",
            "TOKENS_URL": "s3://bucket/tokens",
            "CHECKPOINTS_URL": "s3://bucket/checkpoints",
            "SOURCE": "source.kind=files source.url=s3://bucket/audio/pretrain",
            "LABELLED_CODEC_WEIGHTS": f"s3://bucket/tokens/pretrain/{CODEC_FILE}",
            "RUNS": str(made / "runs"),
        }
        overlay = {
            "namespace": "megascale",
            "resources": [os.path.relpath(ROOT / "k8s" / "overlays" / "local", made.resolve())],
            "configMapGenerator": [
                {"name": "settings", "behavior": "merge", "literals": [f"{k}={v}" for k, v in settings.items()]}
            ],
            "secretGenerator": [{"name": "store", "literals": [f"{k}={v}" for k, v in KEYS.items()]}],
            "generatorOptions": {"disableNameSuffixHash": True},
        }
        (made / "kustomization.yaml").write_text(json.dumps(overlay))
        return render(made)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("manifests")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which has kustomize built in, is not here")
    write_corpora(folder / "audio", _SMOKE.corpus, 0, 2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with moto() as server:
            server.upload(folder / "audio", "audio")
            shutil.rmtree(folder / "audio")
            yield Stage(server, folder)


def shell(pod: dict[str, str], home: Path) -> dict[str, str]:
    """A container's environment: what the image has, and nothing of this shell but for that."""
    image = {name: ENVIRONMENT[name] for name in ("OMP_NUM_THREADS", "RAY_USAGE_STATS_ENABLED")}
    image |= {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return image | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | pod


def checkout() -> set[str]:
    """What lies in the checkout that git doesn't hold, which is the image's root file system here."""
    line = ["git", "status", "--porcelain", "--ignored", "--untracked-files=all"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {row for row in told if "cache" not in row}


def run_ray_job(objects, name: str) -> str:
    """Run a RayJob's entrypoint on a head and a worker whose environments are those of their containers."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has 107 characters at most
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # as KubeRay gives each container
    head, worker, submitter = (
        shell(one_pod(objects, "RayJob", name, path=part).environment(), folder) | token | {"RAY_TMPDIR": str(folder)}
        for part in (".headGroupSpec.", ".workerGroupSpecs", ".submitterPodTemplate.")
    )
    (job,) = (made for made in objects if (made["kind"], made["metadata"]["name"]) == ("RayJob", name))
    cluster = job["spec"]["rayClusterSpec"]
    port, dashboard, client = (free_port() for _ in range(3))
    starts = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    head_cpus, python = int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"]), Path(sys.executable)
    nodes: list[subprocess.Popen] = []
    try:
        nodes.append(start_node(python, folder, head, *starts, cpus=head_cpus, work=ROOT))
        wait_for_port(dashboard, nodes[0], folder / "nodes.log")
        nodes.append(start_node(python, folder, worker, f"--address=127.0.0.1:{port}", cpus=2, work=ROOT))
        ray, told = f"ray job {{}} --address http://127.0.0.1:{dashboard}", {"env": submitter, "cwd": ROOT}
        entrypoint = job["spec"]["entrypoint"].strip()
        line = (
            f"if ! {ray.format('status')} {name} >/dev/null 2>&1 ; then "
            f"{ray.format('submit')} --no-wait --submission-id {name} -- {entrypoint} ; fi ; "
            f"{ray.format('logs')} --follow {name}"
        )
        done = subprocess.run(["bash", "-ce", line], capture_output=True, text=True, timeout=400, check=False, **told)
        ended = subprocess.run(
            [*ray.format("status").split(), name], capture_output=True, text=True, timeout=60, check=False, **told
        )
    finally:
        stop(nodes)
        shutil.rmtree(folder, ignore_errors=True)
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and f"Job '{name}' succeeded" in ended.stdout, printed[-4000:]
    return printed


def run_ranks(objects, name: str, home: Path) -> None:
    """Run a JobSet's command as its two pods would."""
    nodes, port = [], str(free_port())
    for rank in range(2):
        labels = {"jobset.sigs.k8s.io/jobset-name": name, "batch.kubernetes.io/job-completion-index": str(rank)}
        pod = one_pod(objects, "JobSet", name, labels)
        found = pod.environment()
        assert found["PET_MASTER_ADDR"] == f"{name}-node-0-0.{name}"
        here = shell(found, home) | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        nodes.append(
            subprocess.Popen(
                pod.command(found), env=here, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in printed)


def test_pod_of_ranks_ends_with_2_by_which_the_job_is_not_begun_again(tokens, tmp_path, start):
    pod = start_ranks(start, tokens, tmp_path / "run", "optim.lrr=1")
    assert pod.wait(timeout=120) == 2
    assert "did you mean 'lr'?" in pod.stderr.read()


@pytest.mark.parametrize(
    ("codes", "status", "code"),
    [
        (("0", "0"), 0, 0),
        (("75 Stopped", "0"), 1, 75),
        (("75 Stopped", ""), 1, 1),
        (("75 Stopped", "4 TrainingDiverged"), 1, 4),
        (("2 StoreUnavailable", "75 Stopped"), 1, 1),
        (("2 FolderInUse", ""), 1, 1),
        (("2 StoreUnavailable", "2 DataError"), 1, 2),
        (("", ""), 143, 143),
    ],
)
def test_pod_of_ranks_ends_as_they_say(tmp_path, codes, status, code):
    """The script's own sums, with what ranks may leave: another script stands in torchrun's place."""
    left = "".join(f'echo "{c}" > "$MEGASCALE_EXIT_CODES/rank-0000{i}"\n' for i, c in enumerate(codes) if c)
    (tmp_path / "torchrun").write_text(f"#!/bin/sh\n{left}exit {status}\n")
    (tmp_path / "torchrun").chmod(0o755)
    shell = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PET_NPROC_PER_NODE": "2", "TMPDIR": str(tmp_path)}
    assert subprocess.run(["sh", "k8s/pretrain.sh", "any.yaml"], cwd=ROOT, env=shell, check=False).returncode == code


@pytest.mark.parametrize(
    ("codes", "code", "corpora"),
    [((0, 0, 0, 0), 0, 4), ((3, 0, 0, 0), 3, 4), ((0, 0, 3, 0), 3, 4), ((3, 2, 0, 0), 2, 2), ((75, 0, 0, 0), 75, 1)],
)
def test_corpora_are_tokenised_one_after_the_other_until_one_fails(tmp_path, codes, code, corpora):
    """Too many quarantined clips in one, exit code 3, are no reason to leave the others; a script stands for the job."""
    (tmp_path / "python").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/lines\n'
        f"exit $(echo {' '.join(map(str, codes))} | cut -d' ' -f$(wc -l < {tmp_path}/lines))\n"
    )
    (tmp_path / "python").chmod(0o755)
    names = ("TOKENIZE_CONFIG", "SOURCE", "TOKENS_URL", "CODEC_WEIGHTS", "TOKENIZE_WORKERS", "AUDIO_URL")
    shell = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **{name: name.lower() for name in names}}
    shell["LABELLED_CODEC_WEIGHTS"] = "fitted"
    assert subprocess.run(["sh", "k8s/tokenize.sh"], cwd=ROOT, env=shell, check=False).returncode == code
    lines = (tmp_path / "lines").read_text().splitlines()
    assert len(lines) == corpora
    assert lines[0] == (
        "launch/tokenize_audio.py tokenize_config source output.url=tokens_url/pretrain codec.weights=codec_weights "
        "workers.count=tokenize_workers"
    )
    assert all("codec.weights=fitted" in line for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [("drain", 75), ("a rank killed", 1)])
def test_pod_of_ranks_ends_with_75_only_if_all_of_them_saved(tokens, tmp_path, start, stop, code):
    endless = ["train.steps=100000", "checkpoint.every=50000", "train.validate_every=50000"]
    pod = start_ranks(start, tokens, tmp_path / "run", *endless)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: any(row["step"] > 3 for row in read_metrics(metrics)), pod)
    if stop == "drain":
        pod.terminate()
    else:
        ranks = [p for p in psutil.Process(pod.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
    assert pod.wait(timeout=120) == code
    saved = checkpoint.committed(tmp_path / "run" / "checkpoints")
    assert len(saved) == (stop == "drain")


def start_ranks(start, tokens: Path, output: Path, *overrides: str) -> subprocess.Popen:
    """Run a pretraining's pod of two ranks, the only one."""
    ranks = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": str(free_port())}
    variables = [f"{name}={value}" for name, value in ranks.items()]
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    return start(["env", path, *variables, "sh", "k8s/pretrain.sh", *arguments(tokens, output, *overrides)])


@pytest.mark.slow
def test_audio_in_a_bucket_becomes_the_table_by_the_manifests_own_commands(stage, tmp_path):
    before = checkout()
    objects = stage.objects("tokenize")
    printed = run_ray_job(objects, "tokenize")
    assert printed.count("next: python launch/pretrain.py CONFIG data.url=s3://bucket/tokens/") == 4, printed[-3000:]

    for name, codebooks in (("pretrain-1k5", 2), ("pretrain-12k", 16)):
        objects = stage.objects(name)
        run_ranks(objects, name, tmp_path)
        made = stage.folder / name / "runs" / name
        assert json.loads((made / "result.json").read_text())["steps"] == 6
        assert "zero_pp_rank_1" in str(list((made / "checkpoints").rglob("*"))), "two ranks"
        config = json.loads((made / "checkpoints" / "step-00000006" / "model" / "config.json").read_text())
        assert config["num_codebooks"] == codebooks
        shutil.rmtree(stage.folder / name)

    objects = stage.objects("finetune")
    pod = one_pod(objects, "Job", "finetune")
    found = pod.environment()
    subprocess.run(
        pod.command(found), env=shell(found, tmp_path), cwd=ROOT, check=True, capture_output=True, timeout=240
    )
    result = json.loads((stage.folder / "finetune" / "runs" / "finetune" / "result.json").read_text())
    assert result["arm"] == "ft" and result["checkpoint"].startswith("s3://bucket/checkpoints/pretrain-1k5")
    assert result["classes"] == ["music", "speech"]

    objects = stage.objects("table1")
    assert "18/18 runs" in run_ray_job(objects, "table1")
    table = json.loads((stage.folder / "table1" / "runs" / "table1" / "table1.json").read_text())
    assert len(table["cells"]) == 18 and all(len(found) == 4 for found in table["baselines"].values())
    pinned = {cell["checkpoint"] for cell in table["cells"]} - {None}
    assert {url.split("/checkpoints/")[1].split("/")[0] for url in pinned} == {"pretrain-1k5", "pretrain-12k"}
    assert checkout() == before, "a root file system that is only read would have refused"
