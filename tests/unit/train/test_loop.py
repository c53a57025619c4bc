"""The loop, on a real engine of one process: what happens when, a clean stop, and a resume that is the straight run."""

import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megascale.errors import Stopped, TrainingDiverged
from megascale.log import MetricLog, read_metrics
from megascale.train.engine import Batch, Engine, LossFn
from megascale.train.loop import Hooks, fit
from megascale.train.profiling import StepProfiler
from megascale.train.schedule import OptimConfig, lr_factor
from megascale.train.zero import ZeroConfig

STEPS = 7
OPTIM = OptimConfig(lr=0.1)


pytestmark = pytest.mark.usefixtures("process_group")


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.layer.weight.data.fill_(0.5)
        self.layer.bias.data.zero_()

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layer(x_BD)[:, 0]


def batch_of(step: int) -> Batch:
    x_BD = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return {"x_BD": x_BD, "targets_B": x_BD.sum(dim=1)}


def cut(batch: Batch, parts: int) -> list[Batch]:
    size = 4 // parts
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, 4, size)]


def loss_fn(y_B: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (y_B - batch["targets_B"]).pow(2).mean()
    return loss, {"loss": loss, "clips": torch.tensor(float(len(y_B)))}


class Job:
    """Runs `fit` and writes down what it asked for."""

    def __init__(self, path: Path, accumulation: int = 1) -> None:
        self.engine = Engine(Line(), OPTIM, ZeroConfig(stage=0), 4 // accumulation, accumulation, STEPS)
        self.events: list[tuple[str, int]] = []
        self.saved: dict[int, dict[str, float]] = {}
        self.losses: list[float] = []
        self._path, self._accumulation = path, accumulation
        self.kill_at: int | None = None
        self.loss_fn: LossFn = loss_fn
        self.profiler: StepProfiler | None = None
        self.diverged: list[tuple[int, int, list[float]]] = []
        self.enough_at: int | None = None

    def run(self, start: int = 0, log_every: int = 3, validate_every: int = 4, save_every: int = 5) -> None:
        log = MetricLog(self._path / "metrics.jsonl", start)
        hooks = Hooks(self._summarise, self._validate, self._save, lambda metrics: "", self._diverged, self._enough)
        every = (log_every, validate_every, save_every)
        try:
            fit(self.engine, self._batches(start), self.loss_fn, hooks, log, "job", start, STEPS, *every, self.profiler)
        finally:
            log.close()

    def _enough(self) -> bool:
        return self.enough_at is not None and ("validate", self.enough_at) in self.events

    def _batches(self, start: int) -> Iterator[list[Batch]]:
        for step in range(start, STEPS):
            if step + 1 == self.kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            self.events.append(("batch", step))
            yield cut(batch_of(step), self._accumulation)

    def _summarise(self, sums: dict[str, Tensor], seconds: float) -> dict[str, float]:
        return {name: float(value) for name, value in sums.items()} | {"told_seconds": seconds}

    def _validate(self, steps: int) -> dict[str, float]:
        self.events.append(("validate", steps))
        return {"valid/loss": float(steps)}

    def _save(self, steps: int, validated: dict[str, float]) -> None:
        self.events.append(("save", steps))
        self.saved[steps] = validated
        self.engine.save(self._path / f"step-{steps}")

    def _diverged(self, step: int, micro_batches: list[Batch], losses: list[float]) -> str:
        self.diverged.append((step, len(micro_batches), losses))
        return "there"

    def done(self, kind: str) -> list[int]:
        return [steps for name, steps in self.events if name == kind]

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.engine.module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("straight"))
    job.run()
    return job


def test_logs_validations_and_saves_come_in_their_turn_and_at_the_end(straight):
    assert straight.done("batch") == list(range(7))
    assert straight.done("validate") == [4, 7]
    assert straight.done("save") == [5, 7]
    rows = read_metrics(straight._path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 5, 6, 7], (
        "and before each save: a resume begins with none"
    )
    assert [row["step"] for row in rows if "valid/loss" in row] == [4, 7]


def test_save_gets_the_validation_of_its_own_step_alone(straight):
    assert straight.saved == {5: {}, 7: {"valid/loss": 7.0}}


def test_report_sums_the_steps_since_the_last_one(straight):
    rows = [row for row in read_metrics(straight._path / "metrics.jsonl") if "loss" in row]
    assert [(row["updates"], row["clips"]) for row in rows] == [(3, 12), (2, 8), (1, 4), (1, 4)]
    for row, steps in zip(rows, ([0, 1, 2], [3, 4], [5], [6]), strict=True):
        # summed in fp32 by the engine's report
        assert row["lr"] == pytest.approx(sum(0.1 * lr_factor(step, STEPS, OPTIM) for step in steps), rel=1e-6)
        assert 0 <= row["train/data_wait_share"] <= 1


def test_weights_follow_plain_adamw_with_clipping_and_schedule(straight):
    model = Line()
    groups = [{"params": [model.layer.weight]}, {"params": [model.layer.bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = OPTIM.lr * lr_factor(step, STEPS, OPTIM)
        batch = batch_of(step)
        adamw.zero_grad()
        loss_fn(model(batch["x_BD"]), batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adamw.step()
    for got, expected in zip(straight.weights(), model.parameters(), strict=True):
        # DeepSpeed clips by norm + 1e-6 in another order of operations
        assert torch.allclose(got, expected, atol=1e-5)


def test_micro_batches_give_the_weights_of_the_whole_batch(straight, tmp_path):
    job = Job(tmp_path, accumulation=2)
    job.run()
    for got, expected in zip(job.weights(), straight.weights(), strict=True):
        # gradients are summed in another order, and Adam divides by their size
        assert torch.allclose(got, expected, atol=1e-5)


def test_resume_gives_the_weights_of_the_straight_run(straight, tmp_path):
    job = Job(tmp_path)
    job.engine.load(straight._path / "step-5")
    assert not equal(job.weights(), straight.weights())
    job.run(start=5)
    assert job.done("batch") == [5, 6]
    assert job.done("validate") == job.done("save") == [7]
    assert equal(job.weights(), straight.weights())


def test_sigterm_ends_the_step_saves_and_stops(straight, tmp_path):
    job = Job(tmp_path)
    job.kill_at = 3
    with pytest.raises(Stopped, match=r"^stopped after step 3, saved; run the same command to go on$") as stop:
        job.run()
    assert stop.value.exit_code == 75
    assert job.events == [("batch", 0), ("batch", 1), ("batch", 2), ("save", 3)]
    resumed = Job(tmp_path)
    resumed.engine.load(tmp_path / "step-3")
    resumed.run(start=3)
    assert equal(resumed.weights(), straight.weights())


def test_sigterm_in_the_last_step_lets_the_job_finish(tmp_path):
    job = Job(tmp_path)
    job.kill_at = STEPS
    job.run()
    assert job.done("validate")[-1] == job.done("save")[-1] == STEPS


def test_sigterm_at_a_validation_saves_its_loss(tmp_path):
    job = Job(tmp_path)
    job.kill_at = 4
    with pytest.raises(Stopped):
        job.run()
    assert job.saved == {4: {"valid/loss": 4.0}}


def test_step_that_is_not_finite_stops_before_the_update_and_tells_what_was_in_the_batch(straight, tmp_path):
    job = Job(tmp_path)

    def nan_at_step_6(y_B: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, report = loss_fn(y_B, batch)
        return (loss * torch.nan, report) if torch.equal(batch["x_BD"], batch_of(5)["x_BD"]) else (loss, report)

    job.loss_fn = nan_at_step_6
    with pytest.raises(TrainingDiverged, match=r"^step 6: .* not finite .*; nothing was updated; .*: there$") as stop:
        job.run()
    assert stop.value.exit_code == 4
    ((step, count, losses),) = job.diverged
    assert (step, count) == (5, 1) and str(losses) == "[nan]"
    assert job.done("save") == [5]
    job.loss_fn = loss_fn
    resumed = Job(tmp_path)
    resumed.engine.load(tmp_path / "step-5")
    assert equal(resumed.weights(), job.weights())


def test_profiler_records_its_window_and_nothing_else(tmp_path):
    job = Job(tmp_path)
    job.profiler = StepProfiler((3, 4), tmp_path / "profile")
    job.run()
    with gzip.open(tmp_path / "profile" / "rank-00000.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum("Optimizer.step#AdamW" in name for name in names) == 2  # updates 3 and 4
    assert "aten::" in (tmp_path / "profile" / "rank-00000.txt").read_text()
    without = Job(tmp_path / "without")
    without.run()
    assert not (tmp_path / "without" / "profile").exists()


def test_profiler_that_is_cut_off_writes_what_it_has(tmp_path):
    job = Job(tmp_path)
    job.profiler = StepProfiler((6, 600), tmp_path / "profile")
    job.run()
    assert (tmp_path / "profile" / "rank-00000.json.gz").exists()


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_signal_handler_is_put_back_however_the_loop_ends(tmp_path, end, capsys):
    before = signal.getsignal(signal.SIGTERM)
    job = Job(tmp_path)
    if end == "done":
        job.run(start=6)
    elif end == "stopped":
        job.kill_at = 2
        with pytest.raises(Stopped):
            job.run()
    else:
        job._validate = lambda steps: 1 / 0  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            job.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.count("job ") == 1, "the progress line is closed"


def test_finished_run_does_nothing(tmp_path):
    job = Job(tmp_path)
    job.run(start=STEPS)
    assert job.events == []


def test_time_of_validations_and_saves_is_not_counted_as_training(tmp_path, monkeypatch):
    job, clock = Job(tmp_path), [0.0]
    monkeypatch.setattr("megascale.train.loop.time.monotonic", lambda: clock[0])
    step, validate, save = job.engine.train_step, job._validate, job._save

    def slow(seconds: float, call):
        def slowed(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return slowed

    job.engine.train_step = slow(1.0, step)  # type: ignore[method-assign]
    job._validate, job._save = slow(100.0, validate), slow(1000.0, save)  # type: ignore[method-assign]
    job.run()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["train/seconds"] for row in rows] == [3.0, 2.0, 1.0, 1.0]
    assert [row["told_seconds"] for row in rows] == [3.0, 2.0, 1.0, 1.0]


def test_loop_ends_after_the_validation_that_says_it_is_enough_and_saves_there(tmp_path):
    job = Job(tmp_path)
    job.enough_at = 4
    job.run(validate_every=2, save_every=100)
    assert [event for event in job.events if event[0] in ("validate", "save")] == [
        ("validate", 2),
        ("validate", 4),
        ("save", 4),
    ]
    assert job.done("batch") == [0, 1, 2, 3]
