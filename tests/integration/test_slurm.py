"""launch/pretrain.sbatch, run by bash: two nodes are two torchruns on this machine.

There is no Slurm here, so two scripts stand on PATH in its place: `srun` runs its command here, once for each node, and
`scontrol` names this machine as each of them and writes down what it is asked to requeue. What Slurm itself does, when it
signals and what it puts back, is the word of its manual, and not shown.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT
from deepspeed.launcher.runner import fetch_hostfile
from test_pretrain import arguments
from test_tokenize import wait_for

from megascale.log import read_metrics
from megascale.ports import free_port
from megascale.train import checkpoint

SCRIPT = ROOT / "launch" / "pretrain.sbatch"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & tasks+=($!); done
highest=0
for task in "${tasks[@]}"; do
    wait "$task"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) for ((node = 0; node < SLURM_NNODES; node++)); do echo 127.0.0.1; done ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
TORCHRUN = """#!/bin/bash
mkdir -p "$MEGASCALE_EXIT_CODES"
for rank in {0..1}; do [[ -z ${CODES[rank]} ]] || echo "${CODES[rank]}" > "$MEGASCALE_EXIT_CODES/rank-0000$rank"; done
exit $STATUS
"""
SPOILT = """import sys
sys.path.insert(0, {root!r})
from megascale import cli
from megascale.tasks import pretrain
true = pretrain.masked_loss
pretrain.masked_loss = lambda output, batch: [part * float("nan") if i == 0 else part
                                              for i, part in enumerate(true(output, batch))]
sys.exit(cli.pretrain())
"""


class Slurm:
    """A folder that jobs are submitted from, like a checkout, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._requeued = folder, folder / "requeued"
        self._jobs: list[subprocess.Popen] = []
        self._seen: set[psutil.Process] = set()
        (folder / "launch").mkdir(parents=True)
        (folder / "launch" / "pretrain.py").symlink_to(ROOT / "launch" / "pretrain.py")
        (folder / "configs").symlink_to(ROOT / "configs")
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def sbatch(self, *arguments: str, **variables: str) -> subprocess.Popen:
        """Start the script as Slurm does on the first of two nodes of one GPU each."""
        environment = {
            **ENVIRONMENT,
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "REQUEUED": str(self._requeued),
            "MASTER_PORT": str(free_port()),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
            **variables,
        }
        line = ["bash", str(SCRIPT), *arguments]
        job = subprocess.Popen(
            line, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._jobs.append(job)
        return job

    def torchruns(self, job: subprocess.Popen) -> list[psutil.Process]:
        """Return the step's tasks, which Slurm signals."""
        below = psutil.Process(job.pid).children(recursive=True)
        self._seen.update(below)
        return [process for process in below if process.cmdline()[1].endswith("/torchrun")]

    @property
    def requeued(self) -> list[str]:
        return self._requeued.read_text().split() if self._requeued.exists() else []

    def end(self) -> None:
        """End what a failed test has left running."""
        for job in self._jobs:
            if job.poll() is None:
                self.torchruns(job)
                job.kill()
            job.communicate()
        for process in self._seen:
            if process.is_running():
                process.kill()


@pytest.fixture
def slurm(tmp_path) -> Iterator[Slurm]:
    made = Slurm(tmp_path / "checkout")
    yield made
    made.end()


def test_job_that_slurm_stops_is_put_back_and_goes_on(slurm, tokens, tmp_path):
    """First the time limit, which both nodes are told of; then one node alone is wanted by another job."""
    endless = ["train.steps=100000", "checkpoint.every=50000", "train.validate_every=50000"]
    line, metrics, step = arguments(tokens, tmp_path / "run", *endless), tmp_path / "run" / "metrics.jsonl", 0
    for start, num_told in enumerate((2, 1), start=1):
        job = slurm.sbatch(*line)
        wait_for(lambda step=step: any(row["step"] > step + 3 for row in read_metrics(metrics)), job)
        torchruns = slurm.torchruns(job)
        assert len(torchruns) == 2
        for process in torchruns[:num_told]:
            process.terminate()
        printed = job.communicate(timeout=120)[1]
        assert job.returncode == 75, printed[-3000:]
        assert slurm.requeued == ["4242"] * start
        assert (f"(step {step} of 100000)" in printed) == (start > 1)
        saved = checkpoint.verify(checkpoint.committed(tmp_path / "run" / "checkpoints")[-1])
        assert saved.world_size == 2 and saved.step > step
        step = saved.step
    assert not list(slurm.folder.glob("slurm-*"))


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(0, id="done", marks=pytest.mark.slow),
        pytest.param(2, id="bad input"),
        pytest.param(4, id="NaN", marks=pytest.mark.slow),
    ],
)
def test_job_that_ends_by_itself_is_not_put_back(slurm, tokens, tmp_path, code):
    if code == 4:
        program = slurm.folder / "launch" / "pretrain.py"
        program.unlink()
        program.write_text(SPOILT.format(root=str(ROOT)))
    job = slurm.sbatch(*arguments(tokens, tmp_path / "run", *(["optim.lrr=1"] if code == 2 else [])))
    printed = job.communicate(timeout=120)[1]
    assert job.returncode == code, printed[-3000:]
    assert slurm.requeued == []
    told = {0: "next: python launch/finetune.py", 2: "did you mean 'lr'?", 4: "TrainingDiverged: step 1: "}
    assert told[code] in printed


@pytest.mark.parametrize(
    ("codes", "status", "restarts", "ended", "put_back"),
    [
        pytest.param(("75 Stopped", "0"), 1, 1, 75, True, id="one had nothing left to save"),
        pytest.param(("75 Stopped", ""), 1, 1, 1, False, id="one crashed, and the other was stopped for it"),
        pytest.param(
            ("75 Stopped", "4 TrainingDiverged"), 1, 1, 4, False, id="one failed, and the other was stopped for it"
        ),
        pytest.param(("", ""), 143, 0, 75, True, id="no rank had begun"),
        pytest.param(("", ""), 137, 0, 137, False, id="killed"),
        pytest.param(("75 Stopped", "75 Stopped"), 1, 199, 75, True, id="stopped again and again"),
        pytest.param(("75 Stopped", "75 Stopped"), 1, 200, 75, False, id="stopped too often"),
    ],
)
def test_job_is_put_back_only_if_nothing_was_lost(slurm, codes, status, restarts, ended, put_back):
    """The script's own sums, with what ranks may leave: a third script stands in torchrun's place."""
    text = TORCHRUN.replace("mkdir", f"CODES=({' '.join(map(repr, codes))}); mkdir", 1)
    (slurm.folder / "torchrun").write_text(text)
    (slurm.folder / "torchrun").chmod(0o755)
    job = slurm.sbatch("any.yaml", STATUS=str(status), SLURM_RESTART_COUNT=str(restarts))
    job.communicate(timeout=30)
    assert (job.returncode, slurm.requeued) == (ended, ["4242"] * put_back)


def test_hostfile_is_one_that_deepspeed_reads():
    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"node-0": 8, "node-1": 8}
