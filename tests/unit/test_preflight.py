"""What any rank finds before the run is told by all of them, once; healthy ranks say nothing."""

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.entry import CONF_DIR
from pipeline import preflight, preflight_source
from pipeline.config import CalibrateConfig
from pipeline.errors import JointError, LayersweepError
from pipeline.preflight import Preflight, needs_of
from pipeline.preflight_source import extents_of, extents_of_all, probe
from pipeline.preparation import Place, Prepared, prepare_run
from pipeline.recipe import load_recipe
from tests.distributed.helpers import RankError, run_ranks
from tests.e2e.harness import golden_config
from tests.e2e.models import Files, write_checkpoint, write_token_ids

SIZE = {"num_sequences": 4, "seq_len": 32, "loss_sequences": 1}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", Files(shards=3))


@pytest.fixture
def config(tmp_path: Path, source: Path) -> CalibrateConfig:
    return golden_config(
        tmp_path / "there" / "out",
        checkpoint=str(source),
        data=str(write_token_ids(tmp_path / "ids.npy", 4, 32)),
        calibration=SIZE,
    )


def start(
    config: CalibrateConfig,
    world: int = 2,
    spoil: Callable[[int], CalibrateConfig | None] = lambda rank: None,
) -> list[str]:
    """What each rank raises; `spoil` may change anything in a rank's process, or its options."""
    load_recipe(config.recipe, CONF_DIR / "recipe")  # imports Model Optimizer before forking

    def job(rank: int) -> str:
        mine = spoil(rank) or config
        place = Place(rank, world, rank)
        ours = Preflight(place, CONF_DIR, join_s=5.0)
        try:
            with ours.sharing():
                prepared = prepare_run(mine, CONF_DIR, place)
            ours.check_run(mine, prepared)
        except JointError as error:
            return str(error)
        return ""

    return run_ranks(job, world)


def the_one(said: list[str]) -> str:
    """What all ranks say."""
    assert len(set(said)) == 1, said
    assert said[0]
    return said[0]


def prepare(config: CalibrateConfig, world: int = 1, rank: int = 0) -> Prepared:
    return prepare_run(config, CONF_DIR, Place(rank, world, rank))


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def as_on_another_host() -> None:
    """From now on, mounts of this process are its own."""
    os.unshare(os.CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def cover(path: Path, content: bytes) -> None:
    """This process sees another file under a path."""
    other = path.with_name(f"other-{path.name}")
    other.write_bytes(content)
    subprocess.run(["mount", "--bind", other, path], check=True)


# --- all ranks are well


def test_healthy_ranks_say_nothing_and_leave_nothing(
    config: CalibrateConfig, tmp_path: Path
) -> None:
    assert start(config, 4) == [""] * 4
    assert list((tmp_path / "there").iterdir()) == []


def test_a_rehearsal_needs_no_room(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("a rehearsal looked at the disk")

    monkeypatch.setattr(preflight, "look_at_room", explode)
    monkeypatch.setattr(preflight, "needs_of", explode)
    rehearsal = dataclasses.replace(config, output="discard", report=str(tmp_path / "report"))
    assert start(rehearsal) == [""] * 2
    assert not (tmp_path / "report").exists()
    assert not list(tmp_path.glob(".layersweep*"))


# --- each refusal


def test_other_versions_on_one_rank(config: CalibrateConfig) -> None:
    def spoil(rank: int) -> None:
        if rank == 2:
            found = preflight.software() | {"torch": "1.0", "triton": "2.0"}
            preflight.software = lambda: found

    said = the_one(start(config, 3, spoil))
    assert said.startswith("2 reasons not to start\n  - software: found torch is ")
    assert "on ranks 0-1 on " in said
    assert "but 1.0 on rank 2 on " in said
    assert "triton is " in said
    assert "To mend it: install the same versions on all hosts" in said


def test_another_checkout_of_the_same_version(config: CalibrateConfig) -> None:
    def spoil(rank: int) -> None:
        if rank:
            preflight.code_digest = lambda conf_dir: "0123"

    said = the_one(start(config, 2, spoil))
    assert "Layersweep's own files is " in said
    assert "but 0123 on rank 1" in said


def test_other_options_on_one_rank(config: CalibrateConfig) -> None:
    def spoil(rank: int) -> CalibrateConfig | None:
        other = dataclasses.replace(config.calibration, num_sequences=5)
        return dataclasses.replace(config, calibration=other) if rank else None

    said = the_one(start(config, 2, spoil))
    assert said.startswith("calibration.num_sequences is 4 on rank 0 on ")
    assert ", but 5 on rank 1 on " in said
    assert "same command line" in said


def test_a_source_that_one_host_lacks(config: CalibrateConfig, source: Path) -> None:
    """A rank that cannot even open it is heard, and nobody waits for it."""

    def spoil(rank: int) -> CalibrateConfig | None:
        return dataclasses.replace(config, checkpoint="/nowhere/at/all") if rank == 1 else None

    began = time.monotonic()
    said = the_one(start(config, 3, spoil))
    assert said.startswith("rank 1 on ")
    assert "/nowhere/at/all: found no such directory" in said
    assert time.monotonic() - began < 20


def test_a_refusal_of_rank_0_alone(config: CalibrateConfig) -> None:
    """It makes no token then, and the others must not wait for one."""

    def spoil(rank: int) -> CalibrateConfig | None:
        return None if rank else dataclasses.replace(config, recipe="no_such_recipe")

    said = the_one(start(config, 2, spoil))
    assert said.startswith("rank 0 on ")
    assert "no_such_recipe" in said


def test_the_same_refusal_of_all_ranks_is_said_without_ranks(config: CalibrateConfig) -> None:
    missing = dataclasses.replace(config, checkpoint="/nowhere/at/all")
    assert the_one(start(missing, 2)).startswith("checkpoint /nowhere/at/all: ")


def test_a_fault_of_one_rank_keeps_its_traceback() -> None:
    def refuse(rank: int) -> str:
        ours = Preflight(Place(rank, 2, rank), CONF_DIR)
        try:
            with ours.sharing():
                if rank:
                    raise TypeError("nobody thought of this")
                raise LayersweepError("rank 0 has its own reason")
        except (JointError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    first, second = run_ranks(refuse, 2)
    assert second == "TypeError: nobody thought of this"
    assert first.startswith("JointError: 2 reasons not to start")
    assert "unexpected fault: TypeError: nobody thought of this" in first
    assert "rank 0 has its own reason" in first


def test_a_rank_that_does_not_come(config: CalibrateConfig) -> None:
    def job(rank: int) -> str:
        if rank in (1, 2):
            return "late"
        ours = Preflight(Place(rank, 4, rank), CONF_DIR, join_s=1.0)
        prepared = prepare_run(config, CONF_DIR, Place(rank, 4, rank))
        with pytest.raises(JointError) as caught:
            ours.check_run(config, prepared)
        return str(caught.value)

    load_recipe(config.recipe, CONF_DIR / "recipe")
    said = run_ranks(job, 4)
    assert said[1:3] == ["late", "late"]
    assert said[0] == said[3]
    assert said[0].startswith("ranks 1-2: found nothing heard of them; all 4 ranks must come")


def test_rank_0_does_not_answer(config: CalibrateConfig) -> None:
    def job(rank: int) -> None:
        if rank:
            ours = Preflight(Place(rank, 2, rank), CONF_DIR, answer_s=0.5)
            ours.check_run(config, prepare_run(config, CONF_DIR, Place(rank, 2, rank)))
        time.sleep(30)  # until the other one has failed

    load_recipe(config.recipe, CONF_DIR / "recipe")
    with pytest.raises(RankError, match="rank 0: found no answer") as caught:
        run_ranks(job, 2)
    assert "ClusterError" in caught.value.report


# --- files and file systems


@needs_root
def test_a_shard_that_is_truncated_on_one_host(config: CalibrateConfig, source: Path) -> None:
    """After its header was read: the sizes of the first look were right."""
    shard = source / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()

    def spoil(rank: int) -> None:
        if rank == 1:
            original = preflight.extents_of

            def later(*args: Any) -> Any:
                as_on_another_host()
                cover(shard, data[: len(data) // 2])
                return original(*args)

            preflight.extents_of = later

    said = the_one(start(config, 2, spoil))
    assert said.startswith("rank 1 on ")
    assert f"{shard}: found {len(data) // 2:,} bytes; this rank reads up to byte " in said


@needs_root
def test_hosts_with_different_copies_of_the_source(config: CalibrateConfig, source: Path) -> None:
    """Headers and sizes are alike."""
    shard = source / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1

    def spoil(rank: int) -> None:
        if rank == 1:
            as_on_another_host()
            cover(shard, bytes(data))

    said = the_one(start(config, 2, spoil))
    assert said.startswith("checkpoint: found size and digest of the last bytes of source/model-0")
    assert "must read the same source" in said


@needs_root
def test_an_output_that_is_not_shared(
    config: CalibrateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "TOKEN_S", 0.5)

    def spoil(rank: int) -> None:
        if rank == 1:
            (tmp_path / "there").mkdir(exist_ok=True)
            as_on_another_host()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "there"], check=True)

    said = the_one(start(config, 2, spoil))
    assert f"output {tmp_path}/there: found a file that rank 0 on " in said
    assert "is not seen by rank 1 on " in said
    assert "mounted on every host" in said
    assert list((tmp_path / "there").iterdir()) == []


@needs_root
@pytest.mark.parametrize(
    ("options", "found"),
    [("size=64k", "MB free on its file system"), ("size=9m,nr_inodes=9", "more files (inodes)")],
)
def test_an_output_without_room(
    options: str, found: str, config: CalibrateConfig, tmp_path: Path
) -> None:
    with mounted(tmp_path / "small", options) as small:
        full = dataclasses.replace(config, output=str(small / "out"))
        said = the_one(start(full))
        assert said.startswith(f"output {small}: found ")
        assert found in said
        assert list(small.iterdir()) == []


@needs_root
def test_several_at_once(config: CalibrateConfig, tmp_path: Path) -> None:
    def spoil(rank: int) -> CalibrateConfig | None:
        if rank == 1:
            preflight.software = lambda: {"torch": "1.0"}
        if rank == 2:
            return dataclasses.replace(full, read_threads=3)
        return dataclasses.replace(full, checkpoint="/nowhere") if rank == 3 else full

    with mounted(tmp_path / "small", "size=64k") as small:
        full = dataclasses.replace(config, output=str(small / "out"))
        said = the_one(start(full, 4, spoil))
    for fragment in (
        "reasons not to start\n",
        "  - rank 3 on ",
        "/nowhere: found no such directory",
        "torch is ",
        "but 1.0 on rank 1 on ",
        "read_threads is 8 on ranks 0-1 on ",
        "but 3 on rank 2 on ",
        "free on its file system",
    ):
        assert said.count(fragment) == 1, (fragment, said)


def test_what_is_written_already_needs_no_room(config: CalibrateConfig) -> None:
    prepared = prepare(config)
    whole = needs_of(config, prepared)
    assert whole.bytes > prepared.plan.quantized_bytes
    prepared.work.files.mkdir(parents=True)
    (prepared.work.files / "layer-00000-rank-00000.safetensors").write_bytes(bytes(10_000))
    assert needs_of(config, prepared).bytes == whole.bytes - 10_000


# --- looking at the source


def test_probe_names_every_file_that_is_at_fault(source: Path, config: CalibrateConfig) -> None:
    extents = extents_of_all(prepare(config).source)  # type: ignore[arg-type]
    assert [path.name for path in extents] == sorted(
        path.name for path in source.glob("model-*.s*")
    )
    assert probe(extents).faults == []
    assert len(probe(extents).marks) == 3
    first, second, third = extents
    first.unlink()
    os.truncate(second, extents[second][1] - 1)
    third.unlink()
    third.mkdir()
    faults = probe(extents).faults
    assert len(faults) == 3
    assert f"{first}: found No such file or directory" in faults[0]
    assert f"{second}: found {extents[second][1] - 1:,} bytes; this rank reads up to" in faults[1]
    assert f"{third}: found a directory, not a regular file" in faults[2]


def test_probe_does_not_wait_for_a_file_system_that_hangs(
    source: Path, config: CalibrateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = extents_of_all(prepare(config).source)  # type: ignore[arg-type]
    look_at, hanging = preflight_source._look_at, list(extents)[1]

    def slow(path: Path, extent: tuple[int, int]) -> tuple[str, str]:
        time.sleep(2.0 if path == hanging else 0.0)
        return look_at(path, extent)

    monkeypatch.setattr(preflight_source, "_look_at", slow)
    began = time.monotonic()
    faults, marks = probe(extents, patience_s=0.4)
    assert time.monotonic() - began < 1.5
    assert len(marks) == 2
    assert faults == [
        f"{source}: found no answer for 1 files, the first {hanging.name}, in 0 s; a file system "
        "must answer. To mend it: see whether it hangs (ls of the directory on that host), mount "
        "it again"
    ]


def test_extents_hold_what_the_ranks_read_and_together_all_of_it(config: CalibrateConfig) -> None:
    for recipe in ("nvfp4_four_over_six", "nvfp4_weight_only"):
        asked = dataclasses.replace(config, recipe=recipe)
        prepared = prepare(asked, world=2)
        source: Any = prepared.source
        every = extents_of_all(source)
        mine = [extents_of(prepared.job, source, rank) for rank in (0, 1)]
        for path, (first, stop) in every.items():
            parts = [extents[path] for extents in mine if path in extents]
            assert min(part[0] for part in parts) == first
            assert max(part[1] for part in parts) == stop
