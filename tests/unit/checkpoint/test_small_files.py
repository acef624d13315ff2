"""Small files of a source: what is copied along, and what cannot be."""

import os
from pathlib import Path

import pytest

from pipeline.checkpoint import small_files
from pipeline.checkpoint.small_files import find_small_files
from pipeline.errors import SourceError


def test_a_link_to_the_directory_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "up").symlink_to("..")
    assert list(find_small_files(tmp_path)) == ["tokenizer.json"]


def test_weights_leftovers_reports_and_checksums_are_not_copied(tmp_path: Path) -> None:
    names = ("notes.tmp", "foo.bin/part", "layersweep/run.json", "model.safetensors", "SHA256SUMS")
    for name in (*names, "model.safetensors.sha256"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_small_files(tmp_path) == {}


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"README\.md: found a broken link.*remove it"):
        find_small_files(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / kind)
    else:
        (tmp_path / kind).symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=f"{kind}: found no readable regular file"):
        find_small_files(tmp_path)


def test_a_link_to_everything_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "many").mkdir()
    for number in range(30):
        (tmp_path / "many" / f"{number}").write_text("x")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "all").symlink_to("../many")
    monkeypatch.setattr(small_files, "MAX_ENTRIES", 31)
    assert len(find_small_files(checkpoint)) == 30
    monkeypatch.setattr(small_files, "MAX_ENTRIES", 30)
    with pytest.raises(SourceError, match="found more than 30 files and directories"):
        find_small_files(checkpoint)


def test_a_link_to_the_root_of_the_machine_is_refused_soon(tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to("/")
    with pytest.raises(SourceError):
        find_small_files(tmp_path)


def test_the_size_of_all_is_bounded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(small_files.MAX_BYTES // 2 + 1)
    with pytest.raises(SourceError, match="found more than 2 GiB"):
        find_small_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a\nb", r"a\\nb: found the name 'a\\nb' with a character that cannot be printed"),
        ("\udcff", "cannot be printed"),
        ("a\\b", "with a backslash"),
        ("x" * 201, "a name of more than 200 bytes"),
        ("layersweep", "where the reports of the new checkpoint will lie"),
        ("/".join("d" * 18) + "/file", "a path of more than 16 directories"),
        ("a\nb/file", "cannot be printed"),
    ],
)
def test_names_under_which_nothing_is_copied(tmp_path: Path, name: str, found: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    with pytest.raises(SourceError, match=found):
        find_small_files(tmp_path)
