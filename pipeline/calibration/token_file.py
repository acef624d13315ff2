"""Calibration data that is tokenized already: a NumPy file of token ids.

In: a `.npy` file with an integer array [sequences, seq_len]. Out: the first sequences of it. For
reproducing another tool's run on exactly its samples, or a model without a tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.errors import DataError


def is_token_file(data: str) -> bool:
    """Whether a data source is a file of token ids."""
    return data.endswith(".npy")


def load_token_file(path: str | Path, num_sequences: int, seq_len: int) -> torch.Tensor:
    """The first sequences, int64 [num_sequences, seq_len].

    Raises:
        DataError: Not a readable integer array, or too small.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as problem:
        raise DataError(
            str(path),
            value=str(problem),
            rule="must be a .npy file of token ids",
            remedy="write one with numpy.save(path, ids) from an int64 array [sequences, seq_len]",
        ) from problem
    if not isinstance(ids, np.ndarray):
        raise DataError(
            str(path),
            value="an archive of arrays (.npz)",
            rule="must hold one array of token ids",
            remedy="save the array of token ids itself",
        )
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(
            str(path),
            value=f"{ids.dtype} {list(ids.shape)}",
            rule="must hold integers [sequences, seq_len]",
            remedy="save the array of token ids itself",
        )
    if ids.shape[0] < num_sequences or ids.shape[1] < seq_len:
        raise DataError(
            str(path),
            value=f"{ids.shape[0]} sequences of {ids.shape[1]} tokens",
            rule=f"{num_sequences} sequences of {seq_len} tokens are needed",
            remedy="use a larger file, or fewer or shorter sequences: calibration.num_sequences, "
            "evaluation.num_sequences (0 leaves the evaluation out), seq_len",
        )
    return torch.from_numpy(ids[:num_sequences, :seq_len].astype(np.int64))
