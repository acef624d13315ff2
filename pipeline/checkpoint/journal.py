"""The record of committed layers, by which an interrupted run goes on.

In: for every unit of work (a layer, or a named part such as `embeddings`) the records of its
parts. A part is what one writer made durable: files, and statistics as plain values. Out: on a
restart, which units are whole.

The order makes it safe. Each rank syncs its files, then writes its part records; after a barrier
(the caller's) one rank writes the commit marker, which names all parts and the digest of each
record. A unit counts only if its marker, every record and every file are there; anything torn or
missing makes it an uncommitted unit, which is simply done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint.durable import files_sha256, reading_threads, write_json
from pipeline.checkpoint.regular_files import read_regular
from pipeline.checkpoint.strict_json import MAX_BYTES, parse_json, read_json_file
from pipeline.checkpoint.writable import FileRecord
from pipeline.errors import OutputError

Unit = int | str

SCALARS = "scalars"
"""Name of the part that one rank adds when it commits a unit: what was chosen and measured."""

_FINGERPRINT = "fingerprint.json"
_PART = re.compile(r"[\w-]{1,100}")


@dataclasses.dataclass(frozen=True)
class PartRecord:
    """What one writer made durable for one unit.

    Attributes:
        part: Name of the part, unique within its unit, e.g. `"weights-rank00003"`.
        files: The files, already synced under their names.
        statistics: Plain values (JSON) that a restart or the report needs.
    """

    part: str
    files: tuple[FileRecord, ...]
    statistics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """A committed unit: all of its parts, in the order in which they were declared."""

    unit: Unit
    parts: tuple[PartRecord, ...]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """The files of all parts."""
        return tuple(file for part in self.parts for file in part.files)

    @property
    def summary(self) -> Mapping[str, Any]:
        """What was chosen and measured (the part `SCALARS`); empty where it is not."""
        found = (part.statistics for part in self.parts if part.part == SCALARS)
        return next(found, {})


class Journal:
    """The journal of one run.

    Args:
        directory: Where the records lie.
        files: Where the recorded files lie.
        discard: A rehearsal's journal: the files that it records are written nowhere, so they are
            not looked for; and no later run can go on from it.
    """

    def __init__(self, directory: Path, files: Path, *, discard: bool = False) -> None:
        self.directory = directory
        self.files = files
        self.discards_files = discard

    def start(self, fingerprint: Mapping[str, Any]) -> bool:
        """Begins a run, or goes on with one of the same fingerprint; returns whether it goes on.

        One rank calls this, before any other call of any rank.

        Args:
            fingerprint: Everything that the output depends on, as plain values.

        Raises:
            OutputError: The journal is of another run (the message shows what differs), or its
                fingerprint cannot be read.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / _FINGERPRINT
        wanted = json.loads(json.dumps(fingerprint))
        if not path.exists():
            if any(self.directory.glob("*.commit.json")):
                raise self._unreadable(path, "missing, beside committed layers")
            write_json(path, wanted)
            return False
        try:
            found = read_json_file(path)
        except (OSError, ValueError) as problem:
            raise self._unreadable(path, str(problem)) from problem
        if not isinstance(found, dict):
            raise self._unreadable(path, f"a JSON {type(found).__name__}")
        changed = differences(found, wanted)
        if changed:
            raise OutputError(
                f"{self.directory}: an unfinished run with other settings",
                value="; ".join(changed),
                rule="a run goes on only with the source, recipe and settings it started with",
                remedy="restore those settings, choose another output, or remove the directory "
                f"{self.directory.parent}",
            )
        return True

    def write_part(
        self, unit: Unit, part: str, files: Sequence[FileRecord], statistics: Mapping[str, Any]
    ) -> PartRecord:
        """Records a part whose files are durable. Any rank, any order, before `commit`.

        Raises:
            OutputError: The record could not be written.
        """
        record = PartRecord(part, tuple(files), dict(statistics))
        value = {
            "part": part,
            "files": [file.to_json() for file in record.files],
            "statistics": record.statistics,
        }
        write_json(self._part_path(unit, part), value)
        return record

    def commit(self, unit: Unit, parts: Iterable[str]) -> LayerRecord:
        """Declares a unit whole. One rank, after all ranks have written their parts.

        Args:
            unit: The layer or named unit.
            parts: Names of all parts that belong to it.

        Raises:
            OutputError: A part or one of its files is not there.
        """
        names = list(parts)
        digests = {}
        for name in names:
            path = self._part_path(unit, name)
            try:
                digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as problem:
                raise OutputError(
                    str(path),
                    value=problem.strerror,
                    rule="every part of a layer must be recorded before the layer is committed",
                    remedy="all ranks must see the same output directory (a shared file system)",
                ) from problem
        record = self._read(unit, digests)
        fault = "a torn record" if record is None else self._fault(record, checksums=False)
        if record is None or fault:
            raise OutputError(
                f"{self.directory}: {_title(unit)}",
                value=fault,
                rule="every file of a layer must be durable before the layer is committed",
                remedy="all ranks must see the same output directory (a shared file system)",
            )
        write_json(self._commit_path(unit), {"parts": digests})
        return record

    def committed(self, unit: Unit, *, checksums: bool = False) -> LayerRecord | None:
        """The record of a unit that is whole, or None.

        Args:
            unit: The layer or named unit.
            checksums: Whether to read every file again, instead of comparing sizes only.
        """
        try:
            digests = _read_marker(self._commit_path(unit))
        except (OSError, ValueError):
            return None
        record = self._read(unit, digests)
        if record is None or self._fault(record, checksums=checksums):
            return None
        return record

    def discard(self, unit: Unit) -> None:
        """Forgets a unit that is to be done again: marker first, then records.

        Its files stay until they are replaced; `unrecorded_files` names those that are left over.
        """
        self._commit_path(unit).unlink(missing_ok=True)
        for path in self.directory.glob(f"{_key(unit)}.part.*.json"):
            path.unlink(missing_ok=True)

    def unrecorded_files(self, units: Iterable[Unit]) -> list[Path]:
        """Weight files that belong to none of these committed units (left by another layout)."""
        known = set()
        for unit in units:
            record = self.committed(unit)
            known |= {file.name for file in record.files} if record else set()
        return sorted(path for path in self.files.glob("*") if path.name not in known)

    def _read(self, unit: Unit, digests: Mapping[str, str]) -> LayerRecord | None:
        parts = []
        for name, digest in digests.items():
            try:
                data = read_regular(self._part_path(unit, name), MAX_BYTES)
                if hashlib.sha256(data).hexdigest() != digest:
                    return None
                parts.append(_parse_part(data, name))
            except (OSError, ValueError):
                return None
        return LayerRecord(unit, tuple(parts))

    def _fault(self, record: LayerRecord, *, checksums: bool) -> str:
        """What is wrong with the files of a record; empty where nothing is."""
        if self.discards_files:
            return ""
        for file in record.files:
            path = self.files / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                return f"{path} has {size} bytes instead of {file.bytes}"
        if checksums:
            paths = [self.files / file.name for file in record.files]
            found = files_sha256(paths, reading_threads())
            for path, file, sha256 in zip(paths, record.files, found, strict=True):
                if sha256 != file.sha256:
                    return f"{path} has another checksum"
        return ""

    def _part_path(self, unit: Unit, part: str) -> Path:
        return self.directory / f"{_key(unit)}.part.{part}.json"

    def _commit_path(self, unit: Unit) -> Path:
        return self.directory / f"{_key(unit)}.commit.json"

    def _unreadable(self, path: Path, value: str) -> OutputError:
        return OutputError(
            str(path),
            value=f"unreadable ({value})",
            rule="an unfinished run is known by its fingerprint",
            remedy=f"remove the directory {self.directory.parent} to start from the beginning",
        )


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key that differs, as `key: was X, now Y`; nested objects key by key."""
    changed = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key, "absent"), wanted.get(key, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key}: was {old!r}, now {new!r}")
    return changed


def _read_marker(path: Path) -> dict[str, str]:
    """Digests of a unit's records by part; OSError or ValueError where it does not hold them."""
    marker = read_json_file(path)
    digests = marker.get("parts") if isinstance(marker, dict) else None
    if not isinstance(digests, dict) or not all(map(_PART.fullmatch, digests)):
        raise ValueError("no names of parts")
    return {name: str(digest) for name, digest in digests.items()}


def _parse_part(data: bytes, name: str) -> PartRecord:
    """ValueError for what `write_part` did not write."""
    value = parse_json(data)
    if not isinstance(value, dict) or value.get("part") != name:
        raise ValueError(f"not the record of {name}")
    files, statistics = value.get("files"), value.get("statistics")
    if not isinstance(files, list) or not isinstance(statistics, dict):
        raise ValueError(f"{name}: no files, or no statistics")
    return PartRecord(name, tuple(map(FileRecord.from_json, files)), statistics)


def _key(unit: Unit) -> str:
    return f"layer-{unit:05d}" if isinstance(unit, int) else f"unit-{unit}"


def _title(unit: Unit) -> str:
    return f"layer {unit}" if isinstance(unit, int) else unit
