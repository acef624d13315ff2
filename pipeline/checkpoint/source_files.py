"""The files of a checkpoint directory: weights, index, config.json.

In: a directory. Out: the place of every tensor, checked against the index; parsed JSON. Of weights,
only headers are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.safetensors_file import TensorInfo, name_fault, read_header
from pipeline.checkpoint.strict_json import read_json_file, shown
from pipeline.errors import SourceError

INDEX_NAME = "model.safetensors.index.json"

# Nemotron 3 Ultra has 50,000, quantized 200,000.
MAX_TENSORS = 1_000_000
# Of 255: files are written under longer names first (`durable.temporary_of`).
MAX_FILE_NAME_BYTES = 200


def read_json(path: Path, rule: str, *, allow_nan: bool = True) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        path: The file.
        rule: What it is for.
        allow_nan: Accept NaN and Infinity, which NVIDIA's config.json holds.

    Raises:
        SourceError: Missing, unreadable, or not a JSON object.
    """
    try:
        value = read_json_file(path, allow_nan=allow_nan)
    except OSError as problem:
        raise SourceError(
            str(path),
            value=problem.strerror,
            rule=rule,
            remedy=f"fetch the file again, or check that {path.parent} is the directory you mean",
        ) from problem
    except ValueError as problem:
        raise SourceError(
            str(path), value=f"invalid JSON ({problem})", rule=rule, remedy="fetch the file again"
        ) from problem
    if not isinstance(value, dict):
        raise SourceError(
            str(path),
            value=type(value).__name__,
            rule="must be a JSON object",
            remedy="fetch the file again",
        )
    return value


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of all safetensors files of a directory, checked against its index.

    Raises:
        SourceError: A file is missing or corrupt, a tensor is in two files, or the index and
            the headers disagree.
    """
    index = directory / INDEX_NAME
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    weight_map: dict[str, str] | None = None
    if os.path.lexists(index):
        weight_map = read_weight_map(index)
        absent = sorted(set(weight_map.values()) - set(files))
        if absent:
            raise SourceError(
                str(index),
                value=f"{len(absent)} files that do not exist: {first_five(absent)}",
                rule="every file of the index must be in the directory",
                remedy="fetch the missing files",
            )
        files = sorted(set(weight_map.values()))
    if not files:
        raise SourceError(
            str(directory),
            value="no .safetensors file",
            rule="the weights must be safetensors (model.safetensors, or shards with an index)",
            remedy="convert .bin or .pt weights with transformers' save_pretrained first",
        )
    _check_weight_files(directory, files)
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for info in read_header(directory / name).values():
            if info.name in tensors:
                raise SourceError(
                    info.name,
                    value=f"in {tensors[info.name].path} and in {info.path}",
                    rule="a tensor must be in one file",
                    remedy="remove the file that does not belong to this checkpoint",
                )
            tensors[info.name] = info
        if len(tensors) > MAX_TENSORS:
            raise SourceError(
                str(directory),
                value=f"more than {MAX_TENSORS:,} tensors",
                rule="no model has as many",
                remedy="remove the files that do not belong to this checkpoint",
            )
    if weight_map is not None:
        _check_index(index, weight_map, tensors)
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """File names by tensor, from an index.

    Raises:
        SourceError: No such thing, or names that are not of files in its directory.
    """
    weight_map = read_json(index, "an index must be readable", allow_nan=False).get("weight_map")
    fault = "no weight_map" if not isinstance(weight_map, dict) else ""
    for name, file in (weight_map if isinstance(weight_map, dict) else {}).items():
        if name_fault(name) or not isinstance(file, str) or not is_weight_file(file):
            fault = fault or f"{shown(name)} in {shown(file)}"
    if fault:
        raise SourceError(
            str(index),
            value=f"no usable weight_map ({fault})",
            rule="an index maps tensor names to .safetensors files of its own directory",
            remedy="fetch the index again, or remove it: shards are also read without one",
        )
    assert isinstance(weight_map, dict)
    return dict(weight_map)


def is_weight_file(name: str) -> bool:
    """Whether this can be the name of a weight file: one of a directory, and a name to print."""
    is_plain = "/" not in name and len(os.fsencode(name)) <= MAX_FILE_NAME_BYTES
    return is_plain and name.endswith(".safetensors") and not name_fault(name)


def first_five(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


def _check_weight_files(directory: Path, files: list[str]) -> None:
    wrong = [ascii(name) for name in files if not is_weight_file(name)]
    if wrong:
        raise SourceError(
            str(directory),
            value=f"{len(wrong)} weight files with such names: {first_five(wrong)}",
            rule="a file name is at most "
            f"{MAX_FILE_NAME_BYTES} bytes of UTF-8, printable, without a backslash",
            remedy="fetch the checkpoint again, or remove what does not belong to it",
        )


def _check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    wrong = [
        f"{name} in {file}"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].path.name != file
    ]
    if wrong:
        raise SourceError(
            str(index),
            value=f"{len(wrong)} tensors that their files lack: {first_five(wrong)}",
            rule="every tensor of the index must be in the file that the index names",
            remedy="fetch the files and the index again; they belong to different versions",
        )
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        raise SourceError(
            str(index),
            value=f"{len(extra)} tensors that the index lacks: {first_five(extra)}",
            rule="every tensor of the files must be in the index",
            remedy="fetch the files and the index again; they belong to different versions",
        )
