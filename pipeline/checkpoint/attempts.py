"""The attempts of a run: `attempts.jsonl`, which says how each one began and ended.

In: what rank 0 knows when an attempt begins, and its end. Out: a file that only grows, in the work
directory; later a list in run.json. An attempt that could not say how it ended is ended by the next
one, with the last signs of life of its ranks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.durable import open_to_append, write_all
from pipeline.checkpoint.publish import WorkDirectory
from pipeline.checkpoint.regular_files import read_regular
from pipeline.checkpoint.strict_json import parse_json
from pipeline.runtime.signs import FAILURE, clear_signs, read_record, read_signs

Record = dict[str, Any]

_RANKS_TOLD = 8
_MOST_BYTES = 10_000_000


class Attempts:
    """The attempts in one work directory; rank 0 of one run at a time uses it.

    Attributes:
        number: Of the current attempt, from 1; 0 before it has begun.
    """

    def __init__(self, work: WorkDirectory) -> None:
        self._work = work
        self.number = 0

    def read(self) -> list[Record]:
        """All of them so far: two lines each, of how it began and ended."""
        return read_attempts(self._work.attempts)

    def begin(self, facts: Mapping[str, Any]) -> str:
        """Begins an attempt, and clears away the signs of the last one.

        Args:
            facts: World, hosts, layout, job.

        Returns:
            How the last attempt ended, in words; empty for the first one.
        """
        lines = self.read()
        numbers = [line["attempt"] for line in lines]
        self.number = max(numbers, default=0) + 1
        last = lines[-1] if lines else None
        if last is not None and last["event"] != "ended":
            last = self._say_it_died(last["attempt"])
        clear_signs(self._work.state)
        self._work.stop.unlink(missing_ok=True)
        self._append(
            {"attempt": self.number, "event": "began", "time": time.time(), **facts},
        )
        if last is None:
            return ""
        return f"{last['how']}{' ' if last['how'] == 'stopped' else ': '}{last['why']}"

    def end(self, how: str, why: str) -> None:
        """Ends the current attempt."""
        self._append(
            {
                "attempt": self.number,
                "event": "ended",
                "time": time.time(),
                "how": how,
                "why": why,
            }
        )

    def _say_it_died(self, number: int) -> Record:
        """Ends an attempt that had no time to."""
        # Those first that were not heard of for longest: they tell most.
        signs = sorted(read_signs(self._work.state), key=lambda sign: sign["updated"])
        failure = read_record(self._work.state / FAILURE)
        why = "it left no sign of life"
        if signs:
            why = "last signs of life: " + "; ".join(map(_describe, signs[:_RANKS_TOLD]))
        if failure is not None:
            why = f"rank {failure.get('rank')} on {failure.get('host')}: {failure.get('cause')}"
        record = {
            "attempt": number,
            "event": "ended",
            "time": signs[-1]["updated"] if signs else time.time(),
            "how": "died",
            "why": why,
        }
        self._append(record)
        return record

    def _append(self, record: Record) -> None:
        """Adds a line, durably; one that was torn stays a line of its own."""
        descriptor = open_to_append(self._work.attempts)
        try:
            data = _read(self._work.attempts)
            is_torn = bool(data) and not data.endswith(b"\n")
            write_all(descriptor, b"\n" * is_torn + json.dumps(record).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_attempts(path: Path) -> list[Record]:
    """All whole lines."""
    found = []
    for line in _read(path).splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if _is_begin(record) or _is_end(record):
            found.append(record)
    return found


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _MOST_BYTES)
    except OSError:
        return b""


def _is_begin(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("attempt"), int):
        return False
    return record.get("event") == "began"


def _is_end(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("attempt"), int):
        return False
    texts = (record.get("how"), record.get("why"))
    return record.get("event") == "ended" and all(isinstance(text, str) for text in texts)


def _describe(sign: Record) -> str:
    layer = "" if sign.get("layer") is None else f"layer {sign['layer']}, "
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(sign["updated"]))
    return f"rank {sign.get('rank')} on {sign.get('host')} in {layer}{sign.get('phase')}, {when}"
