"""Where metrics go besides metrics.jsonl: TensorBoard and wandb. A sink may raise in `write`; its caller goes on without it.

A training run waits for no service: wandb is spoken to by a thread of its own, and its last word has a time limit.
"""

import contextlib
import queue
import threading
import uuid
from pathlib import Path
from typing import Any, Protocol

import psutil


class Sink(Protocol):
    """A place for metrics."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of one step. Raises whatever went wrong, also with earlier ones."""

    def close(self) -> None:
        """Hand over what is left. Raises whatever went wrong."""


class TensorBoardSink:
    """Event files in a folder; steps that a resumed run repeats replace those it logged before."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer: Any = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # else what a killed run knew last is lost

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A wandb run. Restarts go on in the same one: its id is kept in the run folder. WANDB_MODE=offline works."""

    INIT_SECONDS = 60
    FINISH_SECONDS = 60.0
    MAX_WAITING = 10_000  # rows kept for a service that does not answer; a few MB

    def __init__(self, project: str, name: str, folder: Path) -> None:
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(self.MAX_WAITING)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(project, name, folder), daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._raise_failure()
        self._rows.put_nowait((step, metrics))

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(self.FINISH_SECONDS)
        if self._thread.is_alive():
            _kill_service()
            self._thread.join(5)  # what it waited for has failed now
            raise TimeoutError(f"not finished within {self.FINISH_SECONDS:g} s")
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self, project: str, name: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError as failure:
            self._failure = failure
            return
        try:
            # our own lines are enough on the terminal, and they are in the log already
            settings = wandb.Settings(init_timeout=self.INIT_SECONDS, console="off", silent=True)
            run = wandb.init(
                project=project, name=name, id=_run_id(folder), resume="allow", dir=str(folder), settings=settings
            )
            while (row := self._rows.get()) is not None:
                run.log(row[1], step=row[0])
            run.finish()
        except Exception as failure:  # a metrics service must never stop a training run
            self._failure = failure
        # else its exit handler would do it, and wait without a limit
        with contextlib.suppress(Exception):
            wandb.teardown()


def _run_id(folder: Path) -> str:
    path = folder / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _kill_service() -> None:
    """End this process's wandb service, which wandb would wait for as long as it lives."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()
