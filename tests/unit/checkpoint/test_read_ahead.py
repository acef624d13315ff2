import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.architecture import Architecture, Role, TensorSpec, layer_tensors
from pipeline.checkpoint import read_ahead, safetensors_file
from pipeline.checkpoint.read_ahead import ReadAhead, ReadItem, ReadStoppedError, Request
from pipeline.checkpoint.source import FileSource, open_source
from pipeline.errors import SourceError
from pipeline.sharding import ParallelDims, Shard, shard_of
from tests.unit.checkpoint.tiny import tiny_config, tiny_tensors, write_source

LAYOUTS = [
    ParallelDims(),
    ParallelDims(world=2, ep=2),
    ParallelDims(world=2, tp=2),
    ParallelDims(world=2, tp=2, etp=2),
]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("read-")] == []


def whole(name: str, tensor: torch.Tensor) -> Request:
    shape = tuple(tensor.shape)
    return TensorSpec(name, shape, Role.norm), name, Shard(-1, (), shape)


def made(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> tuple[FileSource, list[Request]]:
    source = open_source(write_source(tmp_path, {}, tensors))
    return source, [whole(name, tensor) for name, tensor in tensors.items()]


def start(
    source: FileSource,
    layers: list[list[Request]],
    *,
    threads: int = 3,
    buffer_bytes: int = 1 << 20,
) -> ReadAhead:
    return ReadAhead(layers, source, threads=threads, buffer_bytes=buffer_bytes, pinned=False)


@pytest.mark.parametrize("dims", LAYOUTS, ids=lambda dims: f"tp{dims.tp} ep{dims.ep} etp{dims.etp}")
@pytest.mark.parametrize(("threads", "buffer_bytes"), [(1, 1), (2, 20_000), (16, 1 << 30)])
def test_every_shard_of_every_layer_in_order(
    tmp_path: Path, dims: ParallelDims, threads: int, buffer_bytes: int
) -> None:
    config = tiny_config(num_key_value_heads=2, n_groups=2)
    source = open_source(write_source(tmp_path, config, tiny_tensors(config), shards=3))
    architecture = Architecture.from_hf_config(config)
    for rank in range(dims.world):
        layers: list[list[Request]] = []
        for layer in range(12):
            cut = [
                (s, shard_of(s, architecture, dims, rank))
                for s in layer_tensors(architecture, layer)
            ]
            layers.append([(spec, spec.name, shard) for spec, shard in cut if shard is not None])
        total = 0
        with start(source, layers, threads=threads, buffer_bytes=buffer_bytes) as ahead:
            for layer in layers:
                for (spec, name, shard), item in zip(layer, ahead.layer(), strict=True):
                    assert (item.spec, item.shard) == (spec, shard)
                    wanted = source.read(name, shard)
                    assert item.tensor.dtype == wanted.dtype
                    assert torch.equal(item.tensor, wanted), name
                    total += wanted.nbytes
                    item.release()
        assert ahead.bytes_read == total
        largest = max(s.parameters for layer in layers for s, _, _ in layer) * 4
        assert ahead.ring_bytes <= max(buffer_bytes + 512, largest)


def test_the_ring_goes_round_while_items_are_released_late_and_out_of_order(
    tmp_path: Path,
) -> None:
    generator = random.Random(1)
    tensors = {
        f"t{i}": torch.randint(0, 255, (generator.randrange(0, 4000),), dtype=torch.uint8)
        for i in range(400)
    }
    source, requests = made(tmp_path, tensors)
    layers = [requests[:1], [], requests[1:150], requests[150:]]
    held: list[ReadItem] = []
    with start(source, layers, threads=8, buffer_bytes=40_000) as ahead:
        assert ahead.ring_bytes < 50_000
        for layer in layers:
            for request, item in zip(layer, ahead.layer(), strict=True):
                held.append(item)
                if len(held) == 5:
                    generator.shuffle(held)
                    for old in held[:4]:  # nothing wrote over it meanwhile
                        assert torch.equal(old.tensor, tensors[old.spec.name])
                        threading.Thread(target=old.release).start()
                    del held[:4]
                assert item.spec is request[0]


def test_layers_are_read_before_they_are_asked_for(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.randn(100) for i in range(6)})
    with start(source, [requests[:3], requests[3:]]) as ahead:
        deadline = time.monotonic() + 20
        while len(ahead._coming) < 6 or any(item._pieces_left for item in ahead._coming):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert ahead.bytes_read == 0
        for _ in range(2):
            for item in ahead.layer():
                item.release()
        assert ahead.waited_s < 1


def test_tensors_larger_than_a_piece_and_than_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = read_ahead.pieces_of
    monkeypatch.setattr(read_ahead, "pieces_of", lambda cut: original(cut, 1000))
    tensors = {"small": torch.randn(3), "large": torch.randn(50_000), "none": torch.empty(0, 7)}
    source, requests = made(tmp_path, tensors)
    with start(source, [requests], threads=5, buffer_bytes=100) as ahead:
        assert ahead.ring_bytes >= 200_000
        for item in ahead.layer():
            assert torch.equal(item.tensor, tensors[item.spec.name])
            item.release()


def test_memory_is_used_again_only_after_the_wait(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.full((128,), i) for i in range(4)})
    copied = threading.Event()
    with start(source, [requests], buffer_bytes=1) as ahead:
        items = ahead.layer()
        first = next(items)
        first.release(wait=lambda: None if copied.wait(20) else pytest.fail("no copy"))
        time.sleep(0.05)
        assert first.tensor.tolist() == [0] * 128
        copied.set()
        second = next(items)
        assert second.tensor.tolist() == [1] * 128
        second.release()


def test_a_failing_wait_reaches_the_consumer(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the device is lost")

    source, requests = made(tmp_path, {f"t{i}": torch.randn(128) for i in range(4)})
    with start(source, [requests], buffer_bytes=1) as ahead:
        items = ahead.layer()
        next(items).release(wait=fail)
        with pytest.raises(RuntimeError, match="the device is lost"):
            next(items)


def test_a_file_that_ends_early_gives_what_came_before_it(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.full((500,), i) for i in range(6)})
    info = source.tensors["t3"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: info.start + 100])
    with start(source, [requests[:3], requests[3:]], threads=8) as ahead:
        for item in ahead.layer():
            assert item.tensor.tolist() == [int(item.spec.name[1])] * 500
        with pytest.raises(SourceError, match=r"model.safetensors: t3: found end of file inside"):
            next(ahead.layer())


def test_a_file_that_is_gone_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, requests = made(tmp_path, {"t": torch.randn(5)})

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file.os, "preadv", broken)
        with (
            start(source, [requests]) as ahead,
            pytest.raises(SourceError, match=r"t: found Input/output error; must be readable"),
        ):
            next(ahead.layer())
    (tmp_path / "model.safetensors").unlink()
    with (
        start(source, [requests]) as ahead,
        pytest.raises(SourceError, match=r"t: found No such file"),
    ):
        next(ahead.layer())


def test_a_misfit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {"t": torch.randn(5)})
    spec, name, _ = requests[0]
    with pytest.raises(SourceError, match="must fit into it"):
        start(source, [[(spec, name, Shard(0, ((0, 6),), (6,)))]])
    with pytest.raises(SourceError, match="no such tensor"):
        start(source, [[(spec, "u", Shard(-1, (), (5,)))]])


def test_leaving_early_stops_everything(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.randn(500) for i in range(50)})
    for taken in (0, 1, 7):
        begun = time.monotonic()
        with start(source, [requests], buffer_bytes=5000) as ahead:  # the ring is full: it waits
            items = ahead.layer()
            for _ in range(taken):
                next(items).release()
        assert time.monotonic() - begun < 10


def test_an_interrupted_consumer_ends_the_threads(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.randn(500) for i in range(50)})

    def consume() -> None:
        with start(source, [requests], buffer_bytes=5000) as ahead:
            next(ahead.layer())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()


def test_close_wakes_a_consumer_in_another_thread(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.randn(500) for i in range(50)})
    ahead = start(source, [requests], buffer_bytes=5000)
    caught: list[BaseException] = []

    def consume() -> None:
        try:
            for _ in ahead.layer():  # never releases, so it gets stuck
                pass
        except ReadStoppedError as error:
            caught.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    time.sleep(0.05)
    ahead.close()
    consumer.join(20)
    assert len(caught) == 1
    ahead.close()  # again: nothing to do


def test_misuse_is_noticed(tmp_path: Path) -> None:
    source, requests = made(tmp_path, {f"t{i}": torch.randn(5) for i in range(4)})
    with start(source, [requests[:2], requests[2:]]) as ahead:
        item = next(ahead.layer())
        item.release()
        with pytest.raises(AssertionError, match="t0"):
            item.release()
        with pytest.raises(AssertionError, match="taken whole"):
            next(ahead.layer())
    with start(source, []) as ahead, pytest.raises(AssertionError, match="more layers"):
        next(ahead.layer())
