"""A window of steps under torch.profiler: a trace for a viewer (Perfetto, chrome://tracing) and a table of the costliest."""

from pathlib import Path

import torch.distributed
from torch.profiler import ProfilerActivity, profile

from megascale.log import say

_ROWS = 40


class StepProfiler:
    """Records the updates first..last, counted from 1, of every rank."""

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        """`window` is first and last update, None records nothing; `folder` gets `rank-00000.json.gz` and `.txt`."""
        self._window, self._folder = window, folder
        self._running: profile | None = None

    def begin(self, update: int) -> None:
        """Call before an update; `update` counts from 1."""
        if self._window is not None and self._running is None and self._window[0] <= update <= self._window[1]:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._running.start()

    def end(self, update: int) -> None:
        """Call after an update."""
        if self._running is not None and self._window is not None and update >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{torch.distributed.get_rank():05d}"
        running.export_chrome_trace(f"{path}.json.gz")
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        path.with_suffix(".txt").write_text(running.key_averages().table(sort_by=order, row_limit=_ROWS))
        say(f"profile: {path}.json.gz, {path}.txt")
