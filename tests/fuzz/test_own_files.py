"""Readers of files that a run wrote itself, after somebody or something changed them."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.attempts import read_attempts
from pipeline.checkpoint.durable import write_json
from pipeline.checkpoint.journal import Journal, LayerRecord
from pipeline.checkpoint.publish import WorkDirectory, prepare
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES
from pipeline.checkpoint.snapshot_files import SnapshotFile, SnapshotFiles, SnapshotRecord
from pipeline.checkpoint.source_files import is_weight_file
from pipeline.checkpoint.writable import FileRecord
from pipeline.report.metrics import read_metrics
from pipeline.report.records import RunReport
from pipeline.report.run_json import read_run_json, write_run_json
from pipeline.runtime.signs import read_record, read_signs
from pipeline.verify import read_checksums
from tests.fuzz.mutations import Chooser, broken_bytes, broken_json
from tests.fuzz.watch import Watch
from tests.unit.report.sample import sample_report

TARGETS = {
    "journal": 1500,
    "fingerprint": 400,
    "renames": 500,
    "run.json": 600,
    "lines": 800,
    "snapshots": 500,
}


def check_record(record: LayerRecord) -> None:
    for part in record.parts:
        assert isinstance(part.statistics, dict)
    for file in record.files:
        assert is_weight_file(file.name)
        assert type(file.bytes) is int
        for dtype, shape in file.tensors.values():
            assert dtype in TORCH_DTYPES
            assert math.prod(shape) >= 0


def test_journal(watch: Watch) -> None:
    root = watch.sandbox / "run"
    journal = Journal(root / "journal", root / "checkpoint")
    for directory in (journal.directory, journal.files):
        directory.mkdir(parents=True)
    (journal.files / "a.safetensors").write_bytes(b"12")
    file = FileRecord("a.safetensors", 2, "0" * 64, {"t": ("BF16", (2, 3))})
    journal.write_part(0, "rank00000", [file], {"packed": {"t": [1.0]}, "read": {"t": "0" * 32}})
    journal.commit(0, ["rank00000"])
    part = journal.directory / "layer-00000.part.rank00000.json"
    marker = journal.directory / "layer-00000.commit.json"
    good = {path: path.read_text() for path in (part, marker)}

    def attempt(choose: Chooser) -> None:
        path = choose.pick((part, part, marker))
        data = broken_json(choose, good[path])
        path.write_bytes(data)
        if path == part and not choose.once_in(4):  # by somebody who also mends the marker
            digest = hashlib.sha256(data).hexdigest()
            marker.write_text(json.dumps({"parts": {"rank00000": digest}}))
        record = watch.outcome(lambda: journal.committed(0))
        if record is not None:
            check_record(record)
        unit = watch.outcome(lambda: journal.commit(0, ["rank00000"]))
        if unit is not None:
            check_record(unit)
        for path, text in good.items():
            path.write_text(text)

    watch.fuzz("journal", attempt, inputs=TARGETS["journal"])


def test_fingerprint(watch: Watch) -> None:
    journal = Journal(watch.sandbox / "marked", watch.sandbox / "marked")
    wanted = {"source": "0" * 64, "cast": False, "scale": None, "recipe": {"name": "x", "n": [1]}}
    journal.start(wanted)
    path = journal.directory / "fingerprint.json"
    good = path.read_text()

    def attempt(choose: Chooser) -> None:
        path.write_bytes(broken_json(choose, good))
        if watch.outcome(lambda: journal.start(wanted)):
            assert json.loads(path.read_bytes()) == wanted

    watch.fuzz("fingerprint", attempt, inputs=TARGETS["fingerprint"])


def test_renames(watch: Watch) -> None:
    outside = watch.put("victim", b"precious")
    plan = {f"layer-{n}.safetensors": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    valid = json.dumps({**plan, str(outside): "../victim"})

    def attempt(choose: Chooser) -> None:
        data = broken_json(choose, json.dumps(plan) if choose.once_in(2) else valid)
        work = WorkDirectory.beside(watch.sandbox / "renamed" / "out")
        for directory in (work.files, work.journal):
            directory.mkdir(parents=True)
        for name in plan.values():
            (work.files / name).write_bytes(name.encode())
        (work.journal / "renames.json").write_bytes(data)
        try:
            watch.outcome(lambda: prepare(work))
            assert outside.read_bytes() == b"precious"
            kept = {path.read_bytes() for path in work.files.iterdir()}
            assert kept <= {name.encode() for name in plan.values()}
        finally:
            shutil.rmtree(work.root)

    watch.fuzz("renames", attempt, inputs=TARGETS["renames"])


@pytest.fixture(scope="module")
def report() -> RunReport:
    return sample_report(3)


def test_run_json(watch: Watch, report: RunReport) -> None:
    path = watch.sandbox / "run.json"
    write_run_json(report, path)
    good = path.read_text()

    def attempt(choose: Chooser) -> None:
        path.write_bytes(broken_json(choose, good))
        found = watch.outcome(lambda: read_run_json(path))
        if found is not None:
            assert isinstance(found, RunReport)
            assert all(dataclasses.is_dataclass(layer) for layer in found.layers)

    watch.fuzz("run.json", attempt, inputs=TARGETS["run.json"])


def check_rows(rows: list[dict[str, Any]]) -> None:
    assert all(isinstance(row, dict) for row in rows)


def test_lines(watch: Watch) -> None:
    """Metrics, attempts, signs of life, checksums: what is torn is left out, or refused."""
    row = json.dumps({"time": 1.5, "layer": 3, "attempt": 1, "event": "began", "updated": 1.5})
    sums = f"{'a' * 64}  model-00001-of-00001.safetensors\n".encode()

    def attempt(choose: Chooser) -> None:
        lines = [broken_json(choose, row) for _ in range(choose.between(1, 3))]
        path = watch.put("rank-00000.json", b"\n".join(lines))
        check_rows(watch.outcome(lambda: read_metrics(path)))
        check_rows(watch.outcome(lambda: read_attempts(path)))
        check_rows(watch.outcome(lambda: read_signs(path.parent)))
        assert isinstance(watch.outcome(lambda: read_record(path)), dict | None)
        path = watch.put("SHA256SUMS", broken_bytes(choose, sums))
        assert isinstance(watch.outcome(lambda: read_checksums(path)), dict | None)

    watch.fuzz("lines", attempt, inputs=TARGETS["lines"])


def test_snapshots(watch: Watch) -> None:
    files = SnapshotFiles(watch.sandbox / "snapshots")
    record = SnapshotRecord(3, {"tokens": "0" * 64}, (SnapshotFile(2, "0" * 64),))

    def attempt(choose: Chooser) -> None:
        files.begin(3)
        files.commit(record)
        marker = next(files.of_layer(3).glob("*.json"))
        marker.write_bytes(broken_json(choose, marker.read_text()))
        for found in watch.outcome(files.found) or []:
            assert found.layer == 3
            assert all(type(file.bytes) is int for file in found.files)

    watch.fuzz("snapshots", attempt, inputs=TARGETS["snapshots"])


def test_marker_of_the_sandbox_is_left_alone(watch: Watch) -> None:
    """The watch itself: it hears a write outside, and says where."""
    with pytest.raises(AssertionError, match="written outside the sandbox"):
        watch.outcome(lambda: write_json(Path("/tmp") / "layersweep-stray.json", {}))
    (Path("/tmp") / "layersweep-stray.json").unlink()
