"""Committing: nothing without its scales; on a device the last layers may still be on their way."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from pipeline.calibration.observers import AmaxObserver, Statistic
from pipeline.calibration.reduce import ReducedStatistics
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.writer import FileRecord
from pipeline.commits import Commits, LayerRun, ScalarSettings
from pipeline.errors import NumericsError, OutputError
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.lanes import Mark
from pipeline.runtime.progress import Progress
from tests.unit.test_sweep_units import job_of

CPU = torch.device("cpu")
JOB = job_of("nvfp4_four_over_six")
SCALARS = ScalarSettings(clamp_kv_scales=True, unobserved_input_scale=None)


def make(tmp_path: Path) -> tuple[Commits, Journal]:
    (tmp_path / "files").mkdir()
    journal = Journal(tmp_path / "journal", tmp_path / "files")
    journal.start({"test": 1})
    ranks = Ranks(None, None, None, CPU)
    progress = Progress(3, 0, CPU, interval_s=0.0, enabled=False)
    return Commits(JOB, journal, ranks, SCALARS, progress, 7), journal


def observed(layer: int, **values: float) -> list[Statistic]:
    statistics = []
    for name in JOB.schedules[layer].observed:
        observer = AmaxObserver(name, CPU)
        observer.observe(torch.tensor([values.get(name.replace(".", "_"), 1.0)]))
        statistics.append(observer.statistic)
    return statistics


def visited(layer: int, **values: float) -> LayerRun:
    mark, statistics = Mark(CPU), observed(layer, **values)
    run = LayerRun(JOB.schedules[layer], True, mark, mark, mark)
    run.observed, run.reduced = statistics, ReducedStatistics(statistics, None)
    return run


def test_a_layer_without_scales_is_not_committed(tmp_path: Path) -> None:
    commits, journal = make(tmp_path)
    with pytest.raises(NumericsError, match=r"experts\.0\.down_proj input amax: found 0\.0"):
        commits.add(visited(1, experts_down_proj=0.0))
    assert journal.committed(1) is None
    (tmp_path / "again").mkdir()
    commits, journal = make(tmp_path / "again")
    commits.add(visited(1))
    record = journal.committed(1)
    assert record is not None
    scalars = record.parts[-1].statistics["scalars"]
    experts = {value for name, value in scalars.items() if ".experts." in name}
    assert len(experts) == 1
    assert sum(".experts." in name for name in scalars) == 8


def test_activations_that_are_not_finite_are_refused_before_anything_is_recorded(
    tmp_path: Path,
) -> None:
    commits, journal = make(tmp_path)
    with pytest.raises(NumericsError, match=r"layer 1: input activations of experts\.up_proj"):
        commits.add(visited(1, experts_up_proj=float("nan")))
    assert list(journal.directory.glob("layer-*")) == []


def test_a_file_that_could_not_be_written_ends_the_run(tmp_path: Path) -> None:
    commits, journal = make(tmp_path)
    run = visited(0)
    file: Future[FileRecord] = Future()
    file.set_exception(OutputError("x", value="full", rule="r", remedy="m"))
    run.files = [file]
    with pytest.raises(OutputError):
        commits.add(run)
    assert journal.committed(0) is None


def test_files_may_be_late_on_a_device(tmp_path: Path) -> None:
    """Layers 0 and 1 wait for their files; when layer 2 comes, layer 0 must be committed."""
    commits, journal = make(tmp_path)
    commits._is_async = True
    files: list[Future[FileRecord]] = [Future() for _ in range(3)]
    for layer in (0, 1):
        run = visited(layer)
        run.files = [files[layer]]
        commits.add(run)
        commits.settle()
        assert journal.committed(layer) is None
    (journal.files / "a.safetensors").write_bytes(b"12")
    for file in files:
        file.set_result(FileRecord("a.safetensors", 2, "0" * 64, {}))
    run = visited(2)
    run.files = [files[2]]
    commits.add(run)
    commits.settle()
    assert journal.committed(0) is not None
    assert journal.committed(1) is None
    commits.drain()
    assert journal.committed(1) is not None
    assert journal.committed(2) is not None
