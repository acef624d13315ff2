"""The files of a checkpoint that are copied along: tokenizer, generation config, remote code.

In: a directory. Out: every file in it that is neither weights nor written anew. They are copied as
they are, code of the model too: nothing here is ever imported or run. Links are followed, because a
Hub cache is made of them; a link may lead anywhere, so what is looked at and copied is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.checkpoint.safetensors_file import name_fault
from pipeline.checkpoint.source_files import INDEX_NAME, MAX_FILE_NAME_BYTES
from pipeline.errors import SourceError

MAX_ENTRIES = 10_000
"""Files and directories that are looked at, weights among them."""
MAX_BYTES = 2 << 30
"""Of all small files together."""
MAX_FOLDERS = 16
"""Of a path, from the checkpoint down."""

# Written anew for the output, or true of the source alone, so never copied.
_REPLACED = {"config.json", "hf_quant_config.json", INDEX_NAME, "SHA256SUMS"}
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".tmp",
    ".sha256",  # of the weights of the source
)
_REPORTS = "layersweep"  # of a published checkpoint
_SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__", _REPORTS}


def find_small_files(directory: Path) -> dict[str, Path]:
    """Relative to absolute path of every file that is neither weights nor written anew.

    Links are followed, but no directory is entered twice.

    Raises:
        SourceError: Something that is no readable regular file, or cannot be copied under its name;
            too many files, or too much in them.
    """
    found: dict[str, Path] = {}
    left, nbytes = MAX_ENTRIES, 0
    waiting, entered = [(directory, "")], set[str]()
    while waiting:
        folder, prefix = waiting.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        below = []
        for entry in _scan(folder):
            left -= 1
            relative = prefix + entry.name
            if left < 0:
                raise _too_much(directory, f"more than {MAX_ENTRIES:,} files and directories")
            if entry.name.endswith(_WEIGHT_SUFFIXES) or relative in _REPLACED:
                continue
            if os.path.isdir(entry.path):
                if entry.name not in _SKIPPED_DIRECTORIES:
                    below.append((folder / entry.name, f"{relative}/"))
                continue
            path = folder / entry.name
            _check(path, relative)
            nbytes += path.stat().st_size
            if nbytes > MAX_BYTES:
                raise _too_much(directory, f"more than {MAX_BYTES >> 30} GiB")
            found[relative] = path
        waiting += sorted(below, reverse=True)
    return dict(sorted(found.items()))


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries one by one: a link may lead to a directory with millions of them."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as problem:
        raise SourceError(
            str(folder),
            value=problem.strerror,
            rule="every directory of a checkpoint must be readable",
            remedy="mend its rights, or remove it",
        ) from problem


def _check(path: Path, relative: str) -> None:
    folders, _, name = relative.rpartition("/")
    fault = name_fault(name)
    if len(os.fsencode(name)) > MAX_FILE_NAME_BYTES:
        fault = f"a name of more than {MAX_FILE_NAME_BYTES} bytes"
    elif folders.count("/") >= MAX_FOLDERS:
        fault = f"a path of more than {MAX_FOLDERS} directories"
    elif folders and not fault:
        fault = next(filter(None, map(name_fault, folders.split("/"))), "")
    elif relative == _REPORTS:
        fault = "a file, where the reports of the new checkpoint will lie"
    if fault:
        raise SourceError(
            ascii(str(path))[1:-1],
            value=fault,
            rule="every small file is copied along under its name",
            remedy="rename it, or remove it",
        )
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise SourceError(
            str(path),
            value="no readable regular file" if os.path.exists(path) else "a broken link",
            rule="every small file is copied along",
            remedy="fetch it again, or remove it",
        )


def _too_much(directory: Path, value: str) -> SourceError:
    return SourceError(
        f"small files of {directory}",
        value=value,
        rule="whatever is in a checkpoint's directory is copied along, links included",
        remedy="remove what does not belong to it, such as logs or a link to another directory",
    )
