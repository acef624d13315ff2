from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.passthrough import CheckedCopy, take_copy
from pipeline.checkpoint.safetensors_file import as_bytes, read_header
from pipeline.checkpoint.source import open_source
from pipeline.checkpoint.writer import RawTensor, write_safetensors
from pipeline.errors import NumericsError, SourceError
from tests.unit.checkpoint.tiny import write_source

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_bytes_dtype_and_shape_are_the_sources(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "extremes": torch.tensor([torch.finfo(torch.bfloat16).max, -0.0, 1e-40]).bfloat16(),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }
    source = open_source(write_source(tmp_path / "source", {}, tensors))
    copies = {name: take_copy(source, name, 0) for name in tensors}
    assert (copies["bf16"].dtype, copies["bf16"].shape, copies["bf16"].nbytes) == (
        "BF16",
        (3, 4),
        24,
    )
    write_safetensors(tmp_path / "x.safetensors", copies)
    infos = read_header(tmp_path / "x.safetensors")
    for name in tensors:
        assert b"".join(infos[name].chunks()) == bytes(as_bytes(source.read(name))), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_wherever_they_stand(dtype: torch.dtype, value: float) -> None:
    for place in (0, 17, 99):
        tensor = torch.randn(100).to(dtype)
        tensor[place] = value
        data = memoryview(tensor.view(torch.uint8).numpy())
        name = {2: "F16", 4: "F32", 8: "F64"}[dtype.itemsize]
        raw = RawTensor("BF16" if dtype is torch.bfloat16 else name, (100,), data)
        with pytest.raises(NumericsError, match=r"norm \(rank 3\): found NaN or Inf"):
            list(CheckedCopy("norm", raw, 3).chunks())


def test_a_refused_copy_leaves_no_file(tmp_path: Path) -> None:
    source = open_source(write_source(tmp_path / "source", {}, {"a": torch.tensor([float("nan")])}))
    (tmp_path / "out").mkdir()
    with pytest.raises(NumericsError, match="a "):
        write_safetensors(tmp_path / "out" / "x.safetensors", {"a": take_copy(source, "a", 0)})
    assert list((tmp_path / "out").iterdir()) == []


def test_unknown_tensor(tmp_path: Path) -> None:
    source = open_source(write_source(tmp_path / "source", {}, {"a": torch.zeros(1)}))
    with pytest.raises(SourceError, match="b: found no such tensor"):
        take_copy(source, "b", 0)
