"""The demo's text: the Python standard library's own source, read from the running interpreter.

Goes in: the interpreter's standard library directory. Comes out: three disjoint lists of files
(train, calibration, evaluation), chosen by a hash of each file's relative path. So a file stays in
its part whatever else the interpreter ships, and a newer Python's evaluation files were never
trained on under an older one.

    python -m pipeline.demo.text --split calibration --output calibration.jsonl
"""

import argparse
import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.errors import DataError

logger = logging.getLogger(__name__)

EXCLUDED_DIRECTORIES = frozenset(
    {
        "__pycache__",
        "encodings",  # mostly tables of code points
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",  # gone in 3.13
        "pydoc_data",  # documentation as one string
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # of the build machine, not of the library
SMALLEST_FILE_BYTES = 256
HASH_BUCKETS = 20


class Split(StrEnum):
    """The part of the text that a file belongs to."""

    train = "train"
    calibration = "calibration"
    evaluation = "evaluation"


@dataclass(frozen=True)
class Document:
    """One source file: its path inside the standard library (posix) and its text."""

    path: str
    text: str


def split_of(relative_path: str) -> Split:
    """The part of a file, from SHA-256 of its posix path: 80 % train, 10 % each of the others."""
    bucket = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big")
    match bucket % HASH_BUCKETS:
        case 0 | 1:
            return Split.evaluation
        case 2 | 3:
            return Split.calibration
        case _:
            return Split.train


def list_files(split: Split, root: Path | None = None) -> list[Path]:
    """The files of one part, sorted by their path.

    Args:
        split: Which part.
        root: The standard library; the running interpreter's when None.

    Raises:
        DataError: The directory holds no source files (a Python shipped as bytecode or as a zip).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    relative_paths = sorted(path.relative_to(root).as_posix() for path in _walk(root))
    if not relative_paths:
        raise DataError(
            "the Python standard library's source",
            value=root,
            rule="the demo's text is its .py files",
            remedy="use an interpreter that ships them (CPython 3.12 or later)",
        )
    return [root / path for path in relative_paths if split_of(path) is split]


def read_documents(split: Split, root: Path | None = None) -> list[Document]:
    """The files of one part with their text; those that are not UTF-8 are left out."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in list_files(split, root):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents


def write_jsonl(split: Split, destination: Path, root: Path | None = None) -> int:
    """Write one part as JSON lines with the fields `text` and `path`; returns the text's bytes."""
    documents = read_documents(split, root)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "path": document.path}) + "\n")
    return sum(len(document.text.encode()) for document in documents)


def _walk(root: Path) -> Iterator[Path]:
    """Every source file that is wanted, in no particular order."""
    for directory, subdirectories, names in root.walk():
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_PREFIXES)
        ]
        for name in names:
            path = directory / name
            if path.suffix != ".py" or name.startswith(EXCLUDED_PREFIXES):
                continue
            if path.is_file() and path.stat().st_size >= SMALLEST_FILE_BYTES:
                yield path


def main() -> None:
    """Write one part of the text to a file."""
    parser = argparse.ArgumentParser(description="Write one part of the demo's text as JSON lines.")
    parser.add_argument("--split", type=Split, choices=list(Split), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = write_jsonl(arguments.split, arguments.output)
    logger.info("%s: %d bytes of text", arguments.output, size)


if __name__ == "__main__":
    main()
