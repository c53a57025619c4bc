"""What a job tells its user: lines from rank 0 alone, progress with time left, metrics as JSON lines and in sinks."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.sinks import Sink, TensorBoardSink, WandbSink


def rank() -> int:
    """Return this process's rank as the launcher set it; 0 when there is none."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks the launcher started; 1 when there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's rank on its machine; 0 when there is no launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of ranks that the launcher (torchrun, DeepSpeed) started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def say(message: str) -> None:
    """Print one line for the user, from rank 0 only."""
    if rank() == 0:
        over = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there; it is drawn again
        print(over + message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format a time span: `47s`, `3m05s`, `2h10m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


class Progress:
    """One tidy line with the share done, elapsed time and time left.

    On a terminal the line is rewritten in place; in a log file a new line comes every few seconds, so that logs of long
    jobs stay short. An empty title shows nothing.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "") -> None:
        self.title, self.total, self.unit = title, total, unit
        self._first, self._done = done, done
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._every_seconds = 0.2 if self._terminal else 5.0
        self._next = self._start if self._terminal else self._start + self._every_seconds
        self._width = 0
        self._note = ""

    def update(self, done: int, note: str = "") -> None:
        """Say how many units are done in all, and what else belongs on the line."""
        self._done, self._note = done, note
        now = time.monotonic()
        if self.title and rank() == 0 and now >= self._next:
            self._next = now + self._every_seconds
            self._write(self._line(note, now))

    def close(self, note: str = "") -> None:
        """Write the last state, whatever was shown before; without a note with the newest one."""
        if self.title and rank() == 0:
            self._write(self._line(note or self._note, time.monotonic()))
            if self._terminal:
                print(file=sys.stderr, flush=True)

    def _line(self, note: str, now: float) -> str:
        elapsed = now - self._start
        fresh = self._done - self._first
        left = elapsed / fresh * (self.total - self._done) if fresh else math.inf
        ends = f"{duration(elapsed)} taken" if self._done >= self.total else f"{duration(left)} left"
        share = 100 * self._done / max(1, self.total)
        count = f"{self._done}/{self.total}{' ' + self.unit if self.unit else ''}"
        return f"{self.title}  {share:3.0f}%  {count}  {ends}{'  ' + note if note else ''}"

    def _write(self, line: str) -> None:
        if self._terminal:
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)


class MetricLog:
    """Metrics of a run, one JSON object a line in `metrics.jsonl`, and in TensorBoard and wandb where asked.

    Only rank 0 writes. A resumed run drops the lines of steps it is about to repeat, so every step stands in the file
    once. The file is what counts: a sink that fails is said once and left out from then on.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        name: str = "",
    ) -> None:
        self._file = None
        self._sinks: dict[str, Sink] = {}
        if rank() != 0:
            return
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= resume_step]
        part = path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(path)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._open("TensorBoard", lambda: TensorBoardSink(folder / "tensorboard", resume_step))
        if wandb_project is not None:
            self._open("wandb", lambda: WandbSink(wandb_project, name, folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of one step; keys read like `train/loss`, `valid/acc_q0`."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name in list(self._sinks):
            self._try(name, lambda sink: sink.write(step, metrics))

    def close(self) -> None:
        """Close the file, and hand over what sinks still hold."""
        if self._file is not None:
            self._file.close()
        for name in list(self._sinks):
            self._try(name, lambda sink: sink.close())

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks[name] = make()
        except Exception as failure:  # a metrics service must never stop a training run
            say(f"{name} is not available ({_one_line(failure)}); metrics.jsonl goes on without it")

    def _try(self, name: str, call: Callable[[Sink], None]) -> None:
        try:
            call(self._sinks[name])
        except Exception as failure:  # a metrics service must never stop a training run
            del self._sinks[name]
            say(f"{name} stopped taking metrics ({_one_line(failure)}); metrics.jsonl goes on without it")


def _one_line(failure: Exception) -> str:
    return " ".join(f"{type(failure).__name__}: {failure}".split())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` up to the first line that is none of ours: a crash may have cut the last one short."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
    return rows
