"""SIGTERM ends a job with exit code 75, at a moment when everything worth keeping is kept."""

import signal
from types import FrameType
from typing import Any

from megascale.errors import Stopped


def stop_on_sigterm() -> None:
    """Make SIGTERM raise Stopped in the main thread: right for code that has nothing to finish first."""
    signal.signal(signal.SIGTERM, _raise_stopped)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped by SIGTERM; what is finished stays, run the same command to go on")


class StopSignal:
    """Notes SIGTERM while the block runs, so that a loop can end its step, or a library its call, before it stops.

    Ray needs this: an exception raised inside its calls comes out as another one, and `ray.init` takes the signal for
    itself, so the block begins after it.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def check(self) -> None:
        """Raise Stopped if the signal came."""
        if self.asked:
            _raise_stopped(signal.SIGTERM, None)
