"""Stopping: a signal is noted, and acted on when the code is ready for it."""

import os
import signal

import pytest

from megascale.errors import Stopped
from megascale.stopping import StopSignal, note_signals, stop_asked, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_inside_the_block_and_raised_when_checked(number):
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(Stopped, match=f"stopped by {number.name}; .* run the same command to go on"):
            stop.check()


def test_second_ctrl_c_does_not_wait():
    with StopSignal(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_those_of_before_after_the_block():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal():
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_whether_the_block_was_asked_to_stop_is_known_elsewhere_too():
    assert not stop_asked()
    with StopSignal():
        assert not stop_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_asked()
    assert not stop_asked()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_is_noted_while_a_command_loads_is_raised_when_it_begins(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        note_signals()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            stop_on_signal()
        stop_on_signal()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
