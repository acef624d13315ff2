"""Signals for a thread: heard even while the main thread waits in C, for a collective or a disk.

In: SIGTERM, SIGUSR1, SIGINT, and other threads that want this one to look. Out: the numbers of the
signals, where somebody waits for them.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HEARD = (signal.SIGTERM, signal.SIGUSR1)
_WAKE = b"\0"  # no signal has this number


class SignalPipe:
    """Where signals arrive."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        for end in (self._out, self._in):
            os.set_blocking(end, False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals, in the main thread, and puts everything back afterwards.

        SIGINT keeps its handler: the main thread raises KeyboardInterrupt as soon as it can.
        """
        handlers = {number: signal.signal(number, _do_nothing) for number in HEARD}
        before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def wake(self) -> None:
        """Ends the wait, from any thread."""
        with suppress(OSError):  # full: it wakes anyway; closed: nobody waits any more
            os.write(self._in, _WAKE)

    def wait(self, seconds: float) -> list[int]:
        """The signals that arrive first, or none after so many seconds."""
        ready, _, _ = select.select([self._out], [], [], seconds)
        return [number for number in os.read(self._out, 4096) if number] if ready else []

    def close(self) -> None:
        """Nobody waits any more."""
        os.close(self._out)
        os.close(self._in)


def _do_nothing(_number: int, _frame: object) -> None:
    """The pipe has it."""
