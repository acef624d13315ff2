"""Where a run writes: through no link, and with the rights that the user's umask leaves."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.durable import copy_file, create, open_to_append, write_bytes
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import WorkDirectory, check_output, prepare
from pipeline.checkpoint.rehearsal import check_rehearsal, mark_rehearsal
from pipeline.checkpoint.source import open_source
from pipeline.checkpoint.writable import FileRecord
from pipeline.errors import OutputError, SourceError
from pipeline.report.metrics import MetricsWriter
from tests.unit.checkpoint.tiny import (
    Architecture,
    export,
    mixed_formats,
    tiny_config,
    tiny_tensors,
    write_source,
)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory with a file, which must stay as they are."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    (path / "file").write_text("precious")
    yield path
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [("file", "precious")]


ENTRIES = ("checkpoint", "journal", "state", "snapshots", "attempts.jsonl", "metrics.jsonl", "lock")


@pytest.mark.parametrize("name", ["", *ENTRIES])
def test_planted_links_are_refused_before_anything_is_written(
    tmp_path: Path, elsewhere: Path, name: str
) -> None:
    root = tmp_path / "out.partial"
    if name:
        root.mkdir()
        (root / "journal").mkdir()
        (root / "journal" / "fingerprint.json").write_text("{}")
        if name == "journal":
            (root / "journal").rename(root / "other")
    target = elsewhere / "file" if "." in name or name == "lock" else elsewhere
    (root / name if name else root).symlink_to(target)
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "out")
    assert f"found a symbolic link to {target}" in str(caught.value)
    assert "remove the link, or choose another output" in str(caught.value)


@pytest.mark.parametrize("inside", ["journal/x.json", "checkpoint/sub/file", "state/rank-0.json"])
def test_links_deep_inside_are_refused_when_the_run_goes_on(
    tmp_path: Path, elsewhere: Path, inside: str
) -> None:
    work = check_output(tmp_path / "out")
    prepare(work)
    link = work.root / inside
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere / "file")
    with pytest.raises(OutputError, match=f"{inside}: found a symbolic link"):
        prepare(check_output(tmp_path / "out"))


def test_links_planted_during_a_run_are_replaced_or_refused(
    tmp_path: Path, elsewhere: Path
) -> None:
    target = tmp_path / "planted"

    def plant(path: Path) -> Path:
        path.unlink(missing_ok=True)
        path.symlink_to(elsewhere / "file")
        return path

    write_bytes(plant(target), b"ours")
    assert not target.is_symlink()
    plant(target.with_name(f".{target.name}.{os.getpid()}.tmp"))
    write_bytes(target, b"again")
    assert target.read_bytes() == b"again"
    os.close(create(plant(target)))
    assert not target.is_symlink()
    for opening in (open_to_append, MetricsWriter):
        with pytest.raises(OSError, match="symbolic links"):
            opening(plant(target))


def test_the_lock_is_no_link(tmp_path: Path, elsewhere: Path) -> None:
    work = WorkDirectory.beside(tmp_path / "out")
    work.root.mkdir()
    (work.root / "lock").symlink_to(elsewhere / "new")
    with pytest.raises(OSError, match="symbolic links"):
        WorkLock(work)


def test_a_rehearsals_directory_is_no_link_and_holds_none(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "report").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="report: found a symbolic link"):
        check_rehearsal(tmp_path / "report")
    work = check_rehearsal(tmp_path / "other")
    prepare(work)
    mark_rehearsal(work)
    (work.final / "config.yaml").symlink_to(elsewhere / "file")
    with pytest.raises(OutputError, match=r"config\.yaml: found a symbolic link"):
        check_rehearsal(tmp_path / "other")


def test_directories_above_the_output_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    work = check_output(tmp_path / "home" / "out")
    prepare(work)
    assert (tmp_path / "disk" / "out.partial" / "checkpoint").is_dir()


@pytest.mark.parametrize(
    "renames",
    [
        {"../victim": "a.safetensors"},
        {"a.safetensors": "../victim"},
        {"a.safetensors": "/etc/hostname"},
        {"a.safetensors": "b.safetensors", "c.safetensors": "b.safetensors"},
        {"a.safetensors": 7},
        ["a.safetensors"],
    ],
)
def test_renames_stay_in_their_directory(tmp_path: Path, renames: object) -> None:
    work = check_output(tmp_path / "out")
    prepare(work)
    (work.root / "victim").write_text("precious")
    (work.files / "a.safetensors").write_text("weights")
    (work.journal / "renames.json").write_text(json.dumps(renames))
    with pytest.raises(OutputError, match=r"renames\.json: found unreadable"):
        prepare(work)
    assert (work.root / "victim").read_text() == "precious"
    assert (work.files / "a.safetensors").read_text() == "weights"


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part["files"][0].update(name="../a.safetensors"),
        lambda part: part["files"][0].update(name="/etc/x.safetensors"),
        lambda part: part["files"][0].update(bytes=True),
        lambda part: part["files"][0].update(bytes=1e400),
        lambda part: part["files"][0].update(sha256="0"),
        lambda part: part["files"][0].update(tensors={"t": ["F4", [1]]}),
        lambda part: part["files"][0].update(tensors={"t": ["F32", [-1]]}),
        lambda part: part.update(statistics=[]),
        lambda part: part.update(part="other"),
    ],
)
def test_a_journal_that_was_forged_is_no_journal(
    tmp_path: Path, change: Callable[[dict[str, object]], None]
) -> None:
    journal = Journal(tmp_path / "journal", tmp_path)
    journal.start({})
    (tmp_path / "a.safetensors").write_bytes(b"1")
    record = FileRecord("a.safetensors", 1, "0" * 64, {"t": ("F32", (1,))})
    journal.write_part(0, "rank0", [record], {})
    journal.commit(0, ["rank0"])
    path = tmp_path / "journal" / "layer-00000.part.rank0.json"
    part = json.loads(path.read_text())
    change(part)
    path.write_text(json.dumps(part))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    marker = tmp_path / "journal" / "layer-00000.commit.json"
    marker.write_text(json.dumps({"parts": {"rank0": digest}}))
    assert journal.committed(0) is None
    marker.write_text(json.dumps({"parts": {"../journal/layer-00000.part.rank0": digest}}))
    assert journal.committed(0) is None


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_everything_has_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    config = tiny_config(hybrid_override_pattern="ME*-", num_hidden_layers=4)
    directory = write_source(tmp_path / "source", config, tiny_tensors(config))
    (directory / "nested" / "modeling.py").chmod(0o700)  # its own rights do not come along
    before = os.umask(umask)
    try:
        made = export(
            open_source(directory),
            tmp_path / "made" / "out",
            mixed_formats(Architecture.from_hf_config(config)),
        )
    finally:
        os.umask(before)
    rights = {p.relative_to(made).as_posix(): p.stat().st_mode & 0o777 for p in made.rglob("*")}
    folders = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_dir()}
    assert {rights[name] for name in folders} == {0o777 & ~umask}
    assert {rights[name] for name in set(rights) - folders} == {0o666 & ~umask}
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask
    assert made.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_small_file_that_became_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(SourceError, match="a FIFO, not a regular file"):
        copy_file(tmp_path / "tokenizer.json", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
