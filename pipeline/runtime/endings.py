"""How a run ends: one record for all ranks, one line for the user.

In: what a rank raised, or what was found out about one that cannot speak. Out: an `Ending`, which
the ranks hand to each other, its line, and the exit status.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import time
from enum import IntEnum
from typing import Any, Self

import torch

from pipeline.errors import AuditError, LayersweepError, StoppedError
from pipeline.runtime.life import Life

UNEXPECTED = "unexpected fault"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LOST_CONNECTION = (
    "Connection closed",
    "Connection reset",
    "Connection was likely closed",
    "gloo",
    "NCCL",
    "Broken pipe",
)
_OUT_OF_MEMORY = (
    "a smaller calibration.micro_batch, hidden_store=host, evaluation.group_sequences=0 or more "
    "ranks need less of it, and so does leaving the GPU to this run alone"
)


class Status(IntEnum):
    """Exit statuses."""

    done = 0
    audit_failed = 1
    refused = 2
    fault = 3
    stopped = 75
    interrupted = 130


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of an attempt, as one rank found it.

    Attributes:
        how: stopped, failed or refused (by something that a user can mend).
        rank: Whose end it is.
        host: Of that rank.
        layer: Where that rank was; of a stop, the last layer that was done.
        phase: What it was doing.
        cause: Why, on one line.
        status: Exit status of all ranks.
        resume: What the same command will do.
        by: The rank that found out.
        time: Unix time.
    """

    how: str
    rank: int
    host: str
    layer: int | None
    phase: str
    cause: str
    status: int
    resume: str
    by: int
    time: float

    @property
    def line(self) -> str:
        """The last line of the log."""
        if self.how == "stopped":
            return f"layersweep: {self.cause}; {self.resume}"
        layer = "" if self.layer is None else f", layer {self.layer}"
        return (
            f"layersweep: failed: rank {self.rank} on {self.host}{layer}, phase {self.phase}: "
            f"{self.cause.rstrip('.')}. {self.resume}"
        )

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong."""
        return self.how != "stopped"

    @property
    def why(self) -> str:
        """The cause and its place, for the list of attempts."""
        if not self.is_failure:
            return self.cause.removeprefix("stopped ")
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"rank {self.rank} on {self.host}{layer}, phase {self.phase}: {self.cause}"

    def failure(self, attempt: int) -> dict[str, Any]:
        """What is kept of a failure."""
        names = ("rank", "host", "layer", "phase", "cause", "time")
        return {**{name: getattr(self, name) for name in names}, "attempt": attempt}

    def encode(self) -> str:
        """As text, for the other ranks."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """From another rank's text."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)


def ending_of(error: BaseException, rank: int, host: str, life: Life, rehearses: bool) -> Ending:
    """The end of a rank that raised something."""
    how, cause, status = describe(error)
    phase, layer = life.at
    return Ending(
        how=how,
        rank=rank,
        host=host,
        layer=layer,
        phase=phase,
        cause=cause,
        status=status,
        resume=resumption(how, life.next_layer, rehearses),
        by=rank,
        time=time.time(),
    )


def abandonment(
    why: str, rank: int, host: str, life: Life, *, status: Status, rehearses: bool
) -> Ending:
    """The end of a rank that leaves in the middle of something, because somebody asked for it."""
    phase, layer = life.at
    where = f"phase {phase}" if layer is None else f"layer {layer}"
    return Ending(
        how="stopped",
        rank=rank,
        host=host,
        layer=layer,
        phase=phase,
        cause=f"stopped in {where} ({why})",
        status=status,
        resume=resumption("stopped", life.next_layer, rehearses),
        by=rank,
        time=time.time(),
    )


def describe(error: BaseException) -> tuple[str, str, int]:
    """How a run ends by an error: in a word, on one line, and as exit status."""
    if isinstance(error, StoppedError):
        return "stopped", str(error), Status.stopped
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted", Status.interrupted
    if isinstance(error, LayersweepError):
        is_audit = isinstance(error, AuditError)
        return "refused", _one_line(error), Status.audit_failed if is_audit else Status.refused
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = error.filename or "the output"
        return "refused", f"{where}: {error.strerror}; make room", Status.refused
    if isinstance(error, torch.OutOfMemoryError):
        return "failed", f"{_one_line(error)[:300]}; {_OUT_OF_MEMORY}", Status.fault
    if isinstance(error, MemoryError):
        return (
            "failed",
            "the host is out of memory: a smaller read_ahead_gb or fewer ranks on it need less",
            Status.fault,
        )
    return "failed", f"{UNEXPECTED}: {type(error).__name__}: {_one_line(error)}", Status.fault


def is_lost_connection(error: BaseException) -> bool:
    """Whether a rank is the victim of another one's end."""
    if isinstance(error, LayersweepError) or not isinstance(error, RuntimeError | OSError):
        return False
    return any(word in str(error) for word in _LOST_CONNECTION)


def resumption(how: str, next_layer: int | None, rehearses: bool) -> str:
    """What the same command will do.

    Args:
        how: The run ended.
        next_layer: First layer that is not committed; -1 if all are, None if that is not known.
        rehearses: Nothing is kept.
    """
    if how == "stopped":
        return "a rehearsal begins anew" if rehearses else "the same command goes on"
    again = "The same command then" if how == "refused" else "The same command"
    if rehearses or next_layer is None:
        return f"{again} begins anew"
    if next_layer < 0:
        return f"{again} goes on with what follows the layers"
    return f"{again} goes on from layer {next_layer}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line) or "no message"
