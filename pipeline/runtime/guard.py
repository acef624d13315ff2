"""What ends a run that cannot end itself: one ending for all ranks, whatever its threads wait for.

In: signals, what the ranks' watch finds, what the main thread raises. Out: a run that stops after
the layer in hand; or else a process that leaves, from a thread that never waits for a disk or a
network, with the same line and status as its peers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pipeline.runtime import launcher
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.endings import (
    UNEXPECTED,
    Ending,
    Status,
    abandonment,
    ending_of,
    is_lost_connection,
)
from pipeline.runtime.life import Life
from pipeline.runtime.signals import SignalPipe
from pipeline.runtime.signs import Signs, write_failure
from pipeline.runtime.stop import Reason, Stop
from pipeline.runtime.watch import LONGEST_TICK_S, Watch

TICK_S = 0.5
GRACE_S = 1.0
"""For the rank that failed, and for this one's main thread, to speak first."""
LAST_WORDS_S = 10.0
"""For the main thread to leave once the ending is told: what it then waits for may hang."""
VICTIM_S = 12.0
"""For a rank that lost its connection to learn who has gone."""
LOOK_FOR_DEAD_S = 1.5
"""After a SIGTERM, before it is believed: torchrun sends one to all when a rank has died."""
SAME_SIGNAL_S = 3.0
"""Slurm and torchrun both hand a SIGTERM on: what follows within this time is the same one."""
INTERRUPT_S = 5.0
DISK_S = 3.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long is waited.

    Attributes:
        failure_s: Without a sign of life of a rank.
        stall_s: Without progress of a rank.
        stop_s: After SIGTERM, before the layer in hand is abandoned.
    """

    failure_s: float = 60.0
    stall_s: float = 900.0
    stop_s: float = 25.0


class Guard:
    """Guards one run on one rank; a context manager.

    Args:
        rank: This rank.
        limits: How long is waited.
        owns_process: Whether it may end a process in which there is but one rank.
        rehearses: Nothing is kept.

    Attributes:
        life: Where this rank is; the run tells it.
        stop: Whether to end after the layer in hand.
        ending: How the run ends; None while it goes on, and before the ranks are connected.
    """

    def __init__(
        self,
        rank: int = 0,
        limits: Limits | None = None,
        *,
        owns_process: bool = False,
        rehearses: bool = False,
    ) -> None:
        self.life, self.stop = Life(), Stop()
        self.ending: Ending | None = None
        self._rank, self._limits, self._rehearses = rank, limits or Limits(), rehearses
        self._may_exit = self._owns_process = owns_process
        self._watch: Watch | None = None
        self._signs: Signs | None = None
        self._state: Path | None = None
        self._attempt = 0
        self._record: Callable[[str, str], None] | None = None
        self._pipe = SignalPipe()
        self._heard: dict[int, float] = {}
        self._torchrun = launcher.torchrun_pid() if owns_process else None
        self._asked: tuple[str, float | None] | None = None
        self._deadline, self._told_at, self._found_at = math.inf, 0.0, 0.0
        self._looks, self._unheard_s = 0, 0.0
        self._lock, self._is_leaving, self._is_over = threading.Lock(), False, False
        self._error: BaseException | None = None
        self._is_mine = False
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def __enter__(self) -> Guard:
        """Starts to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the process alone."""
        self._is_over = True
        self._pipe.wake()
        self._thread.join()
        self.quiet()
        if self._watch is not None:
            self._watch.leave(0.0 if self.ending is not None else 5.0)
        self._pipe.close()

    def listening(self) -> AbstractContextManager[None]:
        """Hears SIGTERM and SIGUSR1; in the main thread, for a process of its own."""
        return self._pipe.listening()

    def connect(self, ranks: Ranks) -> None:
        """The ranks begin to look after each other; a collective."""
        self.stop.group = ranks.world
        self._may_exit = self._owns_process or ranks.size > 1
        self._watch = Watch(
            ranks,
            self.life,
            failure_s=self._limits.failure_s,
            stall_s=self._limits.stall_s if self._may_exit else math.inf,
            rehearses=self._rehearses,
            notify=self._pipe.wake,
        )

    @property
    def hosts(self) -> list[str]:
        """Of the ranks, each once, in their order."""
        assert self._watch is not None
        return list(dict.fromkeys(peer.host for peer in self._watch.peers))

    def settle(
        self, state: Path, stop_file: Path, attempt: int, record: Callable[[str, str], None]
    ) -> None:
        """The work directory is this run's: signs of life go there.

        Args:
            state: Their directory.
            stop_file: Whoever makes it asks the run to stop.
            attempt: Number of this attempt.
            record: Takes how it ended, and why; rank 0's is called.
        """
        assert self._watch is not None
        self._state, self._attempt, self._record = state, attempt, record
        self._signs = Signs(
            state,
            self._watch.me,
            len(self._watch.peers),
            attempt,
            self.life,
            stop_file=stop_file if self._rank == 0 else None,
            found_stop=lambda: self._ask(Reason.file, None),
        )

    def quiet(self) -> None:
        """Writes no signs of life any more: their directory may disappear."""
        if self._signs is not None:
            self._signs.close()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other ranks at once of what is raised inside."""
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise

    def end(self, error: BaseException) -> Ending | None:
        """The main thread raised something: one ending for all ranks; None before they connect."""
        if self._watch is None or self.ending is not None:
            return self.ending
        with self._lock:
            is_leaving, self._is_leaving = self._is_leaving, True
        if is_leaving:
            threading.Event().wait()  # for the end of the process, which is near
        self._error = error
        own = ending_of(error, self._rank, self._watch.me.host, self.life, self._rehearses)
        if is_lost_connection(error):
            self._watch.hurry()
            self._watch.wait_for_ending(min(VICTIM_S, self._limits.failure_s + TICK_S))
        told = self._watch.tell(own)
        self._is_mine = told == own
        self._conclude(told)
        self._told_at = time.monotonic()
        self.ending = told
        return told

    def say(self) -> int:
        """Says how the run ended, where this rank is one that speaks.

        Returns:
            The exit status; the process may be left at once.
        """
        ending = self.ending
        assert ending is not None
        speakers = {0, ending.rank, ending.by} if ending.is_failure else {0}
        if self._rank in speakers:
            if self._is_mine and self._error is not None and ending.cause.startswith(UNEXPECTED):
                traceback.print_exception(self._error)
            sys.stderr.write(ending.line + "\n")
        sys.stdout.flush()
        sys.stderr.flush()
        if self._watch is not None:
            self._watch.see_off()
        return ending.status

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_over:
            for number in self._pipe.wait(TICK_S):
                self._hear(number)
            now = time.monotonic()
            # A process that was suspended must not take that time for the silence of the others.
            self._tick(now, min(now - last, LONGEST_TICK_S))
            last = now

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        first = self._heard.setdefault(number, now)
        if self._watch is None:
            if number != signal.SIGINT:
                self._leave_early(signal.Signals(number).name, Status.stopped)
        elif number == signal.SIGUSR1:
            self._ask(Reason.sigusr1, None)
        elif number == signal.SIGTERM:
            self._watch.hurry()
            if now - first > SAME_SIGNAL_S:
                self._abandon("a second SIGTERM")

    def _tick(self, now: float, elapsed_s: float) -> None:
        if now - self._heard.get(signal.SIGINT, now) > INTERRUPT_S and self._watch is None:
            self._leave_early("interrupted", Status.interrupted)
        watch = self._watch
        if watch is None:
            return
        if self._is_leaving:
            if self._told_at and now - self._told_at > LAST_WORDS_S and self._may_exit:
                os._exit(self.say())
            return
        if watch.ending is not None:
            self._found_at = self._found_at or now
            if now - self._found_at > GRACE_S:
                self._leave(watch.ending)
            return
        self._unheard_s = 0.0 if watch.looks != self._looks else self._unheard_s + elapsed_s
        self._looks = watch.looks
        if self._unheard_s > self._limits.failure_s:
            self._leave(watch.lost_store())
        self._think_of_stopping(now, watch)

    def _think_of_stopping(self, now: float, watch: Watch) -> None:
        """Passes on what was asked; abandons the layer in hand when the time is over."""
        sigterm = self._heard.get(signal.SIGTERM, now)
        if now - sigterm > LOOK_FOR_DEAD_S and self.stop.reason is not Reason.sigterm:
            self._ask(Reason.sigterm, self._limits.stop_s - (now - sigterm))
        if self._torchrun is not None and os.getppid() != self._torchrun:
            self._torchrun = None
            self._ask(Reason.launcher, self._limits.stop_s)
        if watch.asked is not None and watch.asked != self._asked:
            self._asked = watch.asked
            reason, seconds = watch.asked
            self._hasten(Reason[reason], seconds)
        if now > self._deadline:
            self._abandon(f"{self.stop.reason.value} {self._limits.stop_s:g} s ago")
        if now - self._heard.get(signal.SIGINT, now) > INTERRUPT_S:
            self._abandon("interrupted", Status.interrupted)

    def _ask(self, reason: Reason, seconds: float | None) -> None:
        """Asks all ranks to stop after the layer in hand, within so many seconds."""
        assert self._watch is not None
        self._watch.ask(reason.name, seconds)
        self._hasten(reason, seconds)

    def _hasten(self, reason: Reason, seconds: float | None) -> None:
        self.stop.ask(reason)
        if seconds is not None:
            assert self._watch is not None
            self._watch.hurry()
            self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _abandon(self, why: str, status: Status = Status.stopped) -> None:
        """Leaves in the middle of a layer."""
        assert self._watch is not None
        host, life = self._watch.me.host, self.life
        rehearses = self._rehearses
        self._leave(abandonment(why, self._rank, host, life, status=status, rehearses=rehearses))

    def _leave(self, ending: Ending) -> None:
        """Ends the process, whatever the main thread does."""
        if not self._may_exit:
            return
        with self._lock:
            if self._is_leaving:
                return
            self._is_leaving = True
        assert self._watch is not None
        told = self._watch.tell(ending)
        self._conclude(told)
        self.ending = told
        os._exit(self.say())

    def _leave_early(self, why: str, status: Status) -> None:
        """Ends a process that has connected to nobody.

        Rank 0 speaks for all, and its status counts: Slurm takes the highest, and the signal may
        have been sent because rank 0 was refused.
        """
        if self._rank != 0 or launcher.has_another_told():
            os._exit(Status.refused)
        sys.stderr.write(f"layersweep: stopped before the first layer ({why})\n")
        sys.stderr.flush()
        os._exit(status)

    def _conclude(self, ending: Ending) -> None:
        """Writes down how the run ended; a disk that hangs is left behind."""

        def write() -> None:
            if self._state is not None and ending.is_failure and self._rank in (0, ending.by):
                write_failure(self._state, ending.failure(self._attempt))
            if self._record is not None and self._rank == 0:
                with suppress(OSError):
                    self._record(ending.how, ending.why)
            launcher.tell_torchrun(ending.line, ending.time)

        thread = threading.Thread(target=write, name="last words", daemon=True)
        thread.start()
        thread.join(DISK_S)
