"""One rank's part of a snapshot on its way to a file, while the next layer computes.

In: tensors where they lie, which nobody changes until they were read. Out: for each tensor the
moment from which it may be overwritten, and a file with its checksum.

A tensor on a device is read by the thread that hashes: piece by piece through 16 MiB of pinned
memory and a few buffers on their way to the disk, so that host memory does not grow with it. The
next layer thus follows at the pace of the slowest of copy, checksum and disk (1.2 GB/s where that
is the checksum): a layer that takes longer than its micro-batches waits for the first one only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from pipeline.checkpoint.safetensors_file import CHUNK_BYTES, DTYPE_NAMES
from pipeline.checkpoint.shard_writer import ShardFile, ShardWriter
from pipeline.checkpoint.snapshot_files import SnapshotFile, file_name
from pipeline.checkpoint.writable import FileRecord, Writable, dtype_and_shape
from pipeline.errors import OutputError
from pipeline.runtime.lanes import Lane, Mark
from pipeline.runtime.pinned import host_memory

_THREADS = 4
"""Of which one hashes and one writes; twice as many buffers of 16 MiB lie between the two."""


class DeviceTensor:
    """A tensor on a device whose bytes come in pieces (a `StreamedTensor`).

    Args:
        tensor: At rest: everything that makes it has ended.
        lane: Where it is copied.
        piece: Pinned host memory; tensors that are read one after the other may share it.
        was_read: Called when the last piece was copied, or nobody wants it any more.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        lane: Lane,
        piece: torch.Tensor,
        was_read: Callable[[], None],
    ) -> None:
        self._tensor, self._lane, self._piece, self._was_read = tensor, lane, piece, was_read
        self.dtype, self.shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        self.nbytes = tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in pieces; each is reused by the next."""
        try:
            with self._lane.use():
                data = self._tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, self.nbytes, len(self._piece)):
                part = data[start : start + len(self._piece)]
                target = self._piece[: len(part)]
                with self._lane.use():
                    target.copy_(part, non_blocking=True)
                    copied = Mark(self._tensor.device)
                copied.synchronize()
                yield memoryview(target.numpy())
        finally:
            self._was_read()


class SnapshotWriter:
    """Writes one rank's part; begun by being made.

    Attributes:
        layer: After which the snapshot is taken.

    Args:
        layer: See above.
        directory: Of the snapshot.
        rank: This rank.
        state: By name; on a device, at rest.
        device: Where the layers run.
    """

    def __init__(
        self,
        layer: int,
        directory: Path,
        rank: int,
        state: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self.layer, self._begun = layer, time.monotonic()
        self._ended = self._begun
        self._read = {name: threading.Event() for name in state}
        self._lane, self._device = Lane(device), device
        self._piece = host_memory(CHUNK_BYTES, pinned=device.type == "cuda")
        self._writer = ShardWriter(directory, threads=_THREADS)
        self._file: Future[FileRecord] = Future()
        layout = {name: dtype_and_shape(tensor) for name, tensor in state.items()}
        try:
            file = self._writer.open(file_name(rank), layout)
        except OutputError as error:
            self._let_go()
            self._file.set_exception(error)
        else:
            self._put(file, state)
        self._file.add_done_callback(self._end)

    @property
    def is_done(self) -> bool:
        """Whether the file is durable, or given up."""
        return self._file.done()

    def wait_for(self, name: str) -> Callable[[], object]:
        """What returns once a tensor may be overwritten; from the main thread, any time."""
        return self._read[name].wait

    def wait_for_all(self) -> None:
        """Returns once all tensors may be overwritten."""
        for read in self._read.values():
            read.wait()

    def result(self) -> tuple[SnapshotFile, float]:
        """The durable file, and the seconds that it took; waits for it.

        Raises:
            OutputError: It could not be written.
        """
        try:
            record = self._file.result()
        finally:
            self._writer.close(give_up=False)
        return SnapshotFile(record.bytes, record.sha256), self._ended - self._begun

    def give_up(self) -> None:
        """Ends the threads, and removes the file unless it is whole."""
        self._writer.close()

    def _put(self, file: ShardFile, state: Mapping[str, torch.Tensor]) -> None:
        try:
            for name in file.names:
                was_read = self._read[name].set
                file.put(name, self._readable(state[name], was_read), release=was_read)
        except OutputError:
            self._let_go()  # (the file's future tells of it)
        self._file = file.finish()

    def _readable(self, tensor: torch.Tensor, was_read: Callable[[], None]) -> Writable:
        if tensor.device.type == "cpu":
            return tensor
        return DeviceTensor(tensor, self._lane, self._piece, was_read)

    def _let_go(self) -> None:
        for read in self._read.values():
            read.set()

    def _end(self, _: object) -> None:
        self._ended = time.monotonic()
