"""Signs of life on disk: `state/rank-00003.json`, for `launch.status` and for the next attempt.

In: a rank's `Life`. Out: a small file, rewritten by a thread of its own, because a file system that
hangs must not end a run. The thread of rank 0 also looks for the file `stop`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.checkpoint.strict_json import read_json_file
from pipeline.runtime.life import Life
from pipeline.runtime.peers import Peer

INTERVAL_S = 4.0
LOOK_S = 1.0
RANKS_PER_SECOND = 128
"""Larger worlds write less often: their file system is shared."""
FAILURE = "failure.json"
_MOST_BYTES = 1_000_000


class Signs:
    """Writes one rank's file until it is closed.

    Args:
        directory: Of all ranks' files.
        me: This rank's process.
        world: Number of ranks.
        attempt: Number of this attempt.
        life: What is told.
        stop_file: Looked for now and then; None on other ranks than 0.
        found_stop: Called when it is there.
    """

    def __init__(
        self,
        directory: Path,
        me: Peer,
        world: int,
        attempt: int,
        life: Life,
        *,
        stop_file: Path | None,
        found_stop: Callable[[], None],
    ) -> None:
        self._directory, self._me, self._world = directory, me, world
        self._attempt, self._life = attempt, life
        self._stop_file, self._found_stop = stop_file, found_stop
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs", daemon=True)
        self._thread.start()

    def close(self, patience_s: float = 2.0) -> None:
        """Writes a last time; nothing is written afterwards, unless the disk hangs."""
        self._closing.set()
        self._thread.join(patience_s)

    def _run(self) -> None:
        written, steps = 0.0, -1
        while not self._closing.is_set():
            now = time.monotonic()
            # While layers fly past, the file follows them; while nothing moves, it says so.
            due_s = INTERVAL_S if steps == self._life.steps else self._world / RANKS_PER_SECOND
            if now - written >= min(due_s, INTERVAL_S):
                written, steps = now, self._life.steps
                self._write()
            if self._stop_file is not None and _exists(self._stop_file):
                self._found_stop()
                self._stop_file = None
            self._closing.wait(LOOK_S)
        self._write()

    def _write(self) -> None:
        phase, layer = self._life.at
        sign = {
            "rank": self._me.rank,
            "world": self._world,
            "host": self._me.host,
            "pid": self._me.pid,
            "attempt": self._attempt,
            "phase": phase.value,
            "layer": layer,
            "layers": self._life.layers,
            "done": self._life.done,
            "since": self._life.since,
            "updated": time.time(),
            **self._life.figures,
        }
        path = sign_path(self._directory, self._me.rank)
        temporary = path.with_name(f".{path.name}.tmp")
        with suppress(OSError):  # a full disk is for those to report who write what is needed
            temporary.write_text(json.dumps(sign), encoding="utf-8")
            os.replace(temporary, path)


def sign_path(directory: Path, rank: int) -> Path:
    """Where a rank's sign of life lies."""
    return directory / f"rank-{rank:05d}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """One small JSON file, if it is there and whole."""
    try:
        value = read_json_file(path, most_bytes=_MOST_BYTES)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_signs(directory: Path) -> list[dict[str, Any]]:
    """The last signs of life of all ranks."""
    found = (read_record(path) for path in sorted(directory.glob("rank-*.json")))
    return [sign for sign in found if sign is not None and _is_time(sign.get("updated"))]


def write_failure(directory: Path, record: dict[str, Any]) -> None:
    """The first failure of the attempt; later ones are not written."""
    with (
        suppress(OSError),  # it is there, or the disk is at fault
        (directory / FAILURE).open("x", encoding="utf-8") as file,
    ):
        json.dump(record, file)


def clear_signs(directory: Path) -> None:
    """Removes what an earlier attempt left; makes the directory."""
    with suppress(OSError):  # signs of life are no reason to end a run
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            path.unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0.0 <= value < 1e11
