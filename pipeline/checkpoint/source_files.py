"""The files of a checkpoint directory: weights, index, and what goes along with them.

In: a directory. Out: the place of every tensor, checked against the index; the small files; parsed
JSON. Only headers are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.safetensors_file import TensorInfo, read_header
from pipeline.errors import SourceError

INDEX_NAME = "model.safetensors.index.json"

# Written anew for the output, so never copied.
_REPLACED = {"config.json", "hf_quant_config.json", INDEX_NAME}
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
)
# `layersweep` holds the reports of a published checkpoint.
_SKIPPED_DIRECTORIES = {".git", ".cache", "__pycache__", "layersweep"}


def read_json(path: Path, rule: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        SourceError: Missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    if index.is_file():
        weight_map = _read_weight_map(index)
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
    if weight_map is not None:
        _check_index(index, weight_map, tensors)
    return tensors


def find_small_files(directory: Path) -> dict[str, Path]:
    """Relative to absolute path of every file that is neither weights nor written anew.

    Links are followed (the Hub cache is made of them), but no directory is entered twice.

    Raises:
        SourceError: Something that is no readable regular file.
    """
    found: dict[str, Path] = {}
    entered: set[str] = set()
    for root, directories, names in os.walk(directory, followlinks=True):
        if os.path.realpath(root) in entered:
            directories.clear()
            continue
        entered.add(os.path.realpath(root))
        directories[:] = sorted(
            name
            for name in set(directories) - _SKIPPED_DIRECTORIES
            if not name.endswith(_WEIGHT_SUFFIXES)
        )
        for name in sorted(names):
            path = Path(root) / name
            relative = path.relative_to(directory).as_posix()
            if relative not in _REPLACED and not name.endswith(_WEIGHT_SUFFIXES):
                if not path.is_file() or not os.access(path, os.R_OK):
                    raise SourceError(
                        str(path),
                        value="a broken link" if path.is_symlink() else "no readable regular file",
                        rule="every small file is copied along",
                        remedy="fetch it again, or remove it",
                    )
                found[relative] = path
    return found


def first_five(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, "an index must be readable").get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise SourceError(
            str(index),
            value="no usable weight_map",
            rule="an index maps tensor names to file names of its own directory",
            remedy="fetch the index again, or remove it: shards are also read without one",
        )
    return dict(weight_map)


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
