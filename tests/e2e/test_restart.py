"""A run that dies anywhere and is started again ends with the same bytes, and keeps its work."""

import itertools
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.helpers import RankError
from tests.e2e.harness import GOLDEN, read_checkpoint
from tests.e2e.restarts import Fault, Run, assert_same_run, assert_same_weights, published

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


def _check_one_fault(run: Run, fault: Fault, expected: Path, **layout: Any) -> None:
    run.start(fault, **layout)
    assert not run.output.exists()
    kept = run.committed
    run.start(**layout)
    assert_same_run(run, expected)
    for rank in range(layout.get("world", 1)):
        again = run.packings(rank) - Counter(LAYERS)
        assert again in (Counter(), Counter([fault.unit]))
        assert not [layer for layer in again if f"layer-{layer:05d}.commit.json" in kept]


def test_killed_in_every_phase_of_a_layer(run: Run, undisturbed: Callable[..., Path]) -> None:
    for phase in LAYER_PHASES:
        kept = run.committed
        run.start(Fault(phase, 3))
        assert kept.items() <= run.committed.items(), phase
    run.start()
    assert_same_run(run, undisturbed())
    packed_in_vain = len(LAYER_PHASES) - 1  # the last one commits
    assert run.packings() == dict.fromkeys(LAYERS, 1) | {3: packed_in_vain + 1}


def test_killed_outside_the_layers(run: Run, undisturbed: Callable[..., Path]) -> None:
    run.start(Fault("file not yet renamed", "outer"))
    run.start(Fault("before commit", "outer"))
    assert not run.packings()
    for phase, unit in (
        ("before loss", ""),
        ("before commit", "loss"),
        ("marker not yet renamed", "loss"),
        ("after commit", "loss"),
    ):
        run.start(Fault(phase, unit))
        assert not run.output.exists(), phase
    run.start()
    assert_same_run(run, undisturbed())
    assert run.packings() == dict.fromkeys(LAYERS, 1)


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


@pytest.mark.parametrize(
    ("damage", "pattern", "layer"),
    [
        (_truncate, "journal/layer-00002.part.rank00000.json", 2),
        (_flip, "journal/layer-00002.part.scalars.json", 2),
        (_truncate, "journal/layer-00002.commit.json", 2),
        (_truncate, "checkpoint/layer-00001-rank-00000.safetensors", 1),
        (Path.unlink, "checkpoint/layer-00001-rank-00000.safetensors", 1),
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
    report = ""
    try:
        run.start()
    except RankError as failure:
        report = failure.report
    if run.output.exists():
        assert_same_run(run, undisturbed())
    else:
        assert "AuditError" in report
        assert "SHA-256" in report


def test_damage_during_publication_is_done_again(
    run: Run, undisturbed: Callable[..., Path]
) -> None:
    run.start(Fault("fifth shard not yet renamed"))
    _truncate(run.partial / "checkpoint" / "model-00002-of-00009.safetensors")
    run.start()
    assert_same_run(run, undisturbed())
    assert sum(run.packings().values()) <= len(LAYERS) + 1


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "layer"), zip(LAYER_PHASES, itertools.cycle(LAYERS)))
def test_killed_in_a_fresh_run(
    phase: str, layer: int, run: Run, undisturbed: Callable[..., Path]
) -> None:
    """Each phase in some layer, each layer in some phase."""
    _check_one_fault(run, Fault(phase, layer), undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_any_killed_rank_in_any_layer(
    layer: int, run: Run, undisturbed: Callable[..., Path]
) -> None:
    """Both layouts, both ranks and three phases take turns."""
    layout, rank = ((EP2, 0), (TP2, 0), (EP2, 1), (TP2, 1))[layer % 4]
    phase = ("after part", "in forward", "in pack")[layer % 3]
    _check_one_fault(run, Fault(phase, layer, rank), undisturbed(**layout), **layout)
