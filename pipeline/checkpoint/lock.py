"""One run at a time in a work directory.

In: the work directory. Out: a lock that ends with the process, however it ends (flock), so that a
killed run never has to be cleaned up after. Rank 0 takes it for all ranks. Some file
systems of clusters know flock within one host only: a run on another one is known by its signs of
life.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.checkpoint.durable import open_to_append
from pipeline.checkpoint.publish import WorkDirectory
from pipeline.errors import OutputError
from pipeline.runtime.peers import is_alive_here
from pipeline.runtime.signs import read_record, sign_path

YOUNG_S = 30.0
"""An older sign of life is not waited for: a run that lives writes one every 4 s."""
WATCHED_S = 12.0
_LOOK_S = 0.5


class WorkLock:
    """Holds the work directory of an output; a context manager.

    Args:
        work: The directory; it is made if it does not exist.

    Raises:
        OutputError: Another run holds it.
    """

    def __init__(self, work: WorkDirectory) -> None:
        work.root.mkdir(parents=True, exist_ok=True)
        work.journal.mkdir(exist_ok=True)  # so that it reads as a run that can go on
        self._file = os.fdopen(open_to_append(work.root / "lock"), "a", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            self._file.close()
            raise _in_use(work, "by another run") from problem
        if host := _find_living(sign_path(work.state, 0)):
            self._file.close()
            raise _in_use(work, f"by another run, on {host}")

    def __enter__(self) -> Self:
        """Returns the lock."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets the next run in."""
        self._file.close()


def _find_living(path: Path) -> str:
    """The host of the process that keeps rewriting rank 0's sign of life; empty where none does."""
    first = read_record(path)
    if first is None:
        return ""
    host, pid, here = first.get("host"), first.get("pid"), socket.gethostname()
    if (host, pid) == (here, os.getpid()):
        return ""  # of an earlier run in this process
    if host == here and not (isinstance(pid, int) and is_alive_here(pid)):
        return ""
    try:
        # By the clock of the file system: that of the other host may be wrong.
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return ""
    if age_s > YOUNG_S:
        return ""
    deadline = time.monotonic() + WATCHED_S
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        now = read_record(path)
        if now is not None and now.get("updated") != first.get("updated"):
            return str(host)
    return ""


def _in_use(work: WorkDirectory, value: str) -> OutputError:
    return OutputError(
        f"work directory {work.root}",
        value=f"in use {value}",
        rule="one run at a time writes to an output",
        remedy="wait for it, or choose another output",
    )
