"""Opening files that somebody else may have put there: regular files only, and never a wait.

In: a path, links followed. Out: a descriptor, or the bytes, bounded. A FIFO would block whoever
opens it until somebody writes, a device may do anything, a socket or directory has no bytes: they
are refused by an `OSError` that says what is there, as a missing file is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: Path) -> int:
    """A descriptor to read from.

    Raises:
        OSError: Missing, unreadable, or no regular file.
    """
    # Looked at before it is opened: opening a device may already act on it.
    _refuse_irregular(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path, most_bytes: int) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: Missing, unreadable, no regular file, or longer than `most_bytes`.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # One more than allowed: files of /proc say that they are empty, and others may grow.
        data = b"" if size > most_bytes else file.read(most_bytes + 1)
    if size > most_bytes or len(data) > most_bytes:
        text = f"{max(size, len(data)):,} bytes, more than {most_bytes:,}"
        raise OSError(errno.EFBIG, text, str(path))
    return data


class OpenFiles:
    """Descriptors by path, opened on first use; threads share them (`os.preadv` needs no lock).

    Args:
        advice: What the system is told of how they are read (`os.POSIX_FADV_*`).
    """

    def __init__(self, advice: int = os.POSIX_FADV_NORMAL) -> None:
        self._advice = advice
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        """An open descriptor of `path`.

        Raises:
            OSError: Missing, unreadable, or no regular file.
        """
        with self._lock:
            if path not in self._descriptors:
                descriptor = open_regular(path)
                with contextlib.suppress(OSError):  # not every file system takes advice
                    os.posix_fadvise(descriptor, 0, 0, self._advice)
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def close(self) -> None:
        """Closes all of them; a later use opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        self.close()


def _refuse_irregular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
