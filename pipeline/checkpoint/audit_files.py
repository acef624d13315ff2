"""The audit's first step: files, headers and index of a finished directory.

In: a directory. Out: the place of every tensor, and what is wrong with the files: missing or
foreign ones, corrupt headers, tensors that are there twice, an index that disagrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.durable import files_sha256
from pipeline.checkpoint.safetensors_file import TensorInfo, read_header
from pipeline.checkpoint.source import INDEX_NAME
from pipeline.checkpoint.strict_json import read_json_file
from pipeline.errors import AuditError

_FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".tmp")


@dataclasses.dataclass(frozen=True)
class FileTable:
    """The files of a directory.

    Attributes:
        tensors: Every tensor by name.
        files: Names of the weight files.
        file_bytes: Size of all weight files.
        tensor_bytes: Size of all tensors (`metadata.total_size` of the index).
    """

    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]
    file_bytes: int
    tensor_bytes: int


def read_files(directory: Path) -> tuple[FileTable, list[str], list[str]]:
    """Reads all headers.

    Returns:
        The table, problems of the files, problems of the index.
    """
    problems: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        problems.append("no .safetensors file")
    for path in paths:
        try:
            header = read_header(path, AuditError)
        except AuditError as problem:
            problems.append(str(problem))
            continue
        for name, info in header.items():
            if name in tensors:
                problems.append(f"{name} is in {tensors[name].path.name} and in {path.name}")
            tensors[name] = info
    foreign = [path.name for path in directory.iterdir() if path.name.endswith(_FOREIGN_SUFFIXES)]
    problems += [f"{name} does not belong here" for name in sorted(foreign)]
    table = FileTable(
        tensors=tensors,
        files=tuple(path.name for path in paths),
        file_bytes=sum(path.stat().st_size for path in paths),
        tensor_bytes=sum(info.nbytes for info in tensors.values()),
    )
    return table, problems, _check_index(directory, table)


def read_object(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, or an empty one and what is wrong."""
    try:
        value = read_json_file(path, allow_nan=True)
    except OSError as problem:
        return {}, [f"{path.name}: {problem.strerror}"]
    except ValueError as problem:
        return {}, [f"{path.name}: invalid JSON ({problem})"]
    if not isinstance(value, dict):
        return {}, [f"{path.name}: not a JSON object"]
    return value, []


def check_checksums(
    directory: Path, files: tuple[str, ...], checksums: Mapping[str, str], workers: int
) -> list[str]:
    """Compares SHA-256 of the weight files; each must be among `checksums`, and the reverse."""
    problems = [f"{name}: no checksum is known" for name in files if name not in checksums]
    problems += [f"{name}: missing" for name in checksums if name not in files]
    known = [name for name in files if name in checksums]
    digests = files_sha256([directory / name for name in known], workers)
    for name, digest in zip(known, digests, strict=True):
        if digest != checksums[name]:
            problems.append(f"{name}: SHA-256 {digest} instead of {checksums[name]}")
    return problems


def _check_index(directory: Path, table: FileTable) -> list[str]:
    path = directory / INDEX_NAME
    if not path.exists():
        if table.files in ((), ("model.safetensors",)):
            return []
        return [f"{INDEX_NAME} is missing, and the weights are not one model.safetensors"]
    index, problems = read_object(path)
    if problems:
        return problems
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        return [f"{INDEX_NAME}: no weight_map"]
    for file in sorted({str(file) for file in weight_map.values()} - set(table.files)):
        problems.append(f"{INDEX_NAME} names {file}, which does not exist")
    for file in sorted(set(table.files) - set(weight_map.values())):
        problems.append(f"{file} is not in the index")
    for name, file in weight_map.items():
        info = table.tensors.get(name)
        if info is None:
            problems.append(f"{INDEX_NAME} names {name}, which is in no file")
        elif info.path.name != file:
            problems.append(f"{name} is in {info.path.name}; the index says {file}")
    for name in table.tensors:
        if name not in weight_map:
            problems.append(f"{name} is not in the index")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total != table.tensor_bytes:
        problems.append(f"metadata.total_size is {total}; the tensors have {table.tensor_bytes}")
    return problems
