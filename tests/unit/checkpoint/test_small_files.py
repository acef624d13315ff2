"""Small files of a source: what is copied along, and what cannot be."""

import os
from pathlib import Path

import pytest

from pipeline.checkpoint.source_files import find_small_files
from pipeline.errors import SourceError


def test_a_link_to_the_directory_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "self").symlink_to(".")
    assert list(find_small_files(tmp_path)) == ["tokenizer.json"]


def test_weights_leftovers_and_reports_are_not_copied(tmp_path: Path) -> None:
    for name in ("notes.tmp", "foo.bin/part", "layersweep/run.json", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_small_files(tmp_path) == {}


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"README\.md: found a broken link.*remove it"):
        find_small_files(tmp_path)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="pipe: found no readable regular file"):
        find_small_files(tmp_path)
