"""The training loop: batches in, updates, metrics, validation, checkpoints, a clean stop on SIGTERM.

It knows no model and no dataset: a task hands it batches and a loss function.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from megascale.errors import Stopped
from megascale.log import MetricLog, Progress
from megascale.stopping import StopSignal
from megascale.train.engine import Batch, Engine, LossFn, any_rank
from megascale.train.metrics import Sums


@dataclass(frozen=True)
class Hooks:
    """What a task adds to the loop. `steps` counts updates done.

    summarise: sums over all ranks since the last report, and seconds of training they took -> metrics by name.
    validate: steps -> metrics; called every `validate_every` updates and after the last.
    save: steps and the newest validation metrics (empty if there are none for this step); None keeps nothing.
    note: metrics -> what the progress line says.
    """

    summarise: Callable[[dict[str, Tensor], float], dict[str, float]]
    validate: Callable[[int], dict[str, float]]
    save: Callable[[int, dict[str, float]], None] | None
    note: Callable[[dict[str, float]], str]


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
) -> None:
    """Train from update `start` to `num_steps`. `batches` yields this rank's micro-batches, from `start` on.

    Raises:
        Stopped: SIGTERM or Ctrl-C came; the state was saved first, if the hooks save.
    """
    progress = Progress(title, num_steps, start, "steps")
    sums, since, waited = Sums(), time.monotonic(), 0.0
    with StopSignal() as stop, closing(progress):
        for step in range(start, num_steps):
            asked = time.monotonic()
            micro_batches = next(batches)
            waited += time.monotonic() - asked
            sums.add(engine.train_step(step, micro_batches, loss_fn))
            done, last = step + 1, step + 1 == num_steps
            if done % log_every == 0 or last:
                taken = sums.take()  # waits for the device
                now = time.monotonic()
                metrics = hooks.summarise(taken, now - since)
                metrics |= {"train/seconds": now - since, "train/data_wait_share": waited / max(now - since, 1e-9)}
                since, waited = now, 0.0
                log.write(done, metrics)
                progress.update(done, hooks.note(metrics))
            paused = time.monotonic()
            validated: dict[str, float] = {}
            if done % validate_every == 0 or last:
                validated = hooks.validate(done)
                log.write(done, validated)
            stopping = any_rank(stop.asked)
            if hooks.save is not None and (done % save_every == 0 or last or stopping):
                hooks.save(done, validated)
            since += time.monotonic() - paused  # reports tell of training alone
            if stopping and not last:
                kept = "nothing of it is kept" if hooks.save is None else "saved"
                raise Stopped(f"stopped after step {done}, {kept}; run the same command to go on")
