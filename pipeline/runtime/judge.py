"""Which rank has died or hangs, judged by what all ranks tell of themselves.

In: every rank's last beat, again and again. Out: a `Finding` about the one that all others wait
for. Clocks of different hosts are never compared: a rank tells for how long it has stood still, and
the time without a new beat is measured by the one who waits for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Self

from pipeline.runtime.life import Phase

_HANGS = {
    Phase.forward: "a device, or the network between the ranks, may hang",
    Phase.evaluate: "a device, or the network between the ranks, may hang",
}


@dataclasses.dataclass(frozen=True)
class Beat:
    """A rank's sign of life.

    Attributes:
        count: Grows with every beat.
        steps: Of its `Life`.
        phase: What it is doing.
        layer: In which layer.
        next_layer: The first one that is not committed; -1 if all are, None before that is known.
        still_s: For how long nothing has moved.
        has_left: It has done its part, and will not be heard of again.
    """

    count: int
    steps: int
    phase: str
    layer: int | None
    next_layer: int | None
    still_s: float
    has_left: bool = False

    def encode(self) -> str:
        """As text."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """From text."""
        return cls(*json.loads(text))


@dataclasses.dataclass(frozen=True)
class Finding:
    """A rank that will not come back, and why."""

    rank: int
    beat: Beat
    cause: str


class Judge:
    """Looks at all beats.

    Args:
        world: Number of ranks.
        stall_s: Without a change before a rank is hung.
    """

    def __init__(self, world: int, stall_s: float) -> None:
        self._stall_s = stall_s
        self._counts = [-1] * world
        self._silent_s = [0.0] * world

    def judge(
        self, beats: Sequence[Beat], dead: Sequence[int], elapsed_s: float, patience_s: float
    ) -> Finding | None:
        """What is wrong with whom, if anything.

        Args:
            beats: By rank.
            dead: Ranks whose processes are gone; looked up before the beats were fetched, so that
                one that has left says so.
            elapsed_s: Since the last call.
            patience_s: Without a beat before a rank is given up.
        """
        for rank, beat in enumerate(beats):
            is_new = beat.count != self._counts[rank]
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + elapsed_s
            self._counts[rank] = beat.count
        here = [rank for rank, beat in enumerate(beats) if not beat.has_left]
        for rank in here:
            if rank in dead:
                return Finding(rank, beats[rank], DIED)
        if not here:
            return None
        silent = max(here, key=lambda rank: self._silent_s[rank])
        if self._silent_s[silent] > patience_s:
            return Finding(
                silent,
                beats[silent],
                f"no sign of life for {self._silent_s[silent]:.0f} s "
                "(killed, or its host or the network is lost)",
            )
        return self._hung(here, beats)

    def _hung(self, here: Sequence[int], beats: Sequence[Beat]) -> Finding | None:
        """All ranks make the same steps: the one with the fewest keeps the others waiting."""
        fewest = min(beats[rank].steps for rank in here)
        last = [rank for rank in here if beats[rank].steps == fewest]
        at_work = [rank for rank in last if beats[rank].phase != Phase.wait]
        if not at_work or any(beats[rank].still_s <= self._stall_s for rank in last):
            return None
        rank = max(at_work, key=lambda rank: beats[rank].still_s)
        why = _HANGS.get(Phase(beats[rank].phase), "the file system may hang")
        return Finding(rank, beats[rank], f"no progress for {_minutes(self._stall_s)}: {why}")


DIED = "died without a word (killed, e.g. by the kernel for memory; see dmesg)"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
