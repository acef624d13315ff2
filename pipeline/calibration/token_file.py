"""Calibration data that is tokenized already: a NumPy file of token ids.

In: a `.npy` file with an integer array [sequences, seq_len]. Out: the first sequences of it. For
reproducing another tool's run on exactly its samples, or a model without a tokenizer. Only its
header is believed, and only after it was compared with the size of the file; of the ids, no more
are read than are asked for, and objects (pickles) are never loaded.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.checkpoint.regular_files import open_regular
from pipeline.errors import DataError

# Longer headers are those of records with thousands of fields.
_MAX_HEADER_CHARACTERS = 4096


class _Header(NamedTuple):
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[np.generic]


def is_token_file(data: str) -> bool:
    """Whether a data source is a file of token ids."""
    return data.endswith(".npy")


def load_token_file(path: str | Path, num_sequences: int, seq_len: int) -> torch.Tensor:
    """The first sequences, int64 [num_sequences, seq_len].

    Raises:
        DataError: Not a readable integer array, or too small.
    """
    try:
        with open(open_regular(Path(path)), "rb") as file:
            header = _read_header(file)
            _check_header(path, header, num_sequences, seq_len)
            ids = _read_ids(file, header, num_sequences, seq_len)
    except (OSError, ValueError) as problem:
        raise DataError(
            str(path),
            value=str(problem)[:300],
            rule="must be a .npy file of token ids",
            remedy="write one with numpy.save(path, ids) from an int64 array [sequences, seq_len]",
        ) from problem
    return torch.from_numpy(ids)


def _read_header(file: BinaryIO) -> _Header:
    """Raises ValueError for whatever NumPy finds in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python 2's headers, and of odd escapes
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read is None:
                raise ValueError(f"version {version[0]}.{version[1]}; 1.0 and 2.0 are known")
            header = _Header(*read(file, max_header_size=_MAX_HEADER_CHARACTERS))
    except (OSError, ValueError):
        raise
    # A header is a Python literal that NumPy lets ast and tokenize take apart: what they raise
    # depends on Python, and is no ValueError where brackets or indents do not match.
    except Exception as problem:
        raise ValueError(f"{type(problem).__name__}: {problem}") from problem
    if not all(type(size) is int and size >= 0 for size in header.shape):
        raise ValueError(f"the shape {header.shape}")
    return header


def _check_header(path: str | Path, header: _Header, num_sequences: int, seq_len: int) -> None:
    shape = header.shape
    if len(shape) != 2 or header.dtype.kind not in "iu":
        if header.dtype.hasobject:
            raise ValueError("objects, which only a pickle holds; pickles are never loaded")
        raise DataError(
            str(path),
            value=f"{header.dtype} {list(shape)}",
            rule="must hold integers [sequences, seq_len]",
            remedy="save the array of token ids itself",
        )
    if shape[0] < num_sequences or shape[1] < seq_len:
        raise DataError(
            str(path),
            value=f"{shape[0]} sequences of {shape[1]} tokens",
            rule=f"{num_sequences} sequences of {seq_len} tokens are needed",
            remedy="use a larger file, or fewer or shorter sequences: calibration.num_sequences, "
            "evaluation.num_sequences (0 leaves the evaluation out), seq_len",
        )


def _read_ids(
    file: BinaryIO, header: _Header, num_sequences: int, seq_len: int
) -> npt.NDArray[np.int64]:
    """Maps the file, and copies what is asked for."""
    start, size = file.tell(), os.fstat(file.fileno()).st_size
    wanted = math.prod(header.shape) * header.dtype.itemsize
    if size - start != wanted:
        raise ValueError(f"{size - start:,} bytes after a header that promises {wanted:,}")
    if not wanted:
        return np.empty((num_sequences, seq_len), dtype=np.int64)
    order = "F" if header.is_fortran else "C"
    mapped = np.memmap(file, header.dtype, "r", start, header.shape, order)  # type: ignore[call-overload]
    return np.array(mapped[:num_sequences, :seq_len], dtype=np.int64, order="C")
