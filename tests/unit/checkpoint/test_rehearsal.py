"""A run that writes nothing: where its report may go, and what its counts must be."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.lock import WorkLock
from pipeline.checkpoint.publish import prepare
from pipeline.checkpoint.rehearsal import (
    NOTE,
    check_counts,
    check_rehearsal,
    finish_rehearsal,
    mark_rehearsal,
)
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.checkpoint.source import read_json
from pipeline.checkpoint.writer import FileRecord
from pipeline.errors import OutputError

FINGERPRINT = {"source": "abc"}
GONE = FileRecord("never-written.safetensors", 100, "0" * 64, {"a": ("BF16", (2, 3))})
Records = list[FileRecord]


# ---- the report's directory


def test_the_work_lies_in_the_report_s_directory(tmp_path: Path) -> None:
    work = check_rehearsal(tmp_path / "deep" / "report")
    assert list(tmp_path.iterdir()) == []  # looking leaves no trace
    with WorkLock(work):
        prepare(work)
        assert work.files.is_dir()
        mark_rehearsal(work)
    finish_rehearsal(work)
    assert [path.name for path in work.final.iterdir()] == [NOTE]


def test_a_rehearsal_may_be_repeated_in_its_place(tmp_path: Path) -> None:
    for _ in range(2):
        work = check_rehearsal(tmp_path)
        with WorkLock(work):
            prepare(work)
            finish_rehearsal(work)


def test_an_interrupted_rehearsal_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    for _ in range(2):
        work = check_rehearsal(tmp_path)
        with WorkLock(work):
            prepare(work)
            journal = Journal(work.journal, work.files, discard=True)
            assert journal.start(FINGERPRINT) is False
            assert journal.committed(0) is None
            assert not work.metrics.exists()
            journal.write_part(0, "rank0", [GONE], {})
            journal.commit(0, ["rank0"])
            work.metrics.write_text("{}\n")


def test_other_directories_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    check_rehearsal(directory)
    (directory / "run.json").touch()
    with pytest.raises(OutputError) as caught:
        check_rehearsal(directory)
    assert str(caught.value).startswith(f"report {directory}: found a directory with files in it")
    with pytest.raises(OutputError, match="found a file"):
        check_rehearsal(directory / "run.json")
    with pytest.raises(OutputError, match="is not writable"):
        check_rehearsal(Path("/proc/report"))


def test_the_source_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(OutputError, match="must not lie in each other"):
        check_rehearsal(tmp_path / "source" / "report", tmp_path / "source")


# ---- the journal


def test_a_rehearsal_s_files_are_not_looked_for(tmp_path: Path) -> None:
    for discard in (False, True):
        journal = Journal(tmp_path / str(discard), tmp_path, discard=discard)
        journal.start(FINGERPRINT)
        journal.write_part(3, "rank0", [GONE], {"x": 1})
        if not discard:
            with pytest.raises(OutputError, match="every file of a layer must be durable"):
                journal.commit(3, ["rank0"])
            continue
        journal.commit(3, ["rank0"])
        found = journal.committed(3, checksums=True)
        assert found is not None
        assert found.files == (GONE,)


# ---- the counts


def records_of(directory: Path) -> Records:
    return [
        FileRecord(
            path.name,
            path.stat().st_size,
            "",
            {info.name: (info.dtype, info.shape) for info in read_header(path).values()},
        )
        for path in sorted(directory.glob("*.safetensors"))
    ]


def count(directory: Path, records: Records) -> AuditResult:
    """Against the plan that the untouched directory fulfils."""
    figures = audit(directory).figures
    return check_counts(
        records,
        read_json(directory / "config.json", ""),
        expected_bytes=figures.tensor_bytes,
        expected_effective_bits=figures.effective_bits,
    )


def test_counts_are_those_of_the_audit(mixed_export: Path) -> None:
    result = count(mixed_export, records_of(mixed_export))
    assert result.problems == []
    figures, audited = result.figures, audit(mixed_export).figures
    for name in ("tensors", "file_bytes", "tensor_bytes", "parameters", "effective_bits"):
        assert getattr(figures, name) == getattr(audited, name), name


def without(records: Records, name: str) -> Records:
    return [
        dataclasses.replace(record, tensors={k: v for k, v in record.tensors.items() if k != name})
        for record in records
    ]


def with_entry(records: Records, name: str, entry: tuple[str, tuple[int, ...]]) -> Records:
    first, *rest = without(records, name)
    return [dataclasses.replace(first, tensors={**first.tensors, name: entry}), *rest]


SCALE = "backbone.layers.1.mixer.experts.1.up_proj.weight_scale_2"
NORM = "backbone.norm_f.weight"
FAULTS: dict[str, tuple[Callable[[Records], Records], str]] = {
    "missing": (lambda r: without(r, SCALE), f"key set: {SCALE} is missing"),
    "extra": (lambda r: with_entry(r, "stray", ("BF16", (1,))), "key set: stray is extra"),
    "shape": (lambda r: with_entry(r, NORM, ("BF16", (63,))), f"{NORM}: shape \\[63\\]"),
    "dtype": (lambda r: with_entry(r, NORM, ("U8", (64,))), f"{NORM}: dtype U8"),
    "size": (lambda r: with_entry(r, NORM, ("F32", (64,))), "bytes instead of the planned"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_what_differs_from_the_plan_is_found(fault: str, mixed_export: Path) -> None:
    change, message = FAULTS[fault]
    result = count(mixed_export, change(records_of(mixed_export)))
    assert any(re.search(message, problem) for problem in result.problems), result.problems


def test_a_tensor_in_two_files_is_refused(mixed_export: Path) -> None:
    records: Any = records_of(mixed_export)
    with pytest.raises(OutputError, match="a tensor must be written once"):
        count(mixed_export, [*records, dataclasses.replace(records[0], name="again")])
