"""A run that dies anywhere and is started again ends with the same bytes, and keeps its work."""

import json
import os
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.entry import CONF_DIR
from pipeline import publication, sweep
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.journal import Journal
from pipeline.packing import LayerPacker
from pipeline.recipe import load_recipe
from tests.distributed.helpers import RankError, run_ranks
from tests.e2e.harness import GOLDEN, golden_config, is_activation_scalar, read_checkpoint

LAYERS = range(7)
EP2 = {"world": 2, "ep": 2}
TP2 = {"world": 2, "tp": 2, "ep": 1}
# Within one layer or named unit, in the order of time.
UNIT_PHASES = (
    "before write",
    "file not yet renamed",
    "after write",
    "after part",
    "before commit",
    "marker not yet renamed",
    "after commit",
)
LAYER_PHASES = ("in pack", "in forward", *UNIT_PHASES)
PUBLICATION = (
    "before publish",
    "renames not yet noted",
    "first shard not yet renamed",
    "fifth shard not yet renamed",
    "index not yet written",
    "config not yet written",
    "after publish",
    "in audit",
    "before finalize",
)


class InjectedError(RuntimeError):
    """What an injected exception is."""


@dataclass(frozen=True)
class Fault:
    """Where a run dies: in a phase of a unit, on one rank, by SIGKILL or by an exception."""

    phase: str
    unit: int | str = ""
    rank: int = 0
    by: str = "kill"
    after_s: float = 0.0  # time for the other ranks to run ahead

    def strike(self) -> None:
        time.sleep(self.after_s)
        if self.by == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InjectedError(f"{self.phase} {self.unit}")

    @property
    def key(self) -> str:
        return f"layer-{self.unit:05d}" if isinstance(self.unit, int) else f"unit-{self.unit}"

    def arm(self) -> None:
        """Makes the current process die there."""
        hits = {
            "in pack": lambda: _hook(LayerPacker, "pack", self, self._is_schedule, after=True),
            "in forward": lambda: _hook(sweep.Sweep, "_forward", self, self._is_schedule),
            "before write": lambda: _hook(sweep, "write_safetensors", self, self._is_file),
            "after write": lambda: _hook(sweep, "write_safetensors", self, self._is_file, True),
            "file not yet renamed": lambda: self._in_rename(f"{self._file}*.safetensors"),
            "after part": lambda: _hook(Journal, "write_part", self, self._is_part, after=True),
            "before commit": lambda: _hook(Journal, "commit", self, self._is_unit),
            "marker not yet renamed": lambda: self._in_rename(f"{self.key}.commit.json"),
            "after commit": lambda: _hook(Journal, "commit", self, self._is_unit, after=True),
            "before loss": lambda: _hook(sweep.Sweep, "measure_loss", self),
            "before publish": lambda: _hook(publication, "publish", self),
            "renames not yet noted": lambda: self._in_rename("renames.json"),
            "first shard not yet renamed": lambda: self._in_rename("model-00001-of-*"),
            "fifth shard not yet renamed": lambda: self._in_rename("model-00005-of-*"),
            "index not yet written": lambda: self._in_rename("model.safetensors.index.json"),
            "config not yet written": lambda: self._in_rename("config.json"),
            "after publish": lambda: _hook(publication, "publish", self, after=True),
            "in audit": lambda: _hook(publication, "audit", self),
            "before finalize": lambda: _hook(publication, "finalize", self),
            "after the last rename": lambda: _hook(shutil, "rmtree", self, self._is_work),
            "while taking names back": lambda: self._in_rename("layer-00003-*.safetensors"),
        }
        hits[self.phase]()

    @property
    def _file(self) -> str:
        return f"layer-{self.unit:05d}-" if isinstance(self.unit, int) else f"{self.unit}-"

    def _in_rename(self, pattern: str) -> None:
        def matches(_old: object, new: object, **_: object) -> bool:
            return Path(str(new)).match(pattern)

        _hook(os, "rename", self, matches)

    def _is_file(self, path: Path, *_: object) -> bool:
        return path.name.startswith(self._file)

    def _is_part(self, _journal: object, unit: int | str, part: str, *_: object) -> bool:
        return unit == self.unit and part.startswith("rank")

    def _is_unit(self, _journal: object, unit: int | str, *_: object) -> bool:
        return unit == self.unit

    def _is_schedule(self, _self: object, schedule: Any, *_: object, **__: object) -> bool:
        return bool(schedule.layer == self.unit)

    def _is_work(self, path: Path, **_: object) -> bool:
        return path.name.endswith(".partial")


def _hook(
    owner: Any,
    name: str,
    fault: Fault,
    matches: Callable[..., bool] = lambda *_, **__: True,
    after: bool = False,
) -> None:
    original = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        due = matches(*args, **kwargs)
        if due and not after:
            fault.strike()
        value = original(*args, **kwargs)
        if due:
            fault.strike()
        return value

    setattr(owner, name, hooked)


class Run:
    """One output directory, started as often as a test likes; counts what each rank has packed."""

    def __init__(self, output: Path, **options: Any) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.log = output.with_name(output.name + ".packings")
        self.options = options

    def start(self, fault: Fault | None = None, *, world: int = 1, **options: Any) -> None:
        """Starts the job, which dies by `fault`, or else ends well."""
        config = golden_config(self.output, **{**self.options, **options})
        load_recipe(config.recipe, CONF_DIR / "recipe")  # imports Model Optimizer before forking

        def job(rank: int) -> None:
            self._count_packings(rank)
            if fault is not None and fault.rank == rank:
                fault.arm()
            calibrate(config, CONF_DIR, Place(rank, world, rank), "")

        if fault is None:
            run_ranks(job, world)
            return
        with pytest.raises(RankError) as failure:
            run_ranks(job, world)
        expected = "SIGKILL" if fault.by == "kill" else "InjectedError"
        assert expected in failure.value.report, failure.value.report

    def packings(self, rank: int = 0) -> Counter[int]:
        """Number of finished packings so far, by layer."""
        lines = self.log.read_text().split("\n") if self.log.exists() else []
        pairs = [line.split() for line in lines if line]
        return Counter(int(layer) for by, layer in pairs if int(by) == rank)

    @property
    def committed(self) -> dict[str, bytes]:
        """Every committed unit's records, by file name: what a restart has to keep."""
        directory = self.partial / "journal"
        keys = [path.name.split(".")[0] for path in directory.glob("*.commit.json")]
        return {p.name: p.read_bytes() for key in keys for p in directory.glob(f"{key}.*")}

    def scalars(self) -> dict[str, float]:
        """The scalars of the committed layers, from the journal."""
        found: dict[str, float] = {}
        for name, data in self.committed.items():
            if name.startswith("layer-") and ".part.scalars." in name:
                found |= json.loads(data)["statistics"]["scalars"]
        return found

    def _count_packings(self, rank: int) -> None:
        pack = LayerPacker.pack

        def counted(packer: LayerPacker, schedule: Any, weights: Any) -> Any:
            packed = pack(packer, schedule, weights)
            with self.log.open("a") as log:
                log.write(f"{rank} {schedule.layer}\n")
            return packed

        LayerPacker.pack = counted  # type: ignore[method-assign]


def published(directory: Path) -> dict[str, bytes]:
    """Every file of a finished checkpoint but the report, which holds times."""
    names = ("layersweep/run.json", "layersweep/metrics.jsonl", "layersweep/report.html")
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in names}


def losses(directory: Path) -> dict[str, Any]:
    report = json.loads((directory / "layersweep" / "run.json").read_text())
    return {name: value for name, value in report.items() if "loss" in name}


def assert_same_run(run: Run, expected: Path) -> None:
    """Byte-identical, nothing left over."""
    ours, theirs = published(run.output), published(expected)
    assert set(ours) == set(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert losses(run.output) == losses(expected)
    assert losses(expected)
    assert not run.partial.exists()


def assert_same_weights(run: Run, expected: Path) -> None:
    """What another layout owes: equal packed weights, activation scalars to 1e-3."""
    ours, theirs = read_checkpoint(run.output), read_checkpoint(expected)
    assert set(ours) == set(theirs)
    for name, (dtype, shape, data) in ours.items():
        assert (dtype, shape) == theirs[name][:2], name
        if is_activation_scalar(name):
            (a,), (b,) = struct.unpack("<f", data), struct.unpack("<f", theirs[name][2])
            assert a == pytest.approx(b, rel=1e-3), name
        else:
            assert data == theirs[name][2], name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Finished runs nobody disturbed, one per set of options."""
    root = tmp_path_factory.mktemp("undisturbed")
    made: dict[str, Path] = {}

    def of(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            run = Run(root / f"{len(made)}")
            run.start(**options)
            assert set(run.packings().values()) == {1}
            made[key] = run.output
        return made[key]

    return of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out")


def test_undisturbed_runs_are_reproducible(run: Run, undisturbed: Callable[..., Path]) -> None:
    run.start()
    assert_same_run(run, undisturbed())


def _check_one_fault(run: Run, fault: Fault, expected: Path, **layout: Any) -> None:
    run.start(fault, **layout)
    assert not run.output.exists()
    kept = run.committed
    run.start(**layout)
    assert_same_run(run, expected)
    world = layout.get("world", 1)
    for rank in range(world):
        packings = run.packings(rank)
        twice = [layer for layer, count in packings.items() if count > 1]
        assert set(packings) == set(LAYERS)
        assert max(packings.values()) <= 2
        assert twice in ([], [fault.unit])
        assert not [layer for layer in twice if f"layer-{layer:05d}.commit.json" in kept]


@pytest.mark.parametrize("phase", LAYER_PHASES)
def test_killed_in_a_layer(phase: str, run: Run, undisturbed: Callable[..., Path]) -> None:
    _check_one_fault(run, Fault(phase, 3), undisturbed())


@pytest.mark.parametrize(
    ("phase", "unit"),
    [("file not yet renamed", "outer"), ("before commit", "outer"), ("before loss", "")]
    + [("before commit", "loss"), ("marker not yet renamed", "loss")],
)
def test_killed_outside_the_layers(
    phase: str, unit: str, run: Run, undisturbed: Callable[..., Path]
) -> None:
    _check_one_fault(run, Fault(phase, unit), undisturbed())


@pytest.mark.parametrize(("phase", "unit"), [("in forward", 1), ("in audit", "")])
def test_an_exception_is_as_good_as_a_kill(
    phase: str, unit: int | str, run: Run, undisturbed: Callable[..., Path]
) -> None:
    _check_one_fault(run, Fault(phase, unit, by="exception"), undisturbed())


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        (EP2, Fault("after part", 4, rank=1)),
        (EP2, Fault("before write", 1, rank=0)),
        (TP2, Fault("in forward", 3, rank=1)),
        (EP2, Fault("before commit", 5, rank=0, after_s=1.0)),
    ],
    ids=["ep2-part", "ep2-write", "tp2-forward", "ep2-commit"],
)
def test_killed_rank_of_two(
    layout: dict[str, Any], fault: Fault, run: Run, undisturbed: Callable[..., Path]
) -> None:
    _check_one_fault(run, fault, undisturbed(**layout), **layout)


def test_killed_in_every_layer_one_after_the_other(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    for layer in LAYERS:
        before = run.packings()
        kept = run.committed
        run.start(Fault("after part" if layer % 2 else "in pack", layer))
        assert sum((run.packings() - before).values()) <= 2
        assert kept.items() <= run.committed.items()
    run.start()
    assert_same_run(run, undisturbed())
    assert run.packings() == dict.fromkeys(LAYERS, 2)


def test_killed_in_every_step_of_the_publication(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    for phase in PUBLICATION:
        run.start(Fault(phase))
        assert not run.output.exists(), phase
        assert run.packings() == dict.fromkeys(LAYERS, 1)
    run.start(Fault("while taking names back"))
    run.start(Fault("fifth shard not yet renamed"))
    run.start()
    assert_same_run(run, undisturbed())
    assert run.packings() == dict.fromkeys(LAYERS, 1)


def test_killed_after_the_last_rename_is_finished(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    run.start(Fault("after the last rename"))
    assert published(run.output) == published(undisturbed())
    with pytest.raises(RankError, match="finished checkpoints are never overwritten"):
        run.start()


def test_finished_output_is_refused_and_untouched(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", recipe="nvfp4_weight_only")
    run.start()
    before = {path: path.stat().st_mtime_ns for path in run.output.rglob("*")}
    with pytest.raises(RankError, match="finished checkpoints are never overwritten") as failure:
        run.start()
    assert "OutputError" in failure.value.report
    assert str(run.output) in failure.value.report
    assert {path: path.stat().st_mtime_ns for path in run.output.rglob("*")} == before


def test_goes_on_under_other_layouts(run: Run, undisturbed: Callable[..., Path]) -> None:
    run.start(Fault("after part", 2))
    run.start(Fault("after part", 5, rank=1), **EP2)
    kept = run.scalars()
    run.start(**TP2)
    assert_same_weights(run, undisturbed())
    assert run.packings() == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 2, 6: 1}
    ours = read_checkpoint(run.output)
    assert kept
    for name, value in kept.items():
        assert ours[name][2] == struct.pack("<f", value), name


def test_publication_goes_on_under_another_layout(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    run.start(Fault("fifth shard not yet renamed"), **EP2)
    run.start()
    assert published(run.output) == published(undisturbed(**EP2))


@pytest.mark.parametrize("phase", ["after write", "before commit", "in audit"])
def test_weight_only_recipe_goes_on(phase: str, run: Run, undisturbed: Callable[..., Path]) -> None:
    expected = undisturbed(recipe="nvfp4_weight_only")
    run.options["recipe"] = "nvfp4_weight_only"
    run.start(Fault(phase, 4 if phase != "in audit" else ""))
    run.start()
    assert published(run.output) == published(expected)
    assert not run.partial.exists()
    assert run.packings() == dict.fromkeys(LAYERS, 1) | ({} if phase == "in audit" else {4: 2})


def _other_data(folder: Path) -> dict[str, str]:
    ids = np.load(GOLDEN / "calibration_ids.npy").copy()
    ids[0, 0] = (ids[0, 0] + 1) % 200
    np.save(folder / "other.npy", ids)
    return {"data": str(folder / "other.npy")}


def _other_source(folder: Path) -> dict[str, str]:
    shutil.copytree(GOLDEN / "source", folder / "source")
    path = folder / "source" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return {"checkpoint": str(folder / "source")}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda _: {"recipe": "nvfp4_max"}, "recipe: was '"),
        (_other_data, "calibration_tokens: was '"),
        (_other_source, "source: was '"),
        (
            lambda _: {"recipe": "nvfp4_max", "compare_to_max": False},
            "compare_to_max: was True, now False; recipe: was '",
        ),
    ],
    ids=["recipe", "data", "source", "two"],
)
def test_another_job_is_refused_and_keeps_the_work(
    change: Callable[[Path], dict[str, Any]], shown: str, tmp_path: Path, interrupted: Path
) -> None:
    shutil.copytree(interrupted.with_name("out.partial"), tmp_path / "out.partial")
    run = Run(tmp_path / "out")
    kept = published(run.partial)
    with pytest.raises(RankError) as failure:
        run.start(**change(tmp_path))
    report = failure.value.report
    assert "OutputError" in report
    assert "an unfinished run with other settings" in report
    assert shown in report
    assert "restore those settings, choose another output, or remove the directory" in report
    assert published(run.partial) == kept


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run that was killed in layer 5."""
    run = Run(tmp_path_factory.mktemp("interrupted") / "out")
    run.start(Fault("after part", 5))
    return run.output


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "pattern", "layer"),
    [
        (_truncate, "journal/layer-00002.part.rank00000.json", 2),
        (_flip, "journal/layer-00002.part.scalars.json", 2),
        (_truncate, "journal/layer-00002.commit.json", 2),
        (_truncate, "checkpoint/layer-00001-rank-00000.safetensors", 1),
        (_delete, "checkpoint/layer-00001-rank-00000.safetensors", 1),
        (_truncate, "checkpoint/outer-000-rank-00000.safetensors", None),
    ],
    ids=["record", "scalars", "marker", "shard", "no-shard", "outer"],
)
def test_damaged_work_is_done_again(
    damage: Callable[[Path], None],
    pattern: str,
    layer: int | None,
    tmp_path: Path,
    interrupted: Path,
    undisturbed: Callable[..., Path],
) -> None:
    shutil.copytree(interrupted.with_name("out.partial"), tmp_path / "out.partial")
    run = Run(tmp_path / "out")
    damage(run.partial / pattern)
    run.start()
    assert_same_run(run, undisturbed())
    again = [layer] if layer is not None else []
    assert run.packings() == dict.fromkeys([*again, 5, 6], 1)


def test_a_bit_that_flipped_in_committed_work_is_not_published(
    tmp_path: Path, interrupted: Path, undisturbed: Callable[..., Path]
) -> None:
    """Its size is right: only the checksum, which the journal holds, can tell."""
    shutil.copytree(interrupted.with_name("out.partial"), tmp_path / "out.partial")
    run = Run(tmp_path / "out")
    _flip(run.partial / "checkpoint" / "layer-00001-rank-00000.safetensors")
    try:
        run.start()
    except RankError as failure:
        assert "AuditError" in failure.report, failure.report
        assert "SHA-256" in failure.report
        assert not run.output.exists()
    else:
        assert_same_run(run, undisturbed())


def test_damage_during_publication_is_done_again(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    run.start(Fault("fifth shard not yet renamed"))
    _truncate(run.partial / "checkpoint" / "model-00002-of-00009.safetensors")
    run.start()
    assert_same_run(run, undisturbed())
    assert sum(run.packings().values()) <= len(LAYERS) + 1


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("phase", LAYER_PHASES)
def test_killed_in_any_phase_of_any_layer(
    phase: str, layer: int, run: Run, undisturbed: Callable[..., Path]
) -> None:
    _check_one_fault(run, Fault(phase, layer), undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [EP2, TP2], ids=["ep2", "tp2"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layer", LAYERS)
def test_any_killed_rank_in_any_layer(
    layout: dict[str, Any], rank: int, layer: int, run: Run, undisturbed: Callable[..., Path]
) -> None:
    phase = ("after part", "in forward", "in pack")[layer % 3]
    _check_one_fault(run, Fault(phase, layer, rank), undisturbed(**layout), **layout)
