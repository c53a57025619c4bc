"""Tells a loss that jumped from one that wanders."""

import math
from collections import deque
from typing import NamedTuple


class Spike(NamedTuple):
    """A reported loss, and the mean and standard deviation of those it was held against."""

    loss: float
    mean: float
    std: float


class SpikeDetector:
    """Holds each reported loss against the last ones.

    A loss is a spike if it lies more than `stds` standard deviations above the mean of the last `WINDOW` reports, once
    there are `LEAST` of them. A spike stays out of that history, or it would hide the next one. But a level that lasts
    is no spike: after `LEAST` in a row the history begins anew. A loss that is no number is left to others.
    """

    WINDOW, LEAST = 50, 10
    # of the mean: a loss that has all but stopped moving has no spread to speak of, and roundings must not be spikes
    MIN_STD = 1e-3

    def __init__(self, stds: float) -> None:
        """`stds`: how many standard deviations above the mean are a spike."""
        self._stds = stds
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._in_a_row = 0

    def update(self, loss: float) -> Spike | None:
        """Take the newest loss; return what it was held against if it is a spike."""
        if not math.isfinite(loss):
            return None
        spike = self._spike(loss)
        if spike is None:
            self._in_a_row = 0
            self._recent.append(loss)
            return None
        self._in_a_row += 1
        if self._in_a_row == self.LEAST:
            self._in_a_row = 0
            self._recent.clear()
        return spike

    def _spike(self, loss: float) -> Spike | None:
        if len(self._recent) < self.LEAST:
            return None
        mean = sum(self._recent) / len(self._recent)
        std = math.sqrt(sum((x - mean) ** 2 for x in self._recent) / len(self._recent))
        std = max(std, self.MIN_STD * abs(mean))
        return Spike(loss, mean, std) if loss > mean + self._stds * std else None
