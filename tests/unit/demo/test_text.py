"""The demo's text: three disjoint parts that never depend on anything but the path."""

import json
from pathlib import Path

import pytest

from pipeline.demo.text import Split, list_files, read_documents, split_of, write_jsonl
from pipeline.errors import DataError


def test_parts_are_disjoint_and_the_same_every_time() -> None:
    listed = {split: list_files(split) for split in Split}
    assert listed == {split: sorted(list_files(split)) for split in Split}
    parts = {split: set(paths) for split, paths in listed.items()}
    assert not parts[Split.train] & parts[Split.calibration]
    assert not parts[Split.train] & parts[Split.evaluation]
    assert not parts[Split.calibration] & parts[Split.evaluation]
    assert all(len(part) >= 10 for part in parts.values())


def test_a_file_stays_in_its_part() -> None:
    """Fixed values: another split would put trained-on files among the held-out ones."""
    paths = ("argparse.py", "ast.py", "json/decoder.py", "typing.py", "asyncio/locks.py")
    parts = [split_of(path).value for path in paths]
    assert parts == ["train", "train", "train", "calibration", "evaluation"]


def test_tests_and_tables_are_left_out(tmp_path: Path) -> None:
    source = "x = 1\n" * 100
    for name in ("a.py", "test/b.py", "encodings/c.py", "pkg/tests/d.py", "_sysconfigdata_x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "short.py").write_text("x\n")
    found = [path for split in Split for path in list_files(split, tmp_path)]
    assert found == [tmp_path / "a.py"]


def test_files_that_are_not_utf8_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 200)
    assert not [document for split in Split for document in read_documents(split, tmp_path)]


def test_a_directory_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"standard library's source: found .*use an interpreter"):
        list_files(Split.train, tmp_path)


def test_jsonl_holds_the_part(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "calibration.jsonl"
    size = write_jsonl(Split.calibration, destination)
    records = [json.loads(line) for line in destination.read_text().splitlines()]
    documents = read_documents(Split.calibration)
    assert [record["text"] for record in records] == [document.text for document in documents]
    assert size == sum(len(document.text.encode()) for document in documents) > 200_000
