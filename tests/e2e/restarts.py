"""Runs that die where a test says, and what a restart owes.

run = Run(tmp_path / "out")
run.start(Fault("after part", 3))
run.start()
assert_same_run(run, undisturbed_output)
"""

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

import pytest

from launch.entry import CONF_DIR
from pipeline import publication, sweep
from pipeline.calibrate import Place, calibrate
from pipeline.checkpoint.journal import Journal
from pipeline.checkpoint.shard_writer import ShardFile, ShardWriter
from pipeline.packing import LayerPacker, LayerPacking
from pipeline.recipe import load_recipe
from pipeline.visit import Visit
from tests.distributed.helpers import RankError, run_ranks
from tests.e2e.harness import golden_config, is_activation_scalar, read_checkpoint


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
            "in pack": lambda: _hook(LayerPacking, "finish", self, self._is_packing),
            "in forward": lambda: _hook(Visit, "_forward", self, self._is_run),
            "before write": lambda: _hook(ShardWriter, "open", self, self._is_opened),
            "after write": lambda: _hook(ShardFile, "_complete", self, self._is_file, after=True),
            "file not yet renamed": lambda: self._in_rename(f"{self._file}*.safetensors"),
            "after part": lambda: _hook(Journal, "write_part", self, self._is_part, after=True),
            "before commit": lambda: _hook(Journal, "commit", self, self._is_unit),
            "marker not yet renamed": lambda: self._in_rename(f"{self.key}.commit.json"),
            "after commit": lambda: _hook(Journal, "commit", self, self._is_unit, after=True),
            "before loss": lambda: _hook(sweep.Sweep, "measure", self),
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

    def _is_opened(self, _writer: object, name: str, *_: object) -> bool:
        return name.startswith(self._file)

    def _is_file(self, file: ShardFile) -> bool:
        return file.name.startswith(self._file)

    def _is_part(self, _journal: object, unit: int | str, part: str, *_: object) -> bool:
        return unit == self.unit and part.startswith("rank")

    def _is_unit(self, _journal: object, unit: int | str, *_: object) -> bool:
        return unit == self.unit

    def _is_packing(self, packing: Any) -> bool:
        return bool(packing._schedule.layer == self.unit)

    def _is_run(self, _visit: object, run: Any, *_: object) -> bool:
        return bool(run.schedule.layer == self.unit)

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
            publication.write_html = _write_no_plots  # half of a tiny run's time
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
        """Number of packings begun so far, by layer."""
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
        begin = LayerPacker.begin

        def counted(packer: LayerPacker, schedule: Any, weights: Any) -> LayerPacking:
            with self.log.open("a") as log:
                log.write(f"{rank} {schedule.layer}\n")
            return begin(packer, schedule, weights)

        LayerPacker.begin = counted  # type: ignore[method-assign]


def _write_no_plots(_report: object, path: Path) -> None:
    path.write_text("")


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
    changed = [name for name in ours if ours[name] != theirs[name]]
    assert not changed, f"other bytes in {changed}"
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
