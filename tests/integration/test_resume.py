"""Resume: after a crash, at an epoch's end, with another number of ranks. What can be exact is compared byte by byte."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ENVIRONMENT, ROOT, command, deepspeed, run, torchrun
from test_tokenize import wait_for

from megascale.log import read_metrics
from megascale.train import checkpoint

SMOKE = "configs/pretrain/smoke.yaml"
STEPS = 9  # an epoch of 31 training clips has 7 batches of 4
MID_EPOCH, EPOCH_END = 4, 7
# what a step measures of the clock and the machine
MEASURED = ("seconds", "wait", "memory", "per_second", "mfu")


def arguments(tokens: Path, output: Path, *overrides: str) -> list[str]:
    every_step = ["checkpoint.every=1", "checkpoint.keep_last=100", "train.validate_every=4"]
    averages = "train.ema_decay=0.9"
    return [
        SMOKE,
        f"data.url={tokens}",
        f"output.url={output}",
        f"train.steps={STEPS}",
        *every_step,
        averages,
        *overrides,
    ]


def pretrain(ranks: int, *arguments: str) -> list[str]:
    return command("pretrain.py", *arguments) if ranks == 1 else torchrun(ranks, "pretrain.py", *arguments)


def recorded(ranks: int, *arguments: str) -> list[str]:
    return torchrun(ranks, ROOT / "tests" / "integration" / "recorded_pretrain.py", *arguments)


def files(run_folder: Path, step: int = STEPS) -> dict[str, str]:
    """The sha256 of every file of a checkpoint."""
    return checkpoint.verify(checkpoint.step_folder(run_folder / "checkpoints", step)).files


def steps(run_folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.committed(run_folder / "checkpoints")]


def metrics(run_folder: Path) -> list[dict[str, float]]:
    """All that was logged but for what depends on the clock."""
    rows = read_metrics(run_folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not any(part in k for part in MEASURED)} for row in rows]


def crashed_copy(straight: Path, folder: Path, last: int) -> Path:
    """What a crash right after the save of step `last` leaves of a run."""
    shutil.copytree(straight, folder)
    (folder / "result.json").unlink()
    for step in range(last + 1, STEPS + 1):
        shutil.rmtree(checkpoint.step_folder(folder / "checkpoints", step))
    return folder


@pytest.fixture(scope="module")
def straight(tokens, tmp_path_factory):
    """Undisturbed runs by (ranks, stage), each made once."""
    made: dict[tuple[int, int], Path] = {}

    def get(ranks: int, stage: int) -> Path:
        if (ranks, stage) not in made:
            made[ranks, stage] = tmp_path_factory.mktemp("straight") / "run"
            run(pretrain(ranks, *arguments(tokens, made[ranks, stage], f"zero.stage={stage}")))
        return made[ranks, stage]

    return get


def weights(run_folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    folder = checkpoint.step_folder(run_folder / "checkpoints", STEPS) / part
    return safetensors.torch.load_file(folder / "model.safetensors")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "stage", "last"),
    [
        (2, 2, MID_EPOCH),
        (1, 1, EPOCH_END),
        *[pytest.param(2, stage, MID_EPOCH, marks=slow) for stage in (0, 1, 3)],
        *[pytest.param(2, stage, EPOCH_END, marks=slow) for stage in (0, 1, 2, 3)],
        *[pytest.param(1, stage, MID_EPOCH, marks=slow) for stage in (0, 1, 2, 3)],
        *[pytest.param(1, stage, EPOCH_END, marks=slow) for stage in (0, 2, 3)],
    ],
)
def test_resumed_run_ends_with_every_byte_of_the_straight_one(tokens, straight, tmp_path, ranks, stage, last):
    """Weights, averages, optimizer, random states: all that a checkpoint holds, and all that was logged."""
    folder = crashed_copy(straight(ranks, stage), tmp_path / "run", last)
    printed = run(pretrain(ranks, *arguments(tokens, folder, f"zero.stage={stage}")))
    assert f"step-{last:08d} (step {last} of {STEPS})" in printed
    assert files(folder) == files(straight(ranks, stage))
    assert metrics(folder) == metrics(straight(ranks, stage))


def test_zero_stages_train_alike(straight):
    """The same sums in another order: AdamW makes of a rounding difference up to a few 1e-6 in these steps."""
    for part in ("model", "model_ema"):
        reference = weights(straight(2, 1), part)
        for stage in (0, 2, 3):
            ours = weights(straight(2, stage), part)
            assert ours.keys() == reference.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], reference[name], rtol=0, atol=1e-5)


def test_ranks_that_share_validation_find_what_one_finds_alone(straight):
    """Five batches of held-out clips: one of two ranks has one less."""
    alone, shared = ([row for row in metrics(straight(ranks, 1)) if "valid/loss" in row] for ranks in (1, 2))
    assert [row["step"] for row in alone] == [row["step"] for row in shared] == [4, 8, 9]
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # weights differ by roundings


def test_run_that_dropped_the_loaders_state_would_end_otherwise(tokens, straight, tmp_path):
    """The negative control: the same resume, with batches that begin again at the first."""
    folder = crashed_copy(straight(1, 1), tmp_path / "run", MID_EPOCH)
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from megascale import cli\n"
        "from megascale.tasks import pretrain\n"
        "true = pretrain.prefetch\n"
        "pretrain.prefetch = lambda make, start, stop: true(lambda step: make(step - start), start, stop)\n"
        "sys.exit(cli.pretrain())\n"
    )
    run([sys.executable, "-c", program, *arguments(tokens, folder, "zero.stage=1")])
    ours, theirs = files(folder), files(straight(1, 1))
    assert ours.keys() == theirs.keys()
    assert ours["model/model.safetensors"] != theirs["model/model.safetensors"]
    assert metrics(folder) != metrics(straight(1, 1))


def served(record: Path) -> dict[int, list[list[str]]]:
    """Clip keys and digests of each global batch, over all ranks in their order."""
    batches: dict[int, list[list[str]]] = {}
    for path in sorted(record.glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            batches.setdefault(row["step"], []).extend(row["clips"])
    return batches


@pytest.mark.parametrize(
    ("stage", "worlds"),
    [
        (1, (2, 1, 2)),
        *[pytest.param(stage, (2, 1, 4), marks=slow) for stage in (0, 1, 2, 3)],
        *[pytest.param(stage, (2, 1, 2), marks=slow) for stage in (0, 2, 3)],
    ],
)
def test_other_numbers_of_ranks_go_on_with_the_same_clips(tokens, straight, tmp_path, monkeypatch, stage, worlds):
    reference = straight(2, stage)
    folder, options = tmp_path / "run", [f"zero.stage={stage}", "train.validate_every=100"]
    for part, ranks in enumerate(worlds):
        record = tmp_path / f"part-{part}"
        record.mkdir()
        monkeypatch.setitem(ENVIRONMENT, "RECORD", str(record))
        printed = run(recorded(ranks, *arguments(tokens, folder, *options)))
        if part:
            assert f"saved by {worlds[part - 1]} ranks)" in printed
        if part < 2:  # what a crash after 3 and after 6 steps leaves
            (folder / "result.json").unlink()
            for step in range(3 * part + 4, STEPS + 1):
                shutil.rmtree(checkpoint.step_folder(folder / "checkpoints", step))
    assert not list((folder / "checkpoints").glob(".*")), "what was converted is deleted"

    whole = served(tmp_path / "part-0")
    assert sorted(whole) == list(range(STEPS))
    assert len({key for clips in list(whole.values())[:7] for key, _ in clips}) == 28, "no clip twice in an epoch"
    for part in (1, 2):
        again = served(tmp_path / f"part-{part}")
        assert sorted(again) == list(range(3 * part, STEPS))
        assert all(again[step] == whole[step] for step in again)
    for part_name in ("model", "model_ema"):
        ours, theirs = weights(folder, part_name), weights(reference, part_name)
        for name in ours:
            # gradients are summed in another order, and AdamW makes of that up to a few 1e-6
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def is_written_to(folder: Path, left: dict[Path, int]) -> bool:
    with contextlib.suppress(FileNotFoundError):  # deleted while it was looked at
        return any(left.get(path) != path.stat().st_ino for path in folder.rglob("*"))
    return False


@slow
def test_kill_at_20_moments_of_a_save_leaves_a_checkpoint_that_loads(tokens, tmp_path, start):
    """Each time the run goes on from the newest that was committed, and it ends like an undisturbed one."""
    moments, folder, interrupted = random.Random(4), tmp_path / "run", 0
    options = ["zero.stage=1", "train.steps=24"]
    line = deepspeed(2, "pretrain.py", *arguments(tokens, folder, *options))
    for _ in range(20):
        saving = checkpoint.step_folder(folder / "checkpoints", (steps(folder) or [0])[-1] + 1)
        left = {
            path: path.stat().st_ino for path in saving.rglob("*")
        }  # by the kill before, until the save begins anew
        driver = start(line)
        wait_for(lambda saving=saving, left=left: is_written_to(saving, left), driver, pause=0.001)
        time.sleep(moments.uniform(0, 0.05))
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        interrupted += not (saving / "manifest.json").exists()
        for path in checkpoint.committed(folder / "checkpoints"):
            checkpoint.verify(path)
    assert interrupted >= 10, "the kills hit the saves"
    run(line)
    run(deepspeed(2, "pretrain.py", *arguments(tokens, tmp_path / "straight", *options)))
    assert files(folder, 24) == files(tmp_path / "straight", 24)
