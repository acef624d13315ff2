import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.checkpoint import durable, writer
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.checkpoint.writer import FileRecord, RawTensor, write_safetensors
from pipeline.errors import OutputError


def samples() -> dict[str, torch.Tensor]:
    every_byte = torch.arange(256, dtype=torch.uint8)
    return {
        "codes": every_byte.reshape(16, 16),
        "scales": every_byte.view(torch.float8_e4m3fn).reshape(4, 64),
        "scalar": torch.tensor(1.5),
        "bf16": torch.randn(3, 5).bfloat16(),
        "cut": torch.randn(6, 4)[::2, 1:],
        "empty": torch.empty(0, 3),
    }


def test_the_reference_implementation_reads_every_byte_back(tmp_path: Path) -> None:
    tensors = samples()
    record = write_safetensors(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            assert stored.dtype == tensor.dtype
            assert stored.shape == tensor.shape
            one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (stored, tensor))
            assert torch.equal(one, other), name
    data = (tmp_path / "x.safetensors").read_bytes()
    assert record.bytes == len(data)
    assert (
        record.sha256
        == hashlib.sha256(data).hexdigest()
        == writer.file_sha256(tmp_path / "x.safetensors")
    )
    assert record.tensors["scales"] == ("F8_E4M3", (4, 64))
    assert FileRecord.from_json(record.to_json()) == record


def test_buffers_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(3), "c": torch.zeros(())}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    for info in read_header(tmp_path / "x.safetensors").values():
        assert info.start % {"U8": 1, "F32": 4}[info.dtype] == 0


def test_copies_from_raw_bytes_and_from_another_file(tmp_path: Path) -> None:
    tensors = samples()
    write_safetensors(tmp_path / "a.safetensors", tensors)
    infos = read_header(tmp_path / "a.safetensors")
    raw = RawTensor("BF16", (2, 2), b"01234567")
    write_safetensors(tmp_path / "b.safetensors", {**infos, "raw": raw})
    copied = read_header(tmp_path / "b.safetensors")
    one, other = (tmp_path / f"{letter}.safetensors" for letter in "ab")
    for name, info in infos.items():
        there = copied[name]
        assert (
            one.read_bytes()[info.start : info.stop] == other.read_bytes()[there.start : there.stop]
        )
    assert other.read_bytes()[copied["raw"].start : copied["raw"].stop] == b"01234567"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "write", full)
    with pytest.raises(
        OutputError, match=r"x.safetensors: found writing weights failed: No space.*GB free"
    ):
        write_safetensors(tmp_path / "x.safetensors", samples())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    writer.write_json(path, {"a": 1})

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable.os, "fsync", broken)
    with pytest.raises(OutputError, match="Input/output error"):
        writer.write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert '"a": 1' in path.read_text()


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory"):
        write_safetensors(tmp_path / "no" / "x.safetensors", samples())
