"""The training loop: batches in, updates, metrics, validation, checkpoints, a clean stop on SIGTERM.

It knows no model and no dataset: a task hands it batches and a loss function.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megascale.errors import Stopped, TrainingDiverged
from megascale.log import MetricLog, Progress
from megascale.stopping import StopSignal
from megascale.train.engine import Batch, Engine, LossFn, NonFiniteError, any_rank
from megascale.train.metrics import Sums, max_over_ranks
from megascale.train.profiling import StepProfiler


@dataclass(frozen=True)
class Hooks:
    """What a task adds to the loop. `steps` counts updates done.

    summarise: sums over all ranks since the last report, and seconds of training they took -> metrics by name.
    validate: steps -> metrics; called every `validate_every` updates and after the last.
    diverged: step (from 0), this rank's micro-batches and their losses, when a loss or gradient is not finite -> where
        it was written down; None writes nothing.
    save: steps and the newest validation metrics (empty if there are none for this step); None keeps nothing.
    note: metrics -> what the progress line says.
    enough: asked after each validation, whether to end there, and to be answered alike on every rank; None never does.
    """

    summarise: Callable[[dict[str, Tensor], float], dict[str, float]]
    validate: Callable[[int], dict[str, float]]
    save: Callable[[int, dict[str, float]], None] | None
    note: Callable[[dict[str, float]], str]
    diverged: Callable[[int, list[Batch], list[float]], str] | None = None
    enough: Callable[[], bool] | None = None


def fit(
    engine: Engine,
    batches: Iterator[list[Batch]],
    loss_fn: LossFn,
    hooks: Hooks,
    log: MetricLog,
    title: str,
    start: int,
    num_steps: int,
    log_every: int,
    validate_every: int,
    save_every: int,
    profiler: StepProfiler | None = None,
) -> None:
    """Train from update `start` to `num_steps`, or until it is enough.

    `batches` yields this rank's micro-batches, from `start` on.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; that update was not done.
        Stopped: SIGTERM or Ctrl-C came; the state was saved first, if the hooks save.
    """
    progress = Progress(title, num_steps, start, "steps")
    profiler = profiler or StepProfiler(None, Path())
    sums, since = Sums(), time.monotonic()
    waits: list[float] = []  # seconds, one a step since the last report
    with StopSignal() as stop, closing(progress), closing(profiler):
        for step in range(start, num_steps):
            done, last = step + 1, step + 1 == num_steps
            profiler.begin(done)
            asked = time.monotonic()
            micro_batches = next(batches)
            waits.append(time.monotonic() - asked)
            try:
                sums.add(engine.train_step(step, micro_batches, loss_fn))
            except NonFiniteError as failure:
                raise _diverged(hooks, step, micro_batches, failure) from None
            profiler.end(done)
            saving = hooks.save is not None and (done % save_every == 0 or last)
            if done % log_every == 0 or saving or last:  # a resumed run begins with empty sums
                taken = sums.take()  # waits for the device
                seconds = max(time.monotonic() - since, 1e-9)
                metrics = hooks.summarise(taken, seconds)
                metrics |= {
                    "train/seconds": seconds,
                    "train/data_wait_share": max_over_ranks(sum(waits) / seconds),
                    "train/data_wait_ms": max_over_ranks(1000 * sum(waits) / len(waits)),
                    "train/data_wait_max_ms": max_over_ranks(1000 * max(waits)),
                }
                since, waits = since + seconds, []
                log.write(done, metrics)
                progress.update(done, hooks.note(metrics))
            paused = time.monotonic()
            validated: dict[str, float] = {}
            if done % validate_every == 0 or last:
                validated = hooks.validate(done)
                if validated:
                    log.write(done, validated)
                last = last or (hooks.enough is not None and hooks.enough())
            stopping = any_rank(stop.asked)
            if hooks.save is not None and (saving or stopping or last):
                hooks.save(done, validated)
            since += time.monotonic() - paused  # reports tell of training alone
            if stopping and not last:
                kept = "nothing of it is kept" if hooks.save is None else "saved"
                stopped = Stopped(f"stopped after step {done}, {kept}; run the same command to go on")
                stopped.together = True
                raise stopped
            if last:
                break


def _diverged(hooks: Hooks, step: int, micro_batches: list[Batch], failure: NonFiniteError) -> TrainingDiverged:
    where = (
        ""
        if hooks.diverged is None
        else f"; what was in the batch: {hooks.diverged(step, micro_batches, failure.losses)}"
    )
    return TrainingDiverged(
        f"step {step + 1}: the loss or a gradient is not finite (losses here {failure.losses}); nothing was updated{where}"
    )
