"""Signals for a thread, and nothing left of them afterwards."""

import os
import signal
import threading

import pytest

from pipeline.runtime.signals import HEARD, SignalPipe


def test_signals_are_heard_and_handlers_put_back() -> None:
    before = {number: signal.getsignal(number) for number in HEARD}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    pipe = SignalPipe()
    with pipe.listening():
        for number in HEARD:
            os.kill(os.getpid(), number)
        assert set(pipe.wait(5.0)) == set(HEARD)
        assert pipe.wait(0.0) == []
    assert {number: signal.getsignal(number) for number in HEARD} == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    pipe.close()


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    pipe = SignalPipe()
    with pytest.raises(ValueError, match="x"), pipe.listening():
        raise ValueError("x")
    assert signal.getsignal(signal.SIGTERM) == before
    pipe.close()


def test_another_thread_wakes_it() -> None:
    pipe = SignalPipe()
    threading.Timer(0.05, pipe.wake).start()
    assert pipe.wait(10.0) == []
    pipe.close()
    pipe.wake()  # late, and of no harm
