"""Checksums that came with a source: where they are found, and what is compared with them."""

import hashlib
from pathlib import Path

import pytest

from pipeline.checkpoint.given_checksums import find_changed, find_checksums, share_of
from pipeline.errors import SourceError

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"bb").hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, data in zip(paths, (b"a", b"bb"), strict=True):
        path.write_bytes(data)
    return paths


@pytest.mark.parametrize(
    "lists",
    [
        {"SHA256SUMS": f"{A}  a.safetensors\n{B} *b.safetensors\n"},
        {"SHA256SUMS": f"# made by hand\n\n{A.upper()}  ./a.safetensors\r\n{B}  b.safetensors"},
        {"a.safetensors.sha256": A, "b.safetensors.sha256": f"{B}  b.safetensors\n"},
        {"all.sha256": f"{A}  a.safetensors\n{B}  b.safetensors\n{A}  other.bin\n"},
    ],
)
def test_lists_of_sha256sum(tmp_path: Path, files: list[Path], lists: dict[str, str]) -> None:
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    assert find_checksums(tmp_path, files) == dict(zip(files, (A, B), strict=True))


def test_blobs_of_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    files = []
    for name, blob in (("a.safetensors", A), ("small.json", "f" * 40)):
        (tmp_path / "blobs" / blob).write_bytes(b"a")
        files.append(tmp_path / "snapshot" / name)
        files[-1].symlink_to(tmp_path / "blobs" / blob)
    assert find_checksums(tmp_path / "snapshot", files) == {files[0]: A}


@pytest.mark.parametrize(
    "text", [f"{A}", "x  a.safetensors", f"{A[:-1]}  a.safetensors", f"{A} a.safetensors", "\0"]
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, files: list[Path], text: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{B}  b.safetensors\n{text}\n")
    if text == A:  # a digest alone is that of the file SHA256SUMS, which is no weight file
        assert find_checksums(tmp_path, files) == {files[1]: B}
        return
    with pytest.raises(SourceError, match=r"SHA256SUMS: found .*as sha256sum writes them"):
        find_checksums(tmp_path, files)


def test_lists_that_contradict_each_other_or_are_not_text(
    tmp_path: Path, files: list[Path]
) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{A}  a.safetensors\n")
    (tmp_path / "x.sha256").write_text(f"{B}  a.safetensors\n")
    with pytest.raises(SourceError, match=r"x\.sha256: found another SHA-256 of a\.safetensors"):
        find_checksums(tmp_path, files)
    (tmp_path / "x.sha256").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"x\.sha256"):
        find_checksums(tmp_path, files)


def test_changed_and_missing_files_are_named(tmp_path: Path, files: list[Path]) -> None:
    read: list[int] = []
    assert find_changed({files[0]: A, files[1]: B}, 2, read.append) == []
    assert sum(read) == 3
    gone = tmp_path / "gone"
    assert find_changed({files[0]: B, gone: A}, 2) == [
        f"{files[0]}: SHA-256 {A} instead of {B}",
        f"{gone}: No such file or directory",
    ]


def test_ranks_share_the_files_by_size(tmp_path: Path) -> None:
    checksums = {}
    for number, size in enumerate((50, 10, 40, 30, 20)):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes(size))
        checksums[path] = A
    shares = [share_of(checksums, rank, 3) for rank in range(3)]
    assert sorted(path.name for share in shares for path in share) == list("01234")
    assert [sum(path.stat().st_size for path in share) for share in shares] == [50, 50, 50]
    assert share_of({}, 1, 2) == {}
