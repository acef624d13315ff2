"""Snapshots: the same bits come back, when one is due, which are kept, what a fault costs."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.calibration.hidden import HiddenStore, MicroBatch
from pipeline.checkpoint import shard_writer
from pipeline.checkpoint.safetensors_file import CHUNK_BYTES
from pipeline.checkpoint.shard_writer import ShardWriter
from pipeline.checkpoint.snapshot_files import SnapshotFile, file_name, load, unwritten_bytes
from pipeline.checkpoint.snapshot_writer import DeviceTensor, SnapshotWriter
from pipeline.checkpoint.writable import dtype_and_shape
from pipeline.config_parts import SnapshotConfig
from pipeline.errors import ConfigError, OutputError
from pipeline.evaluation.groups import Group, GroupStreams, groups_of
from pipeline.evaluation.in_sweep import InSweep
from pipeline.evaluation.records import ServingMode
from pipeline.evaluation.scales import InputScale
from pipeline.evaluation.streams import Streams
from pipeline.memory import MemoryWish
from pipeline.nvfp4.formats import Format
from pipeline.runtime.collectives import Ranks
from pipeline.runtime.lanes import Lane
from pipeline.sharding import ParallelDims
from pipeline.snapshots import Snapshots, planned_bytes
from tests.unit.test_sweep_units import job_of

CPU = torch.device("cpu")
ONE = Ranks(None, None, None, CPU)
JOB = job_of("nvfp4_four_over_six")
GROUPS = sum(len(groups_of(schedule, JOB.architecture)) for schedule in JOB.schedules)
VOCAB, HIDDEN, SEQ_LEN = 31, JOB.architecture.hidden_size, 16
GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(VOCAB, (5, SEQ_LEN), generator=GENERATOR)
EMBEDDING = torch.randn(VOCAB, HIDDEN, generator=GENERATOR)
SCALES = {"in_proj": InputScale(Format.nvfp4, 5e-4)}
KEY = {"layout": {"tp": 1}, "job": "a"}
Layer = Callable[[MicroBatch], torch.Tensor]


def store_of(ids: torch.Tensor = IDS, micro_batch: int = 2) -> HiddenStore:
    options: dict[str, Any] = {"micro_batch": micro_batch, "dtype": torch.float32, "device": CPU}
    return HiddenStore(ids, EMBEDDING, ParallelDims(), 0, **options)


def layer(batch: MicroBatch) -> torch.Tensor:
    """In place, as slots do."""
    return batch.hidden.mul_(1.1).sub_(0.01)


def hidden_of(store: HiddenStore) -> list[torch.Tensor]:
    return [batch.hidden.clone() for batch in store.batches]


def all_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def snapshots_of(tmp_path: Path, store: HiddenStore | None = None, **options: Any) -> Snapshots:
    chosen = {name: options.pop(name) for name in ("layers", "minutes", "keep") if name in options}
    values = {"layers": 1, "minutes": None, "keep": 2, **chosen}
    return Snapshots(
        tmp_path / "snapshots",
        options.pop("key", KEY),
        options.pop("ranks", ONE),
        SnapshotConfig(**values),
        store or store_of(),
        options.pop("evaluation", None),
        options.pop("schedules", ()),
        **{"in_background": False, **options},
    )


def kept(tmp_path: Path) -> list[int]:
    return sorted(int(path.parent.name[-5:]) for path in tmp_path.glob("snapshots/*/snapshot.json"))


def swept(snapshots: Snapshots, store: HiddenStore, layers: range) -> None:
    for index in layers:
        store.update(layer)
        snapshots.after_layer(index, committed=index)


# ---- the same bits


def test_hidden_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    store = store_of()
    swept(snapshots_of(tmp_path, store), store, range(3))
    again = store_of()
    assert snapshots_of(tmp_path, again).restore(range(3)) == 2
    assert all_equal(hidden_of(again), hidden_of(store))
    store.update(layer)
    again.update(layer)
    assert all_equal(hidden_of(again), hidden_of(store))


class LinearSlot:
    """A layer that adds a product to its input in place, with or without quantized inputs."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5

    def forward(self, hidden: torch.Tensor, tap: Any = None, quantizer: Any = None) -> torch.Tensor:
        x = hidden if quantizer is None else quantizer.quantize("in_proj", hidden)
        return hidden.add_(x @ self.matrix)


class Served:
    """Weights whose quantization changes nothing."""

    def dequantize(self, taps: Any) -> None:
        pass

    def only(self, taps: Any) -> Any:
        return contextlib.nullcontext()


def evaluation_of() -> InSweep:
    sizes: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "backend": "reference"}
    options = {"layers": 4, "micro_batch": 2, "modes": tuple(ServingMode), **sizes}
    streams = Streams(IDS, EMBEDDING, ParallelDims(), 0, **options)
    options = {"tokens_at_a_time": SEQ_LEN, "parameters": 1, **sizes}
    groups = GroupStreams(IDS[:2, :8].contiguous(), EMBEDDING, ParallelDims(), 0, **options)
    return InSweep(
        *(JOB.architecture, ParallelDims(), ONE, streams, "reference", "", torch.float32), groups
    )


def group_of(index: int) -> Group:
    return Group(index, "mamba", "in_proj", frozenset({"in_proj"}), ())


def evaluate(evaluation: InSweep, index: int) -> None:
    """One layer, with a group of its own."""
    streams, slot = evaluation.streams, LinearSlot(index)
    assert evaluation.groups is not None
    streams.bf16(slot)  # type: ignore[arg-type]
    evaluation.groups.visit(slot, Served(), SCALES, [group_of(index)])  # type: ignore[arg-type]
    for mode in streams.modes:
        streams.quantized(index, mode, LinearSlot(10 + index), SCALES)  # type: ignore[arg-type]
    streams.end_layer()


def test_streams_come_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = "pipeline.evaluation.in_sweep.groups_of"
    monkeypatch.setattr(groups, lambda schedule, _: [group_of(schedule)])
    evaluation, store = evaluation_of(), store_of()
    evaluation._seconds_before = 3.5
    snapshots = snapshots_of(tmp_path, store, evaluation=evaluation, layers=2)
    for index in range(2):
        evaluate(evaluation, index)
        snapshots.after_layer(index, committed=index)
    before = {name: tensor.clone() for name, tensor in evaluation.state().items()}
    assert any(name.startswith("groups.00001") for name in before)
    assert before["streams.sums"].abs().sum() > 0
    again = evaluation_of()
    restored = snapshots_of(tmp_path, evaluation=again, schedules=range(4))
    assert restored.restore({0, 1, "outer"}) == 1
    for index in range(2, 4):
        evaluate(evaluation, index)
        evaluate(again, index)
    for name, tensor in evaluation.state().items():
        assert torch.equal(tensor, again.state()[name]), name
        assert name == "seconds" or name not in before or not torch.equal(before[name], tensor)
    assert again.state()["seconds"] == 3.5
    assert again.streams.errors(ONE) == evaluation.streams.errors(ONE)
    assert again.streams.clipped(ONE) == evaluation.streams.clipped(ONE)
    assert evaluation.streams.clipped(ONE)[ServingMode.w4a4] > 0
    assert [g.layer for g in again.groups.groups] == [0, 1, 2, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5, 7, generator=GENERATOR).bfloat16(),
        torch.randn(5, 7, 3, generator=GENERATOR).transpose(0, 2),
        torch.arange(CHUNK_BYTES // 8 + 3, dtype=torch.float64),
        torch.empty(0, 4),
    ],
    ids=["bfloat16", "not-contiguous", "two-pieces", "empty"],
)
def test_a_tensor_of_a_device_comes_in_pieces(tensor: torch.Tensor, tmp_path: Path) -> None:
    read = threading.Event()
    piece = torch.empty(1 << 20, dtype=torch.uint8)
    data = DeviceTensor(tensor, Lane(CPU), piece, read.set)
    with ShardWriter(tmp_path, threads=2) as writer:
        file = writer.open("x.safetensors", {"x": dtype_and_shape(data)})
        file.put("x", data)
        record = file.finish().result()
    assert read.is_set()
    found = load(tmp_path / "x.safetensors", SnapshotFile(record.bytes, record.sha256))
    assert torch.equal(found["x"], tensor)
    assert found["x"].dtype is tensor.dtype


# ---- beside the next layer


def test_what_is_being_written_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes nothing until it is told to: the layer waits, and goes on."""
    gate = threading.Event()
    write = shard_writer.write_all

    def gated(descriptor: int, data: Any) -> None:
        gate.wait()
        write(descriptor, data)

    monkeypatch.setattr(shard_writer, "write_all", gated)
    store = store_of()
    snapshots = snapshots_of(tmp_path, store, in_background=True)
    store.update(layer)
    snapshots.after_layer(0, committed=0)
    expected, done = hidden_of(store), []
    thread = threading.Thread(target=store.update, args=(layer, done.append), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert (done, kept(tmp_path)) == ([], [])
    assert all_equal(hidden_of(store), expected)
    gate.set()
    thread.join(timeout=20)
    assert done == [0, 1, 2]
    snapshots.finish()
    assert kept(tmp_path) == [0]
    again = store_of()
    assert snapshots_of(tmp_path, again).restore({0}) == 0
    assert all_equal(hidden_of(again), expected)


def test_it_counts_once_its_layer_is_committed(tmp_path: Path) -> None:
    snapshots = snapshots_of(tmp_path, in_background=True)
    snapshots.after_layer(3, committed=1)
    assert snapshots._writer is not None
    snapshots._writer._file.result()
    snapshots.after_layer(4, committed=2)
    assert kept(tmp_path) == []
    snapshots.after_layer(5, committed=3)
    assert kept(tmp_path) == [3]
    snapshots.finish()
    assert kept(tmp_path) == [3, 5]


def test_what_was_on_its_way_at_the_end_is_removed_by_the_next_start(tmp_path: Path) -> None:
    with snapshots_of(tmp_path, in_background=True) as snapshots:
        snapshots.after_layer(0, committed=-1)
    assert (tmp_path / "snapshots" / "layer-00000").is_dir()
    assert kept(tmp_path) == []
    assert snapshots_of(tmp_path).restore({0}) == -1
    assert not list((tmp_path / "snapshots").iterdir())


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_stops_nothing(
    in_background: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever of the file was written: nobody waits for ever, and nothing is left."""
    write, written = shard_writer.write_all, []

    def full(descriptor: int, data: Any) -> None:
        written.append(len(data))
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        write(descriptor, data)

    monkeypatch.setattr(shard_writer, "write_all", full)
    store = store_of()
    snapshots = snapshots_of(tmp_path, store, in_background=in_background, minutes=60, layers=9)
    store.update(layer)
    snapshots.after_layer(9, committed=9)
    store.update(layer)
    snapshots.after_layer(10, committed=10, now=False)
    if in_background:
        snapshots.finish()
    assert kept(tmp_path) == []
    assert not list((tmp_path / "snapshots").iterdir())
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("no snapshot after layer 9: ")
    assert "rank-00000.safetensors" in warning
    assert "No space left" in warning


def test_a_file_that_cannot_be_opened_lets_go_of_everything(tmp_path: Path) -> None:
    writer = SnapshotWriter(0, tmp_path / "missing", 0, store_of().state(), CPU)
    for name in ("00000", "00001", "00002"):
        writer.wait_for(name)()
    writer.wait_for_all()
    assert writer.is_done
    with pytest.raises(OutputError, match=r"rank-00000\.safetensors"):
        writer.result()


def test_no_snapshot_takes_the_room_that_the_checkpoint_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of()
    snapshots = snapshots_of(tmp_path, store, unwritten=lambda: 10**18)
    swept(snapshots, store, range(1))
    assert kept(tmp_path) == []
    assert "beside 1000000000.0 GB of the checkpoint" in caplog.text
    (tmp_path / "a").write_bytes(b"123")
    assert (unwritten_bytes(tmp_path, 10), unwritten_bytes(tmp_path, 1)) != (10, 1)
    assert unwritten_bytes(tmp_path, 10**9) <= 10**9 - 3
    assert unwritten_bytes(tmp_path, 1) == 0


# ---- when, and which are kept


def taken(tmp_path: Path, seconds: list[float], **options: Any) -> list[int]:
    """Layers after which snapshots were taken, each layer taking so long."""
    clock = Clock()
    snapshots = snapshots_of(tmp_path, clock=clock, keep=99, **options)
    snapshots.restore(set())
    for index, duration in enumerate(seconds):
        clock.s += duration
        snapshots.after_layer(index, committed=index)
    return kept(tmp_path)


def test_every_so_many_layers_or_minutes(tmp_path: Path) -> None:
    minute = [60.0] * 12
    assert taken(tmp_path / "a", minute, layers=5) == [4, 9]
    assert taken(tmp_path / "b", minute, layers=None, minutes=3) == [2, 5, 8, 11]
    assert taken(tmp_path / "c", minute, layers=4, minutes=3) == [2, 5, 8, 11]
    assert taken(tmp_path / "d", minute, layers=2, minutes=3) == [1, 3, 5, 7, 9, 11]
    assert taken(tmp_path / "e", minute, layers=None, minutes=None) == []
    assert taken(tmp_path / "f", [1, 1, 999, 1, 1], layers=None, minutes=10) == [2]


def test_now_means_now_unless_nobody_wants_any(tmp_path: Path) -> None:
    for name, minutes in (("never", None), ("rarely", 999)):
        folder = tmp_path / name
        snapshots = snapshots_of(folder, layers=None, minutes=minutes, in_background=True)
        snapshots.after_layer(2, committed=2)
        snapshots.after_layer(3, committed=3, now=True)
        assert kept(folder) == ([3] if minutes else [])


def test_now_completes_what_was_on_its_way(tmp_path: Path) -> None:
    store = store_of()
    snapshots = snapshots_of(tmp_path, store, in_background=True)
    snapshots.after_layer(2, committed=0)
    store.update(layer)
    snapshots.after_layer(3, committed=3, now=True)
    assert kept(tmp_path) == [2, 3]


def test_the_newest_are_kept_and_those_of_another_key_go_first(tmp_path: Path) -> None:
    store = store_of()
    swept(snapshots_of(tmp_path, store, keep=3), store, range(5))
    assert kept(tmp_path) == [2, 3, 4]
    other = snapshots_of(tmp_path, store, keep=3, key={**KEY, "job": "b"})
    assert other.restore(range(5)) == -1
    assert kept(tmp_path) == [2, 3, 4], "the other job may come back"
    swept(other, store, range(2))
    assert kept(tmp_path) == [0, 1, 4]
    assert snapshots_of(tmp_path, store).restore(range(5)) == 4
    assert snapshots_of(tmp_path, store, key={**KEY, "job": "b"}).restore(range(5)) == 1


# ---- what a restart makes of them


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Snapshots after layers 0, 1 and 2."""
    store = store_of()
    swept(snapshots_of(tmp_path, store, keep=3), store, range(3))
    return tmp_path


def test_only_what_is_committed_is_skipped(three: Path) -> None:
    assert snapshots_of(three).restore({0, 1, "outer"}) == 1
    assert kept(three) == [0, 1], "the scales of layer 2 may change"
    assert snapshots_of(three).restore({1, 2}) == -1
    assert kept(three) == []


def test_another_key_is_said_in_one_line(three: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    other = snapshots_of(three, key={"layout": {"tp": 2}, "job": "a"})
    assert other.restore(range(3)) == -1
    (line,) = caplog.messages
    assert line == (
        "the snapshot after layer 2 cannot be used here, so the layers up to there are passed "
        "through again: layout.tp: was 1, now 2"
    )


def _flip_first_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_flip_first_byte, "another checksum"),
        (lambda path: path.write_bytes(b""), "0 bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes instead of"),
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: (path.unlink(), path.mkdir()), "a directory, not a regular file"),
    ],
    ids=["bit", "empty", "longer", "missing", "directory"],
)
def test_damage_is_named_and_the_older_one_taken(
    damage: Callable[[Path], Any], fault: str, three: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = three / "snapshots" / "layer-00002" / file_name(0)
    damage(path)
    store = store_of()
    assert snapshots_of(three, store).restore(range(3)) == 1
    expected = store_of()
    expected.update(layer)
    expected.update(layer)
    assert all_equal(hidden_of(store), hidden_of(expected))
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"the snapshot after layer 2 is of no use: {path}: ")
    assert fault in warning
    assert kept(three) == [0, 1]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"layer": 7, "key": {}, "files": []}', '{"layer": 2, "key": 1}']
)
def test_a_torn_marker_is_no_marker(text: str, three: Path) -> None:
    (three / "snapshots" / "layer-00002" / "snapshot.json").write_text(text)
    assert snapshots_of(three).restore(range(3)) == 1
    assert kept(three) == [0, 1]


# ---- what they take


def planned(dims: ParallelDims | None = None, snapshots: int = 1, **wish: int) -> int:
    job = job_of("nvfp4_four_over_six", dims)
    return planned_bytes(
        job,
        tokens=(len(IDS), SEQ_LEN),
        compute_bytes=4,
        wish=MemoryWish(**wish),  # type: ignore[arg-type]
        snapshots=snapshots,
    )


def test_the_planned_bytes_are_those_of_the_states() -> None:
    """After the last layer, but for a few sums."""
    hidden = sum(tensor.nbytes for tensor in store_of().state().values())
    assert planned() == hidden
    evaluation = evaluation_of()
    for index in range(GROUPS):
        evaluate(evaluation, index % 4)
    sums = ("streams.sums", "streams.counts", "streams.reach", "seconds")
    streams = sum(t.nbytes for name, t in evaluation.state().items() if name not in sums)
    wish = {"evaluated": len(IDS), "group_sequences": 2, "group_seq_len": 8}
    assert planned(**wish) == hidden + streams
    assert planned(snapshots=3, **wish) == 3 * (hidden + streams)
    # Five sequences on two replicas: one is there twice.
    assert planned(ParallelDims(world=4, tp=2)) == hidden * 6 // 5
    assert planned(ParallelDims(world=2, tp=2, ep=2), **wish) == hidden + streams


def test_a_weight_only_recipe_takes_none() -> None:
    wish = MemoryWish(evaluated=8, group_sequences=1, group_seq_len=512)
    assert planned_bytes(JOB, tokens=(0, 0), compute_bytes=4, wish=wish) == 0


@pytest.mark.parametrize("name", ["layers", "minutes", "keep"])
def test_options_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"snapshots\.{name}: found 0; must be positive"):
        SnapshotConfig(**{name: 0})
