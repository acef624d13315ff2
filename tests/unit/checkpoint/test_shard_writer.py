import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import durable, shard_writer
from pipeline.checkpoint.safetensors_file import read_header
from pipeline.checkpoint.writer import (
    FileRecord,
    HostBuffers,
    RawTensor,
    ShardFile,
    ShardWriter,
    Writable,
    write_safetensors,
)
from pipeline.errors import NumericsError, OutputError, SourceError

NAME = "x.safetensors"


class Streamed:
    """Pieces in a buffer that the next piece replaces, as a file's are."""

    def __init__(self, tensor: torch.Tensor, dtype: str, piece: int) -> None:
        self.dtype, self.shape = dtype, tuple(tensor.shape)
        self._bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._piece = piece

    @property
    def nbytes(self) -> int:
        return len(self._bytes)

    def chunks(self) -> Iterator[memoryview]:
        buffer = bytearray(self._piece)
        for start in range(0, self.nbytes, self._piece):
            part = self._bytes[start : start + self._piece]
            buffer[: len(part)] = part
            yield memoryview(buffer)[: len(part)]


def samples() -> dict[str, Writable]:
    every_byte = torch.arange(256, dtype=torch.uint8)
    return {
        "codes": every_byte.reshape(16, 16),
        "scalar": torch.tensor(1.5),
        "scales": every_byte.view(torch.float8_e4m3fn).reshape(4, 64),
        "cut": torch.randn(6, 4)[::2, 1:],
        "raw": RawTensor("BF16", (2, 2), b"01234567"),
        "empty": torch.empty(0, 3),
        "streamed": Streamed(torch.arange(1000), "I64", 72),
        "bf16": torch.randn(3, 5).bfloat16(),
    }


def layout_of(tensors: dict[str, Writable]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: shard_writer.dtype_and_shape(tensor) for name, tensor in tensors.items()}


def put_all(file: ShardFile, tensors: dict[str, Writable]) -> None:
    for name in file.names:
        file.put(name, tensors[name])


def full(*_: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("chunk_bytes", [7, 100, 16 << 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_files_and_records_are_those_of_write_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    monkeypatch.setattr(shard_writer, "CHUNK_BYTES", chunk_bytes)
    tensors = samples()
    wanted = write_safetensors(tmp_path / NAME, tensors)
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", threads=threads) as writer:
        file = writer.open(NAME, layout_of(tensors))
        assert file.names == [
            "streamed",
            "scalar",
            "cut",
            "empty",
            "raw",
            "bf16",
            "codes",
            "scales",
        ]
        put_all(file, tensors)
        record = file.finish().result(20)
        assert writer.queued_bytes == 0
        assert writer.hash_s > 0
        assert writer.disk_s > 0
    assert record == wanted
    assert (tmp_path / "out" / NAME).read_bytes() == (tmp_path / NAME).read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]


def test_discarding_makes_no_file_and_the_same_record(tmp_path: Path) -> None:
    tensors = samples()
    wanted = write_safetensors(tmp_path / NAME, tensors)
    with ShardWriter(tmp_path / "nowhere", threads=2, discard=True) as writer:
        file = writer.open(NAME, layout_of(tensors))
        put_all(file, tensors)
        future = file.finish()
    assert future.result() == wanted
    assert not (tmp_path / "nowhere").exists()


def test_many_files_at_a_time_on_few_threads_with_few_buffers(tmp_path: Path) -> None:
    buffers = HostBuffers(4000, 3)
    layout = {f"t{i}": ("U8", (4000,)) for i in range(20)}
    with ShardWriter(tmp_path, threads=2) as writer:
        files = [writer.open(f"{number}.safetensors", layout) for number in range(7)]
        for i in range(20):
            for number, file in enumerate(files):
                buffer = buffers.acquire()
                buffer.fill_(i * 7 + number)
                file.put(f"t{i}", buffer, release=lambda buffer=buffer: buffers.release(buffer))
        records = [file.finish().result(20) for file in files]
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.safetensors"
        assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        infos = read_header(path)
        for i in range(20):
            assert b"".join(infos[f"t{i}"].chunks()) == bytes([i * 7 + number]) * 4000


def test_data_is_looked_at_after_wait_and_released_after_writing(tmp_path: Path) -> None:
    data, ready, released = torch.zeros(1000), threading.Event(), threading.Event()
    with ShardWriter(tmp_path, threads=1) as writer:
        file = writer.open(NAME, {"t": ("F32", (1000,))})
        file.put("t", data, wait=lambda: assert_set(ready), release=released.set)
        assert writer.queued_bytes == 4000
        future = file.finish()
        time.sleep(0.02)
        assert not released.is_set()
        data.fill_(1.0)  # as a copy from a device would
        ready.set()
        future.result(20)
        assert released.is_set()
    assert b"".join(read_header(tmp_path / NAME)["t"].chunks()) == data.numpy().tobytes()


def assert_set(event: threading.Event) -> None:
    assert event.wait(20)


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    original = os.write
    monkeypatch.setattr(os, at, full)
    if at == "write":  # the header still fits
        monkeypatch.setattr(os, at, lambda d, b: full() if len(b) == 4000 else original(d, b))
    released = []
    with ShardWriter(tmp_path, threads=2) as writer:
        file = writer.open(NAME, {"t": ("F32", (1000,))})
        file.put("t", torch.zeros(1000), release=lambda: released.append(1))
        with pytest.raises(
            OutputError, match=r"x.safetensors: found writing weights failed: No sp"
        ):
            file.finish().result(20)
        assert released == [1]
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_reaches_the_next_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = os.write, [0]

    def nearly_full(descriptor: int, data: bytes) -> int:
        written[0] += len(data)
        return full() if written[0] > 50_000 else original(descriptor, data)

    monkeypatch.setattr(durable.os, "write", nearly_full)
    buffers = HostBuffers(4000, 2)
    with ShardWriter(tmp_path, threads=2) as writer:
        file = writer.open(NAME, {f"t{i}": ("F32", (1000,)) for i in range(100)})
        other = writer.open("other.safetensors", {"t": ("F32", (2,))})

        def put_everything() -> None:
            for i in range(100):
                buffer = buffers.acquire()  # comes back though writing failed
                release: Callable[[], None] = lambda b=buffer: buffers.release(b)  # noqa: E731
                file.put(f"t{i}", buffer.view(torch.float32), release=release)

        with pytest.raises(OutputError, match=r"x.safetensors: .*No space left.*GB free"):
            put_everything()
        monkeypatch.undo()
        other.put("t", torch.zeros(2))
        assert other.finish().result(20).bytes > 8
        assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
        assert writer.queued_bytes == 0


def test_a_missing_directory_is_told_at_once(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path / "no", threads=1) as writer,
        pytest.raises(OutputError, match=r"x.safetensors: .*No such file or directory"),
    ):
        writer.open(NAME, {})


def test_what_is_wrong_with_the_data_is_told_as_it_is(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "source", {"t": torch.zeros(1000)})
    info = read_header(tmp_path / "source")["t"]
    (tmp_path / "source").write_bytes(b"")
    (tmp_path / "out").mkdir()

    def lost() -> None:
        raise NumericsError("t")

    with ShardWriter(tmp_path / "out", threads=1) as writer:
        file = writer.open("a.safetensors", {"t": ("F32", (1000,))})
        file.put("t", info)
        with pytest.raises(SourceError, match="t: found end of file inside the tensor"):
            file.finish().result(20)
        for number, hook in enumerate(({"wait": lost}, {"release": lost})):
            file = writer.open(f"b{number}.safetensors", {"t": ("F32", (2,))})
            file.put("t", torch.zeros(2), **hook)
            with pytest.raises(NumericsError):
                file.finish().result(20)
        assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_file_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_safetensors(tmp_path / NAME, {"t": torch.zeros(2)})
    monkeypatch.setattr(os, "fsync", full)
    with ShardWriter(tmp_path, threads=1) as writer:
        file = writer.open(NAME, {"t": ("F32", (2,))})
        file.put("t", torch.ones(2))
        with pytest.raises(OutputError):
            file.finish().result(20)
    assert hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest() == old.sha256


def test_leaving_completes_what_was_finished_and_gives_up_the_rest(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, threads=2) as writer:
        done, left = (writer.open(f"{name}.safetensors", {"t": ("F32", (2,))}) for name in "ab")
        for file in (done, left):
            file.put("t", torch.zeros(2))
        future = done.finish()
    assert future.result().name == "a.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(CancelledError):
        left.put("t", torch.zeros(2))


def test_an_exception_gives_up_everything_at_once(tmp_path: Path) -> None:
    released = []

    def work() -> None:
        with ShardWriter(tmp_path, threads=1) as writer:
            file = writer.open(NAME, {f"t{i}": ("F32", (2,)) for i in range(200)})
            for i in range(200):
                file.put(
                    f"t{i}",
                    torch.zeros(2),
                    wait=lambda: time.sleep(0.05),
                    release=lambda: released.append(1),
                )
            futures.append(file.finish())
            raise KeyboardInterrupt

    futures: list[object] = []
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - begun < 5  # not 200 waits
    assert len(released) == 200
    assert list(tmp_path.iterdir()) == []


def test_order_dtype_shape_and_completeness_are_checked(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, threads=1) as writer:
        file = writer.open(NAME, {"a": ("U8", (2,)), "b": ("F32", ())})
        with pytest.raises(AssertionError, match=NAME):
            writer.open(NAME, {})
        assert file.names == ["b", "a"]
        with pytest.raises(AssertionError, match="a instead of b"):
            file.put("a", torch.zeros(2, dtype=torch.uint8))
        with pytest.raises(AssertionError, match="b"):
            file.put("b", torch.zeros(1))
        file.put("b", torch.zeros(()))
        with pytest.raises(AssertionError, match="a"):
            file.finish()


def test_a_stream_of_the_wrong_length_is_noticed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, threads=1) as writer:
        file = writer.open(NAME, {"t": ("U8", (10,))})
        file.put("t", RawTensor("U8", (10,), b"123"))
        with pytest.raises(AssertionError, match="t"):
            file.finish().result(20)


def test_records_survive_the_journal(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, threads=1) as writer:
        record = writer.open(NAME, {}).finish().result(20)
    assert FileRecord.from_json(record.to_json()) == record
    assert read_header(tmp_path / NAME) == {}


@pytest.mark.parametrize("broken", ["write_all", "rename"])
def test_an_unforeseen_error_on_the_write_lane_surfaces(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane that died would leave the run waiting forever."""

    def fail(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(shard_writer, broken, fail)

    def write() -> None:
        with ShardWriter(tmp_path, threads=1) as writer:
            file = writer.open(NAME, {"a": ("F32", (4,))})
            file.put("a", torch.ones(4))
            file.finish().result(timeout=20)

    with pytest.raises(ValueError, match="odd"):
        write()
    assert list(tmp_path.iterdir()) == []
