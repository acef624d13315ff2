"""A run's status in words, for a terminal and for the end of a job's log.

In: a `RunStatus`. Out: text: the state on the first line, then one labelled line for each thing
that is known, and what to do next at the end.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from pipeline.cluster.run_files import STOP, Attempt, Sign
from pipeline.cluster.status import RunStatus, State

LABEL_WIDTH = 10
MOST_ATTEMPTS = 6
MOST_LATE = 8


def describe(status: RunStatus) -> str:
    """The whole answer."""
    lines = [_headline(status)]
    lines += [f"  {label:<{LABEL_WIDTH}} {text}" for label, text in _details(status)]
    return "\n".join(lines) + "\n"


def _headline(status: RunStatus) -> str:
    head = {
        State.finished: f"finished: {status.files.output}",
        State.rejected: f"rejected: {status.files.output}.rejected missed a gate",
        State.running: f"running: {_place(status.speaker)}",
        State.stopped: "stopped: the same command goes on",
        State.refused: f"refused: {status.why or 'something has to be mended first'}",
        State.dead: f"dead: {status.why or 'it ended early'}",
        State.absent: f"nothing there: {status.why}",
    }[status.state]
    asks = status.state is State.running and status.files.is_asked_to_stop
    return f"{head}; asked to stop after this layer" if asks else head


def _details(status: RunStatus) -> Iterator[tuple[str, str]]:
    files, speaker = status.files, status.speaker
    if status.state is State.absent:
        yield "next", "start the job, or look whether the directory is the one that was given to it"
        return
    if files.has_work and files.report is None:
        yield "work", str(files.work)
        plural = "" if files.committed == 1 else "s"
        yield "committed", f"{files.committed} layer{plural}, which a restart does not pack again"
    if status.state is State.running and speaker is not None:
        yield "speed", _speed(speaker)
    if status.state in (State.running, State.dead) and status.last_sign_s is not None:
        yield "heard of", _heard(status)
    if status.slowest is not None and status.state is State.running:
        yield "slowest", _where(status.slowest, status.now)
    for sign in status.late[:MOST_LATE]:
        yield "silent", f"{_rank(sign)}: last heard of {_seconds(status.now - sign.updated)} ago"
    failure = status.failure
    if failure is not None and failure.attempt in (None, getattr(status.attempt, "number", None)):
        layer = "" if failure.layer is None else f", layer {failure.layer}"
        rank = "a rank" if failure.rank is None else f"rank {failure.rank}"
        yield "failure", f"{rank} on {failure.host or '?'}{layer}, {failure.phase}: {failure.cause}"
    skipped = len(files.attempts) - MOST_ATTEMPTS
    if skipped > 0:
        yield "attempts", f"({skipped} earlier ones)"
    for attempt in files.attempts[-MOST_ATTEMPTS:]:
        yield "attempt", _attempt(attempt, status)
    yield "next", _next(status)


def _place(sign: Sign | None) -> str:
    """Where the run is, as one rank sees it."""
    if sign is None:
        return "it has begun"
    if sign.layer is None:
        return sign.phase or "it has begun"
    total = f", {sign.done or 0} of {sign.layers} done" if sign.layers else ""
    return f"layer {sign.layer} ({sign.phase}){total}"


def _speed(sign: Sign) -> str:
    parts = []
    if sign.tokens_per_s:
        parts.append(f"{sign.tokens_per_s:,.0f} tok/s")
    if sign.left_s is not None:
        parts.append(f"{_seconds(sign.left_s)} left")
    if sign.peak_gib is not None:
        parts.append(f"peak {sign.peak_gib:.2f} GiB")
    return ", ".join(parts) or "not known before the first layer is done"


def _heard(status: RunStatus) -> str:
    ago = f"{_seconds(status.last_sign_s or 0.0)} ago"
    worlds = {sign.world for sign in status.signs if sign.world is not None}
    world = max(worlds, default=len(status.signs))
    hosts = sorted({sign.host for sign in status.signs if sign.host})
    ranks = f"{len(status.signs)} of {world} ranks" if len(status.signs) != world else f"{world}"
    noun = "" if ranks.endswith("ranks") else " rank" + "s" * (world != 1)
    return f"{ago}; {ranks}{noun} on {' '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''}"


def _where(sign: Sign, now: float) -> str:
    return f"{_rank(sign)}: {_place(sign)}, for {_seconds(now - sign.since)}"


def _rank(sign: Sign) -> str:
    return f"rank {sign.rank} on {sign.host or '?'}"


def _attempt(attempt: Attempt, status: RunStatus) -> str:
    is_last = attempt is status.attempt
    job = f", Slurm job {attempt.slurm_job}" if attempt.slurm_job else ""
    began = attempt.began
    if attempt.how and attempt.ended is not None and began is not None:
        lasted = f" after {_seconds(attempt.ended - began)}"
    elif began is not None and is_last and status.state is State.running:
        lasted = f" for {_seconds(status.now - began)}"
    else:
        lasted = ""
    how = attempt.how
    if not how:
        how = "running" if is_last and status.state is State.running else "no end is recorded"
        how = "finished" if is_last and status.state is State.finished else how
    why = f": {attempt.why}" if attempt.why and attempt.how != "finished" else ""
    return f"{attempt.number}{job}: {how}{lasted}{why}"


def _next(status: RunStatus) -> str:
    files = status.files
    output = shlex.quote(str(files.output))
    match status.state:
        case State.finished:
            return f"layersweep-verify {output}"
        case State.rejected:
            return f"its report says which gate: {files.output}.rejected/layersweep/report.html"
        case State.running if files.is_asked_to_stop:
            return "wait: it ends after the layer in hand"
        case State.running:
            return f"wait; to stop it after the layer in hand: touch {_quote_stop(status)}"
        case State.stopped:
            return "start the same command again, unless the batch system does"
        case State.refused:
            return "mend what the failure says, then start the same command again"
        case _:
            return "see the end of its log, then start the same command again: it goes on"


def _quote_stop(status: RunStatus) -> str:
    return shlex.quote(str(status.files.work / STOP))


def _seconds(seconds: float) -> str:
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
