import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.safetensors_file import iterate_chunks, read_header
from pipeline.errors import SourceError


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_header_of_the_reference_implementation(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in infos.items()} == {
        "a": ("I64", (2, 3)),
        "b": ("BF16", ()),
    }
    assert b"".join(iterate_chunks(infos["a"])) == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4, [4])}, b"abc", r"a: found a file of \d+ bytes; the tensor ends at"),
        ({"a": entry(0, 4, [4])}, b"abcdef", "its header describes"),
        ({"a": entry(0, 4, [5])}, b"abcd", r"4 bytes; U8 \[5\] takes 5"),
        ({"a": entry(0, 4, [2], "F32")}, b"abcd", r"4 bytes; F32 \[2\] takes 8"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"abcdef", "b: found an overlap"),
        ({"a": entry(0, 2, [2]), "b": entry(4, 6, [2])}, b"abcdef", "b: found a hole"),
        ({"a": entry(0, 4, [4], "F4")}, b"abcd", "dtype F4"),
        ({"a": {"dtype": "U8"}}, b"", "a header that does not parse"),
        ({"a": entry(0, -1, [1])}, b"", "a header that does not parse"),
        (b"{nonsense", b"", "a header that does not parse"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
            "'a' appears twice",
        ),
    ],
)
def test_refuses_a_header_that_lies(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(SourceError, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in str(caught.value)


def test_refuses_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(SourceError, match="10 bytes with a header of 1000 bytes"):
        read_header(path)
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="0 bytes"):
        read_header(path)
