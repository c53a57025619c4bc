"""Classifiers trained side by side on Ray, each a job of its own on one core or on a share of a GPU.

The job that trains one is handed in, because this folder must not import a task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from megascale.cluster import start_ray
from megascale.errors import MegascaleError

K = TypeVar("K")


@dataclass(frozen=True)
class CellJob:
    """The job that trains one classifier.

    schema: its config class. check: raises what is wrong with a config's inputs, but for clips. check_clips: (configs) ->
    raises what is wrong with their clips or splits; they differ in seed or fold alone. run: (config, quiet=True) -> result.
    """

    schema: type[Any]
    check: Callable[[Any], Any]
    check_clips: Callable[[Sequence[Any]], Any]
    run: Callable[..., dict[str, Any]]


class Pool(Generic[K]):
    """Classifiers in training; a context manager, at whose end what is unfinished is cancelled."""

    def __init__(self, job: CellJob, gpus_each: float) -> None:
        """Join or start Ray. `gpus_each`: of a GPU for each classifier; 0 trains on CPUs. Raises Stopped: SIGTERM came."""
        self._ray, self._job = start_ray(), job
        self._train = self._ray.remote(_one_thread_on_cpus).options(num_cpus=1, num_gpus=gpus_each)
        self._waiting: dict[Any, K] = {}

    def __enter__(self) -> "Pool[K]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        for unfinished in self._waiting:
            self._ray.cancel(unfinished, force=True)

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, key: K, config: Any) -> None:
        """Train a classifier as soon as there is room."""
        self._waiting[self._train.remote(self._job.run, config)] = key

    def wait(self, seconds: float) -> bool:
        """Return whether one is finished, after so many seconds at most."""
        return bool(self._waiting and self._ray.wait(list(self._waiting), timeout=seconds)[0])

    def take(self) -> dict[K, dict[str, Any]]:
        """Return the results of those that are finished, each once. Raises what ended one of them."""
        if not self._waiting:
            return {}
        done = self._ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)[0]
        try:
            return {self._waiting.pop(each): self._ray.get(each) for each in done}
        except self._ray.exceptions.RayTaskError as failure:
            if isinstance(failure.cause, MegascaleError):
                raise failure.cause from None
            raise


def _one_thread_on_cpus(finetune: Callable[..., dict[str, Any]], config: Any) -> dict[str, Any]:
    """Train a classifier in a worker of Ray's; many small ones run side by side on CPUs, each on a core."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return finetune(config, quiet=True)
