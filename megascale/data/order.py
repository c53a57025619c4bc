"""Which clip comes when: a pure function of (seed, step), so the loader's whole state is one integer.

Each epoch permutes the shards, turns the sequence by a random offset, cuts it into `streams` equal ranges, and shuffles
inside windows of each range. Global batch i takes the next clips of every stream, and a rank serves its share of the
streams. So world size and worker count don't change which clips a global batch holds, and resuming seeks.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megascale import seeding
from megascale.errors import ConfigError, DataError


@dataclass(frozen=True)
class Order:
    """The order of a corpus whose shards hold `shard_sizes` clips; clips are numbered through the shards from 0."""

    shard_sizes: tuple[int, ...]
    seed: int
    streams: int
    global_batch: int
    window: int = 1024

    def __post_init__(self) -> None:
        if self.global_batch % self.streams:
            raise ConfigError(f"data.streams={self.streams}: must divide train.global_batch={self.global_batch}")
        if self.batches_per_epoch < 1:
            raise DataError(
                f"train.global_batch={self.global_batch}: the corpus has only {self.num_clips} clips to train on"
            )

    @property
    def num_clips(self) -> int:
        return sum(self.shard_sizes)

    @property
    def batches_per_epoch(self) -> int:
        return (self.num_clips // self.streams) // (self.global_batch // self.streams)

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a global batch and its clips, int64 (global_batch,), stream after stream: rank r of R
        serves the r-th of R equal parts. No clip comes twice in an epoch."""
        epoch, position = divmod(step, self.batches_per_epoch)
        each, length = self.global_batch // self.streams, self.num_clips // self.streams
        places = self._shuffled(epoch, position * each + np.arange(each), length)
        return epoch, self._clip_at(epoch, (places + length * np.arange(self.streams)[:, None]).reshape(-1))

    def _shuffled(self, epoch: int, places: np.ndarray, length: int) -> np.ndarray:
        """Return what comes at these places (int64) of every stream, (streams, places)."""
        windows, inside = np.divmod(places, self.window)
        out = np.empty((self.streams, len(places)), dtype=np.int64)
        for w in np.unique(windows).tolist():
            size = min(self.window, length - w * self.window)
            here = windows == w
            for stream in range(self.streams):
                out[stream, here] = w * self.window + _permutation(self.seed, epoch, stream, w, size)[inside[here]]
        return out

    def _clip_at(self, epoch: int, sequence: np.ndarray) -> np.ndarray:
        shards = _permutation(self.seed, epoch, -1, -1, len(self.shard_sizes))
        sizes = np.asarray(self.shard_sizes)
        # turned, so that the rest that no full batch takes is another one each epoch
        offset = int(seeding.generator(self.seed, "order offset", epoch).integers(self.num_clips))
        sequence = (sequence + offset) % self.num_clips
        ends = np.cumsum(sizes[shards])
        place = np.searchsorted(ends, sequence, side="right")
        starts = np.cumsum(sizes) - sizes
        return starts[shards[place]] + sequence - (ends[place] - sizes[shards[place]])


@lru_cache(maxsize=4096)
def _permutation(seed: int, epoch: int, stream: int, window: int, size: int) -> np.ndarray:
    return seeding.generator(seed, "order", epoch, stream, window).permutation(size)


def default_streams(global_batch: int) -> int:
    """Return the largest divisor of the global batch up to 64: enough to mix shards, few enough to keep open."""
    return next(n for n in range(min(64, global_batch), 0, -1) if global_batch % n == 0)
