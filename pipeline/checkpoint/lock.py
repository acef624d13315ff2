"""One run at a time in a work directory.

In: the work directory. Out: a lock that ends with the process, however it ends (flock), so that a
killed run never has to be cleaned up after. Rank 0 takes it for all ranks.
"""

from __future__ import annotations

import fcntl
from types import TracebackType
from typing import Self

from pipeline.checkpoint.publish import WorkDirectory
from pipeline.errors import OutputError


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
        self._file = (work.root / "lock").open("a", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            self._file.close()
            raise OutputError(
                f"work directory {work.root}",
                value="in use by another run",
                rule="one run at a time writes to an output",
                remedy="wait for it, or choose another output",
            ) from problem

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
