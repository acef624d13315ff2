"""Files of token ids: the first sequences, or a message that says what is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.calibration.token_file import is_token_file, load_token_file
from pipeline.errors import DataError


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path / "ids.npy", array)
    return path / "ids.npy"


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_the_first_sequences_are_taken(tmp_path: Path, dtype: type) -> None:
    ids = np.arange(40).reshape(5, 8).astype(dtype)
    found = load_token_file(save(tmp_path, ids), 3, 6)
    assert found.dtype is torch.int64
    assert found.tolist() == ids[:3, :6].tolist()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 8)), np.zeros(8, np.int64), np.zeros((2, 2, 2), np.int32)]
)
def test_anything_but_a_table_of_integers_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(DataError) as caught:
        load_token_file(save(tmp_path, array), 1, 4)
    assert f"found {array.dtype} {list(array.shape)}; must hold integers" in str(caught.value)


@pytest.mark.parametrize(("sequences", "seq_len"), [(6, 8), (5, 9)])
def test_too_small_a_file_is_refused(tmp_path: Path, sequences: int, seq_len: int) -> None:
    path = save(tmp_path, np.zeros((5, 8), np.int64))
    with pytest.raises(DataError) as caught:
        load_token_file(path, sequences, seq_len)
    assert "found 5 sequences of 8 tokens; " in str(caught.value)
    assert f"{sequences} sequences of {seq_len} tokens are needed" in str(caught.value)
    for option in ("calibration.num_sequences", "evaluation.num_sequences (0 leaves", "seq_len"):
        assert option in str(caught.value), option


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a \.npy file of token ids"):
        load_token_file(tmp_path / "absent.npy", 1, 4)
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(DataError, match=r"must be a \.npy file of token ids"):
        load_token_file(tmp_path / "text.npy", 1, 4)
    objects = save(tmp_path, np.array([[1, None]], dtype=object))
    with pytest.raises(DataError, match=r"must be a \.npy file of token ids"):
        load_token_file(objects, 1, 2)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"must be a \.npy file of token ids"):
        load_token_file(tmp_path / "empty.npy", 1, 4)


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", ids=np.zeros((5, 8), np.int64))
    path = (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    with pytest.raises(DataError):
        load_token_file(path, 1, 4)


def test_only_npy_is_a_token_file() -> None:
    assert is_token_file("/data/ids.npy")
    assert not is_token_file("/data/ids.jsonl")
    assert not is_token_file("demo")
