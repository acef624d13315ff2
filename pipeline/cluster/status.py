"""What state a run is in, from its files alone.

In: `RunFiles`, and what time it is. Out: a `RunStatus`: one of seven states, where the run is, and
what there is to do. Nothing is asked of a process: the reader may sit on another machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.cluster.run_files import Attempt, Failure, RunFiles, Sign

SILENT_S = 60.0
"""After so long without a sign of any rank a run counts as dead (they write every 5 s; a network
file system may show it late)."""
LATE_S = 20.0
"""A rank that was not heard of for so long is named."""


class State(Enum):
    """What has become of a run."""

    finished = "finished"
    rejected = "rejected"
    running = "running"
    stopped = "stopped"
    refused = "refused"
    dead = "dead"
    absent = "absent"


EXIT_STATUSES = {
    State.finished: 0,
    State.rejected: 1,
    State.absent: 2,
    State.refused: 2,
    State.running: 3,
    State.dead: 4,
    State.stopped: 75,
}
_PUBLISHING = ("finished", "rejected")  # said just before the directory gets its name
_ENDS = {"stopped": State.stopped, "refused": State.refused}


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run.

    Attributes:
        files: What it was concluded from.
        state: The conclusion.
        why: In words, where the state does not say it.
        signs: Of the current, or last, attempt.
        slowest: The rank that the others wait for; None where there is none.
        last_sign_s: Seconds since any rank was heard of.
        now: Unix time of the conclusion.
    """

    files: RunFiles
    state: State
    why: str
    signs: tuple[Sign, ...]
    slowest: Sign | None
    last_sign_s: float | None
    now: float

    @property
    def exit_status(self) -> int:
        """Of `launch.status`."""
        return EXIT_STATUSES[self.state]

    @property
    def attempt(self) -> Attempt | None:
        """The current, or last, one."""
        return self.files.attempts[-1] if self.files.attempts else None

    @property
    def failure(self) -> Failure | None:
        """The first failure of the last attempt, where the run did not get over it."""
        is_over_it = self.state in (State.finished, State.rejected, State.absent)
        return None if is_over_it else self.files.failure

    @property
    def speaker(self) -> Sign | None:
        """The rank that speaks for all: 0, or the lowest that was heard of."""
        return self.signs[0] if self.signs else None

    @property
    def late(self) -> list[Sign]:
        """Ranks of a running attempt that were not heard of for long."""
        if self.state is not State.running:
            return []
        return [sign for sign in self.signs if self.now - sign.updated > LATE_S]


def judge(files: RunFiles, now: float, *, started_at: float | None = None) -> RunStatus:
    """Concludes from a run's files what has become of it.

    Args:
        files: The files.
        now: Unix time.
        started_at: When the last start was made, if its processes are known to be gone.
    """
    last = files.attempts[-1].number if files.attempts else None
    signs = tuple(sign for sign in files.signs if last is None or sign.attempt in (last, None))
    heard = max((sign.updated for sign in signs), default=None)
    last_sign_s = None if heard is None else max(0.0, now - heard)
    state, why = _conclude(files, last_sign_s, now, started_at)
    return RunStatus(
        files=files,
        state=state,
        why=why,
        signs=signs,
        slowest=_slowest(signs) if state is State.running else None,
        last_sign_s=last_sign_s,
        now=now,
    )


def _conclude(
    files: RunFiles, last_sign_s: float | None, now: float, started_at: float | None
) -> tuple[State, str]:
    attempt = files.attempts[-1] if files.attempts else None
    if files.report is not None:
        is_rejected = files.is_rejected or (attempt is not None and attempt.how == "rejected")
        return (State.rejected if is_rejected else State.finished), ""
    began = None if attempt is None else attempt.began
    if started_at is not None and (began is None or began < started_at):
        return State.refused, "it ended before it began to work; its own message says why"
    if not files.has_work:
        return State.absent, f"neither {files.output} nor {files.work} is the work of a run"
    if attempt is not None and attempt.how and attempt.how not in _PUBLISHING:
        return _ENDS.get(attempt.how, State.dead), attempt.why
    if started_at is not None:
        return State.dead, "its processes ended without a word"
    began_s = None if began is None else now - began
    quiet_s = min((s for s in (last_sign_s, began_s) if s is not None), default=None)
    if quiet_s is None:
        return State.dead, "no attempt is recorded"
    if quiet_s > SILENT_S:
        return State.dead, "its ranks are no longer heard of"
    return State.running, ""


def _slowest(signs: Sequence[Sign]) -> Sign | None:
    """The rank with the least done; among equals the one in the same phase for longest."""
    if len(signs) < 2:
        return None
    return min(signs, key=lambda sign: (sign.done or 0, sign.since, sign.rank))


def to_values(status: RunStatus) -> dict[str, Any]:
    """The status as plain values, for scripts."""
    files, speaker = status.files, status.speaker
    return {
        "state": status.state.value,
        "exit_status": status.exit_status,
        "why": status.why,
        "output": str(files.output),
        "work": str(files.work),
        "attempt": None if status.attempt is None else status.attempt.number,
        **_of_sign(speaker, ("phase", "layer", "layers", "done")),
        **_of_sign(speaker, ("tokens_per_s", "left_s", "peak_gib")),
        "committed": files.committed,
        "last_sign_s": status.last_sign_s,
        "slowest": None if status.slowest is None else dataclasses.asdict(status.slowest),
        "late": [sign.rank for sign in status.late],
        "is_asked_to_stop": files.is_asked_to_stop,
        "failure": None if status.failure is None else dataclasses.asdict(status.failure),
        "ranks": [dataclasses.asdict(sign) for sign in status.signs],
        "attempts": [dataclasses.asdict(attempt) for attempt in files.attempts],
    }


def _of_sign(sign: Sign | None, names: Sequence[str]) -> Mapping[str, Any]:
    return {name: None if sign is None else getattr(sign, name) for name in names}
