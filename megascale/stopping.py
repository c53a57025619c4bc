"""SIGTERM and Ctrl-C end a job with exit code 75, at a moment when everything worth keeping is kept."""

import signal
from types import FrameType
from typing import Any

import psutil

from megascale.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def note_signals() -> None:
    """Note SIGTERM and Ctrl-C until `stop_on_signal`: right while a command imports what it needs."""
    StopSignal().__enter__()


def stop_on_signal() -> None:
    """Make SIGTERM and Ctrl-C raise Stopped in the main thread: right for code that has nothing to finish first.

    Raises Stopped if one of them was noted before.
    """
    block = _current_block()
    for number in _SIGNALS:
        signal.signal(number, _raise_stopped)
    if block is not None:
        block.check()


def ignore_sigterm() -> None:
    """Let SIGTERM change nothing any more: right for a job whose end is decided."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # SIG_IGN would be handed down to processes started later


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise Stopped(f"stopped by {name}; what is finished stays, run the same command to go on")


class StopSignal:
    """Notes the signal while the block runs, so that a loop can end its step, or a library its call, before it stops.

    Ray needs this: an exception raised inside its calls comes out as another one, and `ray.init` takes SIGTERM for
    itself, so the block begins after it. A second Ctrl-C does not wait.

    The deepspeed command dies of SIGTERM at once and leaves its ranks running, so that it is gone counts as the signal.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._spawner = _deepspeed_spawner()
        self._command_pid = self._spawner.ppid() if self._spawner else 0

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._noted is not None or self._command_is_gone()

    def __enter__(self) -> "StopSignal":
        self._before = [signal.signal(number, self._note) for number in _SIGNALS]
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._noted = number

    def __exit__(self, *exception: Any) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Stopped if the signal came."""
        if self.asked:
            _raise_stopped(self._noted or signal.SIGTERM, None)

    def _command_is_gone(self) -> bool:
        try:
            return self._spawner is not None and self._spawner.ppid() != self._command_pid
        except psutil.Error:
            return True


def stop_asked() -> bool:
    """Return whether the StopSignal block that this process is in, if any, was asked to stop; from any thread."""
    block = _current_block()
    return block is not None and block.asked


def _current_block() -> StopSignal | None:
    block = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)  # whose method takes the signal
    return block if isinstance(block, StopSignal) else None


def _deepspeed_spawner() -> psutil.Process | None:
    """Return the process that the deepspeed command starts ranks with, if it started this one."""
    try:
        parent = psutil.Process().parent()
        found = parent is not None and "deepspeed.launcher.launch" in parent.cmdline()
    except psutil.Error:
        return None
    return parent if found else None
