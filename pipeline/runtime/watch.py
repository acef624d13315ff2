"""The thread by which the ranks know of each other: beats, one common ending, the wish to stop.

In: a store that all ranks reach, over a connection of its own. Out: `Watch.ending`, the same on
every rank, whoever found it. Only this thread talks to the store, because a network that is cut
blocks who does; `Watch.looks` stands still then, and the guard, which never blocks, notices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.runtime.collectives import Ranks, barrier, broadcast_object, gather_objects
from pipeline.runtime.endings import Ending, Status, resumption
from pipeline.runtime.judge import DIED, Beat, Finding, Judge
from pipeline.runtime.launcher import torchrun_holds_store
from pipeline.runtime.life import Life, Pulse
from pipeline.runtime.peers import Peer, has_died, this_process

INTERVAL_S = 1.0
RANKS_PER_SECOND = 512
"""Larger worlds look less often: each of n ranks fetches n beats."""
HURRY = 5
"""So many times as often do they look when something is wrong."""
HURRIED_PATIENCE_S = 8.0
"""Without a beat, once a broken connection or a SIGTERM says that something is wrong."""
LONGEST_TICK_S = 5.0
"""What counts of a time in which this process did not run."""
_NOTHING = "-"
_ENDING, _ASKED = "ending", "asked"


class Watch:
    """This rank's part of the watch.

    Args:
        ranks: All ranks; a collective.
        life: Of this rank.
        failure_s: Without a beat before a rank is given up.
        stall_s: Without progress before a rank is hung.
        rehearses: Nothing is kept.
        notify: Called after something was found.

    Attributes:
        ending: Of the run; None while it goes on.
        asked: The reason to stop, and the seconds that were left, that some rank told; or None.
        looks: Successful looks at the store.
        peers: By rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        life: Life,
        *,
        failure_s: float,
        stall_s: float,
        rehearses: bool,
        notify: Callable[[], None],
    ) -> None:
        self.me = this_process(ranks.rank)
        everyone = gather_objects(self.me, ranks.world)
        self.peers: list[Peer] = broadcast_object(everyone, ranks.world)
        self._life, self._rehearses, self._notify = life, rehearses, notify
        self._failure_s = failure_s
        self._pulse = Pulse(life, counts_cpu=ranks.device.type == "cpu")
        self._judge = Judge(ranks.size, stall_s)
        self._beats: list[Beat] = []
        self.ending: Ending | None = None
        self.asked: tuple[str, float | None] | None = None
        self.looks = 0
        self._interval_s = max(INTERVAL_S, ranks.size / RANKS_PER_SECOND)
        self._is_hurried, self._is_leaving, self._is_closed = False, False, False
        self._to_tell: Ending | None = None
        self._to_ask: str | None = None
        self._wake, self._found = threading.Event(), threading.Event()
        self._all_know = threading.Event()
        self._store, self._holds_store = _open_store(ranks, len(self.peers))
        self._set_beat()
        if ranks.rank == 0:
            for key in (_ENDING, _ASKED):
                self._store.set(key, _NOTHING)
        # All keys are there before anyone looks.
        barrier(ranks.world)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Something is wrong: who has gone is to be known soon."""
        self._is_hurried = True
        self._wake.set()

    def tell(self, ending: Ending, patience_s: float = 3.0) -> Ending:
        """Tells all ranks how the run ends; returns what was told first."""
        self._to_tell = ending
        return self.wait_for_ending(patience_s) or ending

    def see_off(self, patience_s: float = 3.0) -> None:
        """Returns when no rank needs this one's store to learn of the ending."""
        if self._holds_store:
            self._all_know.wait(patience_s)

    def ask(self, reason: str, seconds: float | None) -> None:
        """Tells all ranks that the run was asked to stop.

        Args:
            reason: Name of a `pipeline.runtime.stop.Reason`.
            seconds: Until the layer in hand is abandoned; None for never.
        """
        self._to_ask = reason if seconds is None else f"{reason} {seconds:.3f}"
        self._wake.set()

    def wait_for_ending(self, patience_s: float) -> Ending | None:
        """The ending, if it is known within so many seconds."""
        self._wake.set()
        self._found.wait(patience_s)
        return self.ending

    def leave(self, patience_s: float = 5.0) -> None:
        """This rank has done its part; rank 0 leaves last, for it may hold the store."""
        self._is_leaving = True
        self._wake.set()
        self._thread.join(patience_s)
        self._is_closed = True

    def lost_store(self) -> Ending:
        """The ending of a rank that cannot reach the others any more."""
        told = f"the store of all ranks cannot be reached for {self._failure_s:.0f} s"
        cause = f"{told}: its host, or the network, is lost"
        return self._ending(Finding(0, self._own_beat(), cause), is_told=False)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_closed:
            now = time.monotonic()
            elapsed_s, last = min(now - last, LONGEST_TICK_S), now
            try:
                self._look(elapsed_s)
                self.looks += 1
                if self._is_leaving and (self.me.rank != 0 or self._is_alone(self._dead())):
                    return
            except Exception:  # torch's store raises whatever its transport does
                self._look_without_store()
                if self._is_leaving:
                    return
            soon = self._is_hurried or self._is_leaving or self.ending is not None
            self._wake.wait(self._interval_s / HURRY if soon else self._interval_s)
            self._wake.clear()

    def _look(self, elapsed_s: float) -> None:
        """One round: tell, fetch, judge."""
        self._pulse.tick(elapsed_s)
        dead = self._dead()
        self._set_beat()
        if self._to_ask is not None:
            self._store.set(_ASKED, self._to_ask)
            self._to_ask = None
        if self._to_tell is not None and self.ending is None:
            self._tell(self._to_tell)
        ending, asked, *beats = self._fetch()
        if ending != _NOTHING.encode() and self.ending is None:
            self._set_ending(Ending.decode(ending))
            self._set_beat()  # which says that this rank knows
        if asked != _NOTHING.encode():
            reason, _, seconds = asked.decode().partition(" ")
            self.asked = (reason, float(seconds) if seconds else None)
            self._notify()
        self._beats = [Beat.decode(beat) for beat in beats]
        patience_s = self._failure_s
        if self._is_hurried:
            patience_s = min(patience_s, max(HURRIED_PATIENCE_S, 4 * self._interval_s))
        if self.ending is not None and self._is_alone(dead):
            self._all_know.set()
        finding = self._judge.judge(self._beats, dead, elapsed_s, patience_s)
        if finding is not None and self.ending is None:
            self._tell(self._ending(finding))

    def _look_without_store(self) -> None:
        """Whoever held it is gone: the processes of this machine may tell who."""
        if self._to_tell is not None and self.ending is None:
            self._set_ending(self._to_tell)
        for rank in self._dead():
            if self.ending is None and self._beats and not self._beats[rank].has_left:
                self._set_ending(
                    self._ending(Finding(rank, self._beats[rank], DIED), is_told=False)
                )

    def _tell(self, ending: Ending) -> None:
        first = self._store.compare_set(_ENDING, _NOTHING, ending.encode())
        self._set_ending(Ending.decode(first))

    def _set_ending(self, ending: Ending) -> None:
        if self.ending is None:
            self.ending = ending
            self._found.set()
            self._notify()

    def _set_beat(self) -> None:
        self._store.set(f"beat/{self.me.rank}", self._own_beat().encode())

    def _own_beat(self) -> Beat:
        phase, layer = self._life.at
        return Beat(
            count=self.looks + 1,
            steps=self._life.steps,
            phase=phase.value,
            layer=layer,
            next_layer=self._life.next_layer,
            still_s=self._pulse.still_s,
            has_left=self._is_leaving or self.ending is not None,
        )

    def _fetch(self) -> list[bytes]:
        keys = [_ENDING, _ASKED, *(f"beat/{peer.rank}" for peer in self.peers)]
        if self._store.has_extended_api():
            return list(self._store.multi_get(keys))
        return [self._store.get(key) for key in keys]

    def _dead(self) -> list[int]:
        return [peer.rank for peer in self.peers if peer != self.me and has_died(peer, self.me)]

    def _is_alone(self, dead: list[int]) -> bool:
        """Whether all others have left."""
        gone = {self.me.rank, *dead}
        return all(beat.has_left for rank, beat in enumerate(self._beats) if rank not in gone)

    def _ending(self, finding: Finding, *, is_told: bool = True) -> Ending:
        """What this rank says about another one.

        Args:
            finding: What is known.
            is_told: In the store; else every machine has a rank that speaks.
        """
        neighbours = [
            peer.rank
            for peer in self.peers
            if peer.machine == self.me.machine and peer.rank != finding.rank
        ]
        return Ending(
            how="failed",
            rank=finding.rank,
            host=self.peers[finding.rank].host,
            layer=finding.beat.layer,
            phase=finding.beat.phase,
            cause=finding.cause,
            status=Status.fault,
            resume=resumption("failed", finding.beat.next_layer, self._rehearses),
            by=self.me.rank if is_told else min(neighbours, default=self.me.rank),
            time=time.time(),
        )


def _open_store(ranks: Ranks, world: int) -> tuple[Any, bool]:
    """A store for this run alone, with a connection of its own; whether this process holds it."""
    if world == 1:
        return dist.HashStore(), False  # type: ignore[attr-defined]
    run = broadcast_object(f"{time.time_ns()}", ranks.world)
    default: Any = dist.distributed_c10d._get_default_store()
    store = default.clone()
    store.set_timeout(timedelta(seconds=30))
    while hasattr(default, "underlying_store"):
        default = default.underlying_store
    is_tcp = isinstance(default, dist.TCPStore)  # type: ignore[attr-defined]
    holds = ranks.rank == 0 and is_tcp and not torchrun_holds_store()
    return dist.PrefixStore(f"layersweep/{run}", store), holds  # type: ignore[attr-defined]
