"""The files by which a run tells about itself, read while it writes them.

In: the directory of a run, on a file system that this machine sees too. Out: `RunFiles`. A file may
be missing, half written or of another version at any moment: what cannot be read is not there.

    OUTPUT.partial/state/rank-00003.json    a rank's sign of life, every few seconds
    OUTPUT.partial/state/failure.json       the attempt's first failure
    OUTPUT.partial/attempts.jsonl           when each attempt began, and how it ended
    OUTPUT.partial/stop                     asks the run to stop
    OUTPUT.partial/journal/*.commit.json    finished units
    OUTPUT/layersweep/run.json              the report, attempts included
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTIAL, REJECTED = ".partial", ".rejected"
STOP = "stop"
REPORT = Path("layersweep", "run.json")
REHEARSAL_NOTE, REHEARSAL_WORK = "rehearsal.txt", ".work"


@dataclass(frozen=True)
class Sign:
    """What one rank last said; times are Unix seconds, None is what it did not say."""

    rank: int
    world: int | None
    host: str
    attempt: int | None
    phase: str
    layer: int | None
    layers: int | None
    done: int | None
    since: float
    updated: float
    tokens_per_s: float | None = None
    left_s: float | None = None
    peak_gib: float | None = None


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt."""

    rank: int | None
    host: str
    layer: int | None
    phase: str
    cause: str
    attempt: int | None


@dataclass(frozen=True)
class Attempt:
    """One start of the job; `how` is empty while it has no end."""

    number: int
    began: float | None
    world: int | None = None
    hosts: tuple[str, ...] = ()
    slurm_job: str = ""
    ended: float | None = None
    how: str = ""
    why: str = ""


@dataclass(frozen=True)
class RunFiles:
    """All that a run's files tell.

    Attributes:
        output: The directory that the run makes.
        work: Where it works until then.
        report: run.json of the finished, or rejected, directory.
        has_work: Whether the work directory is there.
        is_rejected: Whether the finished directory missed a gate.
        is_asked_to_stop: Whether it was, by file.
        committed: Number of layers that a restart need not do again.
    """

    output: Path
    work: Path
    report: Mapping[str, Any] | None = None
    has_work: bool = False
    is_rejected: bool = False
    is_asked_to_stop: bool = False
    committed: int = 0
    signs: tuple[Sign, ...] = ()
    failure: Failure | None = None
    attempts: tuple[Attempt, ...] = field(default=())


def read_run(directory: Path) -> RunFiles:
    """Reads what a run has written.

    Args:
        directory: Its output, its work directory (OUTPUT.partial) or OUTPUT.rejected; of a
            rehearsal, the directory of its report.
    """
    output = output_of(directory)
    work = output.with_name(output.name + PARTIAL)
    if (output / REHEARSAL_WORK).is_dir() and not work.is_dir():
        work = output / REHEARSAL_WORK
    rejected = output.with_name(output.name + REJECTED)
    report = _read_mapping(output / REPORT) or _read_mapping(output / REPORT.name)
    is_rejected = report is None and (rejected / REPORT).is_file()
    if is_rejected:
        report = _read_mapping(rejected / REPORT) or {}
    lines = report.get("attempts") if report is not None else _read_lines(work / "attempts.jsonl")
    return RunFiles(
        output=output,
        work=work,
        report=report,
        has_work=work.is_dir(),
        is_rejected=is_rejected,
        is_asked_to_stop=(work / STOP).exists(),
        committed=_count(work / "journal", "layer-", ".commit.json"),
        signs=tuple(_read_signs(work / "state")),
        failure=_read_failure(work / "state" / "failure.json"),
        attempts=tuple(_attempts(lines if isinstance(lines, list) else [])),
    )


def output_of(directory: Path) -> Path:
    """The output directory that is meant by it, by OUTPUT.partial or by OUTPUT.rejected."""
    path = Path(os.path.abspath(directory.expanduser()))
    for ending in (PARTIAL, REJECTED):
        is_itself = (path / REPORT).is_file() and ending == PARTIAL
        has_work = path.with_name(path.name + PARTIAL).is_dir()
        if path.name.endswith(ending) and path.name != ending and not is_itself and not has_work:
            return path.with_name(path.name.removesuffix(ending))
    return path


def _read_signs(directory: Path) -> list[Sign]:
    signs = []
    for name in _names(directory):
        if not (name.startswith("rank-") and name.endswith(".json")):
            continue
        value = _read_mapping(directory / name)
        rank = None if value is None else _whole(value, "rank")
        if value is None or rank is None:
            continue
        signs.append(
            Sign(
                rank=rank,
                world=_whole(value, "world"),
                host=_text(value, "host"),
                attempt=_whole(value, "attempt"),
                phase=_text(value, "phase"),
                layer=_whole(value, "layer"),
                layers=_whole(value, "layers"),
                done=_whole(value, "done"),
                since=_number(value, "since") or 0.0,
                updated=_number(value, "updated") or 0.0,
                tokens_per_s=_number(value, "tokens_per_s"),
                left_s=_number(value, "left_s"),
                peak_gib=_number(value, "peak_gib"),
            )
        )
    return sorted(signs, key=lambda sign: sign.rank)


def _read_failure(path: Path) -> Failure | None:
    value = _read_mapping(path)
    if value is None:
        return None
    return Failure(
        rank=_whole(value, "rank"),
        host=_text(value, "host"),
        layer=_whole(value, "layer"),
        phase=_text(value, "phase"),
        cause=_text(value, "cause"),
        attempt=_whole(value, "attempt"),
    )


def _attempts(lines: Sequence[Any]) -> list[Attempt]:
    """The attempts in order, each put together from its lines."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        if not isinstance(line, dict) or (number := _whole(line, "attempt")) is None:
            continue
        known = merged.setdefault(number, {})
        time = _number(line, "time")
        if line.get("event") == "began":
            hosts = line.get("hosts")
            known |= {
                "began": time,
                "world": _whole(line, "world"),
                "hosts": tuple(map(str, hosts)) if isinstance(hosts, list) else (),
                "slurm_job": str(line.get("slurm_job_id") or ""),
            }
        elif line.get("event") == "ended":
            known |= {"ended": time, "how": _text(line, "how"), "why": _text(line, "why")}
    return [
        Attempt(number=number, **{"began": None, **known})
        for number, known in sorted(merged.items())
    ]


def _read_mapping(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _read_lines(path: Path) -> list[Any]:
    """The values of a .jsonl file; a line that is not whole is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _count(directory: Path, start: str, end: str) -> int:
    return sum(name.startswith(start) and name.endswith(end) for name in _names(directory))


def _number(value: Mapping[str, Any], key: str) -> float | None:
    found = value.get(key)
    return float(found) if isinstance(found, int | float) else None


def _whole(value: Mapping[str, Any], key: str) -> int | None:
    found = value.get(key)
    return found if isinstance(found, int) else None


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    return "" if found is None else str(found)
