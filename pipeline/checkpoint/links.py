"""No links where a run writes: neither the output directory nor anything under it may be one.

In: the directory that a run makes, or goes on with. Out: nothing, or an error. Somebody who may
write beside the output could plant a link there, and so have files elsewhere replaced or published.
Directories above the output may be links, as homes and scratch directories often are.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import OutputError


def refuse_links(root: Path, *, deep: bool) -> None:
    """Refuses a link at `root`, or in it; a `root` that does not exist has none.

    Args:
        root: A directory that belongs to a run alone.
        deep: Look at everything below; otherwise at `root` and its own entries.

    Raises:
        OutputError: There is one, or a directory cannot be read.
    """
    if root.is_symlink():
        raise _refused(root)
    waiting = [root] if root.is_dir() else []
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        raise _refused(Path(entry.path))
                    if deep and entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except FileNotFoundError:
            continue  # another rank's temporary directory, gone meanwhile
        except OSError as problem:
            raise OutputError(
                str(folder),
                value=problem.strerror,
                rule="a run must be able to read what it has written",
                remedy="mend its rights, or choose another output",
            ) from problem


def _refused(path: Path) -> OutputError:
    return OutputError(
        str(path),
        value=f"a symbolic link to {os.readlink(path)}",
        rule="a run writes through no link in its own directories",
        remedy="remove the link, or choose another output",
    )
