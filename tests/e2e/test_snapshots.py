"""Snapshots: a restart neither reads nor computes what lies before one, and no byte shows it.

Every run measures what quantization costs, so that the evaluation's streams are part of it.
"""

import errno
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import snapshots, sweep
from pipeline.checkpoint import shard_writer
from pipeline.checkpoint.snapshot_files import SnapshotFiles
from pipeline.config_parts import SnapshotConfig
from pipeline.filling import FileFeed, SlotFiller
from pipeline.runtime.stop import Reason, Stop
from pipeline.snapshots import Snapshots
from pipeline.visit import Visit
from tests.distributed.helpers import RankError
from tests.e2e.models import write_token_ids
from tests.e2e.restarts import Fault, Run, assert_same_run, assert_same_weights

LAYERS = range(7)
EP2 = {"world": 2, "ep": 2}
TP2 = {"world": 2, "tp": 2, "ep": 1}
DP2 = {"world": 2, "ep": 1}
LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "ep2": EP2, "tp2": TP2, "dp2": DP2}
EVERY_2 = SnapshotConfig(layers=2, minutes=None, keep=2)
NEVER = SnapshotConfig(layers=None, minutes=None)
Values = dict[str, Any]


class Counted(Run):
    """Also counts what each rank reads and computes, and keeps what it says."""

    def start(self, fault: Fault | None = None, *, world: int = 1, **options: Any) -> None:
        self.counts.unlink(missing_ok=True)
        super().start(fault, world=world, **options)

    @property
    def counts(self) -> Path:
        return self.output.with_name(self.output.name + ".counts")

    def count(self, what: str, rank: int = 0) -> list[int]:
        """Layers of the last start that a rank has read, computed, evaluated or skipped."""
        lines = [line.split() for line in self.counts.read_text().splitlines()]
        return [int(layer) for by, name, layer in lines if (int(by), name) == (rank, what)]

    @property
    def said(self) -> str:
        path = self.output.with_name(self.output.name + ".log")
        return path.read_text() if path.exists() else ""

    @property
    def kept(self) -> list[int]:
        """Layers after which there are whole snapshots."""
        return [record.layer for record in SnapshotFiles(self.partial / "snapshots").found()]

    def _count_packings(self, rank: int) -> None:
        super()._count_packings(rank)

        def note(what: str, layer: int) -> None:
            with self.counts.open("a") as file:
                file.write(f"{rank} {what} {layer}\n")

        def say(text: str, *values: object) -> None:
            with self.output.with_name(self.output.name + ".log").open("a") as file:
                file.write(text % values + "\n")

        _before(SlotFiller, "_fill", lambda filler, schedule, *_: note("fill", schedule.layer))
        _before(Visit, "_forward", lambda visit, *_: note("forward", visit.schedule.layer))
        _before(Visit, "_evaluate", lambda visit, *_: note("evaluate", visit.schedule.layer))
        fill = FileFeed.fill

        def filled(feed: FileFeed, target: Any, requests: Any) -> None:
            for layer in {spec.layer for spec, _, _ in requests}:
                note("read", layer)
            fill(feed, target, requests)

        FileFeed.fill = filled  # type: ignore[method-assign]
        for logger in (snapshots.logger, sweep.logger):
            logger.info = logger.warning = say  # type: ignore[assignment]


def _before(owner: Any, name: str, first: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        first(*args)
        return original(*args, **kwargs)

    setattr(owner, name, hooked)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Three sequences: one is missing on the second of two replicas."""
    data = write_token_ids(tmp_path_factory.mktemp("text") / "ids.npy", 3, 96, 256)
    size = {"num_sequences": 3, "group_sequences": 3, "group_seq_len": 40}
    return {"evaluation": {"data": str(data), **size}, "snapshots": EVERY_2}


@pytest.fixture(scope="module")
def undisturbed(asked: Values, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Finished runs nobody disturbed, without snapshots, one per layout."""
    root = tmp_path_factory.mktemp("undisturbed")
    made: dict[str, Path] = {}

    def of(**layout: Any) -> Path:
        key = repr(sorted(layout.items()))
        if key not in made:
            run = Counted(root / f"{len(made)}", **{**asked, "snapshots": NEVER})
            run.start(**layout)
            assert run.said == ""
            made[key] = run.output
        return made[key]

    return of


@pytest.fixture
def run(tmp_path: Path, asked: Values) -> Counted:
    return Counted(tmp_path / "out", **asked)


def figures(directory: Path) -> Values:
    """run.json without what differs between equal runs."""
    values = json.loads((directory / "layersweep" / "run.json").read_text())
    for name in ("phases", "output", "attempts"):
        values.pop(name, None)
    values["evaluation"].pop("seconds")
    values["summary"].pop("verdict")
    for layer in values["layers"]:
        layer.pop("seconds")
    return dict(values)


def assert_same(run: Run, expected: Path) -> None:
    assert_same_run(run, expected)
    assert figures(run.output) == figures(expected)


@pytest.fixture(scope="module")
def interrupted(asked: Values, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Outputs of runs that were killed in layer 6, with snapshots after layers 3 and 5."""
    root = tmp_path_factory.mktemp("interrupted")
    made: dict[str, Counted] = {}

    def of(**layout: Any) -> Path:
        key = repr(sorted(layout.items()))
        if key not in made:
            made[key] = Counted(root / f"{len(made)}", **asked)
            made[key].start(Fault("in forward", 6, rank=layout.get("world", 1) - 1), **layout)
            assert made[key].said.count("snapshot after layer") == 3
            assert made[key].kept == [5, 3], "only the newest two"
        return made[key].partial

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_before_a_snapshot_is_neither_read_nor_computed(
    layout: str,
    run: Counted,
    interrupted: Callable[..., Path],
    undisturbed: Callable[..., Path],
) -> None:
    options = LAYOUTS[layout]
    shutil.copytree(interrupted(**options), run.partial)
    run.start(**options)
    for rank in range(options.get("world", 1)):
        for what in ("fill", "read", "forward", "evaluate"):
            assert run.count(what, rank) == [6], (rank, what)
        assert run.packings(rank) == {6: 1}
    assert run.said == "going on from the snapshot after layer 5\n"
    assert_same(run, undisturbed(**options))


def test_a_run_that_dies_again_and_again_goes_on_from_the_newest(
    run: Counted, undisturbed: Callable[..., Path]
) -> None:
    run.start(Fault("in forward", 2))
    assert run.kept == [1]
    run.start(Fault("before commit", 5))
    assert (run.count("forward"), run.kept) == ([2, 3, 4, 5], [3, 1])
    run.start(Fault("before loss"))
    assert (run.count("forward"), run.kept) == ([4, 5, 6], [5, 3]), "never after the last"
    packed = run.packings()
    run.start()
    assert run.count("fill") == [6], "the loss needs what leaves the last layer"
    assert run.packings() == packed
    assert_same(run, undisturbed())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # (unit tests have them, too)
ONE_FILE = "layer-00005/rank-00000.safetensors"


@pytest.mark.parametrize(
    ("damage", "names", "visited", "warned"),
    [
        (_flip, [ONE_FILE], [4, 5, 6], "another checksum; an older one is tried"),
        slow(_truncate, [ONE_FILE], [4, 5, 6], "bytes instead of"),
        slow(Path.unlink, [ONE_FILE], [4, 5, 6], "No such file"),
        (Path.unlink, ["layer-00005/snapshot.json"], [4, 5, 6], ""),
        slow(_truncate, ["layer-00005/snapshot.json"], [4, 5, 6], ""),
        (
            _flip,
            [ONE_FILE, ONE_FILE.replace("5", "3", 1)],
            [*LAYERS],
            "another checksum; the layers up to there are passed through again",
        ),
    ],
    ids=["bit", "truncated", "no-file", "no-marker", "torn-marker", "all"],
)
def test_a_damaged_snapshot_costs_time_only(
    damage: Callable[[Path], None],
    names: list[str],
    visited: list[int],
    warned: str,
    run: Counted,
    interrupted: Callable[..., Path],
    undisturbed: Callable[..., Path],
) -> None:
    shutil.copytree(interrupted(), run.partial)
    for name in names:
        damage(run.partial / "snapshots" / name)
    run.start()
    assert run.count("fill") == visited
    lines = [line for line in run.said.splitlines() if "of no use" in line]
    assert len(lines) == (len(names) if warned else 0)
    if warned:
        assert str(run.partial / "snapshots" / ONE_FILE) in lines[0]
        assert warned in lines[-1]
    assert_same(run, undisturbed())


def test_all_ranks_drop_what_is_damaged_on_one(
    run: Counted, interrupted: Callable[..., Path], undisturbed: Callable[..., Path]
) -> None:
    shutil.copytree(interrupted(**EP2), run.partial)
    _flip(run.partial / "snapshots" / "layer-00005" / "rank-00001.safetensors")
    run.start(**EP2)
    assert run.count("fill", 0) == run.count("fill", 1) == [4, 5, 6]
    assert run.said.count("of no use") == 1
    assert_same(run, undisturbed(**EP2))


def test_a_snapshot_beyond_a_layer_that_is_done_again_is_removed(
    run: Counted, interrupted: Callable[..., Path], undisturbed: Callable[..., Path]
) -> None:
    shutil.copytree(interrupted(), run.partial)
    _truncate(next((run.partial / "checkpoint").glob("layer-00004-*")))
    run.start(Fault("in forward", 4))
    assert run.count("fill")[0] == 4
    assert run.kept == [3]
    run.start()
    assert_same(run, undisturbed())


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (EP2, "layout.ep: was 1, now 2; layout.world: was 1, now 2"),
        ({"calibration": {"micro_batch": 2}}, "micro_batch: was [1, 1], now [2, 1]"),
    ],
    ids=["layout", "micro-batch"],
)
def test_under_another_layout_all_layers_are_passed_through(
    change: Values,
    shown: str,
    run: Counted,
    interrupted: Callable[..., Path],
    undisturbed: Callable[..., Path],
) -> None:
    shutil.copytree(interrupted(), run.partial)
    run.start(Fault("in forward", 2), **change)
    assert run.said.count(shown) == 1
    assert run.count("forward") == [0, 1]
    assert run.kept == [5, 1], "the oldest of another layout went"
    run.start(**change)
    assert run.count("fill") == [2, 3, 4, 5, 6]
    assert_same_weights(run, undisturbed())


def _refuse_to_write(folder: str) -> None:
    """What a full disk answers, for files of one folder of this process."""
    write = shard_writer.write_all

    def full(descriptor: int, data: Any) -> None:
        if f"/{folder}/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data)

    shard_writer.write_all = full


def test_a_full_disk_costs_the_snapshot_and_not_the_run(
    asked: Values, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    class Full(Counted):
        def _count_packings(self, rank: int) -> None:
            super()._count_packings(rank)
            if rank == 1:
                _refuse_to_write("layer-00003")

    run = Full(tmp_path / "out", **asked)
    run.start(Fault("in forward", 6), **EP2)
    assert run.kept == [5, 1]
    (warning,) = [line for line in run.said.splitlines() if line.startswith("no snapshot")]
    assert warning.startswith("no snapshot after layer 3: ")
    assert "layer-00003/rank-00001.safetensors" in warning
    assert "No space left on device" in warning
    run.start(**EP2)
    assert run.count("fill", 1) == [6]
    assert_same(run, undisturbed(**EP2))


class Stopped(Counted):
    """Is asked to stop after layer 2."""

    def _count_packings(self, rank: int) -> None:
        super()._count_packings(rank)
        _before(Stop, "agreed", lambda stop, layer: layer == 2 and stop.ask(Reason.file))


def test_a_run_that_is_stopped_leaves_a_snapshot(
    asked: Values, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    rarely = SnapshotConfig(layers=None, minutes=60)
    run = Stopped(tmp_path / "out", **{**asked, "snapshots": rarely})
    with pytest.raises(RankError, match="StoppedError"):
        run.start()
    assert run.kept == [2]
    run.start()
    assert run.count("fill") == [3, 4, 5, 6]
    assert_same(run, undisturbed())


class InBackground(Counted):
    """Files of snapshots are written beside the next layers, as on a GPU, by a slow disk."""

    def _count_packings(self, rank: int) -> None:
        super()._count_packings(rank)
        begin = Snapshots.__init__

        def made(snapshots: Snapshots, *args: Any, **options: Any) -> None:
            begin(snapshots, *args, **{**options, "in_background": True})

        Snapshots.__init__ = made  # type: ignore[method-assign]
        write = shard_writer.write_all

        def slow(descriptor: int, data: Any) -> None:
            if "/snapshots/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                time.sleep(0.01)
            write(descriptor, data)

        shard_writer.write_all = slow


@pytest.mark.parametrize("layout", ["one", pytest.param("ep2", marks=pytest.mark.slow)])
def test_written_beside_the_next_layers(
    layout: str, asked: Values, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    options = LAYOUTS[layout]
    often = SnapshotConfig(layers=1, minutes=None, keep=9)
    run = InBackground(tmp_path / "out", **{**asked, "snapshots": often})
    run.start(Fault("in forward", 6), **options)
    newest = run.kept[0]
    assert newest >= 2
    assert run.kept != [5, 4, 3, 2, 1, 0], "nothing was beside anything"
    shutil.copytree(run.partial, tmp_path / "other.partial")
    run.start(**options)
    assert run.count("fill") == [*range(newest + 1, 7)]
    assert_same(run, undisturbed(**options))
    other = Counted(tmp_path / "other", **asked)
    *newer, oldest = other.kept
    for layer in newer:
        SnapshotFiles(other.partial / "snapshots").remove(layer)
    other.start(**options)
    assert other.count("fill") == [*range(oldest + 1, 7)]
    assert_same(other, undisturbed(**options))
