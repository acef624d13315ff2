"""launch.verify: statuses, checksums, and a verdict in words or JSON."""

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.architecture import Architecture
from pipeline.checkpoint.source import open_source
from pipeline.config import PlanOutput, VerifyConfig
from pipeline.errors import ConfigError, LayersweepError, SourceError
from pipeline.verify import CHECKSUMS, read_checksums, verify
from tests.unit.checkpoint.tiny import (
    export,
    mixed_formats,
    rewrite,
    tiny_config,
    tiny_tensors,
    write_source,
)


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """A source and its export."""
    config = tiny_config()
    source = write_source(tmp_path / "source", config, tiny_tensors(config))
    formats = mixed_formats(Architecture.from_hf_config(config))
    return source, export(open_source(str(source)), tmp_path / "out", formats)


def write_checksums(directory: Path) -> Path:
    path = directory / CHECKSUMS
    path.parent.mkdir(exist_ok=True)
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(directory.glob("*.safetensors"))
    )
    path.write_text("".join(lines))
    return path


def test_a_good_directory_passes(
    directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = directories
    write_checksums(out)
    assert verify(VerifyConfig(directory=str(out), source=str(source))) == 0
    text = capsys.readouterr().out
    assert "audit passed: " in text
    assert "FAILED" not in text
    assert text.count("\nerror    ") == 5


def test_a_tensor_that_differs_from_its_source_fails(
    directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = directories
    rewrite(out, lambda tensors: tensors["backbone.layers.0.norm.weight"].add_(1))
    assert verify(VerifyConfig(directory=str(out))) == 0, "structure alone is sound"
    capsys.readouterr()
    assert verify(VerifyConfig(directory=str(out), source=str(source))) == 1
    text = capsys.readouterr().out
    assert "backbone.layers.0.norm.weight" in text
    assert "audit FAILED: 1 problem:" in text
    assert "checksums: not checked (no SHA256SUMS)" in text


def test_a_file_that_changed_under_its_checksum_fails(
    directories: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = directories
    write_checksums(out)
    config = VerifyConfig(directory=str(out), output=PlanOutput.json)
    assert verify(config) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    rewrite(out, lambda tensors: tensors["backbone.layers.0.norm.weight"].add_(1))
    assert verify(config) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is False
    assert values["directory"] == str(out)
    assert len(values["problems"]) == 1


def test_missing_directories_are_refused(tmp_path: Path, directories: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="must be an existing checkpoint directory"):
        verify(VerifyConfig(directory=str(tmp_path / "absent")))
    with pytest.raises(SourceError):
        verify(VerifyConfig(directory=str(directories[1]), source=str(tmp_path / "absent")))


def test_an_empty_directory_fails_without_a_traceback(tmp_path: Path) -> None:
    assert verify(VerifyConfig(directory=str(tmp_path))) == 1


def test_checksum_files_are_read_as_sha256sum_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "SHA256SUMS"
    assert read_checksums(path) is None
    path.write_text("ab12  model-00001.safetensors\ncd34 *with space.safetensors\n")
    found = read_checksums(path)
    assert found is not None
    assert found["model-00001.safetensors"] == "ab12"
    assert list(found.values()) == ["ab12", "cd34"]


@pytest.mark.parametrize("text", ["ab12\n", "ab12  a.safetensors\n\n", "ab12  \u00e4\n"])
def test_a_torn_checksum_file_is_no_unexpected_fault(
    directories: tuple[Path, Path], text: str
) -> None:
    _, out = directories
    write_checksums(out).write_text(text, encoding="utf-8")
    try:
        status = verify(VerifyConfig(directory=str(out)))
    except LayersweepError:
        return
    assert status == 1
