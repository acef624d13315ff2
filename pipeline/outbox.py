"""From packed blocks on the device to a shard file, without waiting.

In: blocks as packing yields them, in file order; small tensors that are copied from the source.
Out: files that fill in the background. On a GPU each block is copied to pinned host memory on the
packing lane, and the writer waits for that copy; the memory comes back once it is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from pipeline.blocks import Block
from pipeline.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES
from pipeline.checkpoint.staging import Place, StagingRing
from pipeline.checkpoint.writer import FileRecord, ShardFile, ShardWriter, Writable
from pipeline.packing import PackedBlock
from pipeline.runtime.lanes import Mark
from pipeline.schedule import split_by_size

Layout = dict[str, tuple[str, tuple[int, ...]]]


class Outbox:
    """The files of one rank for one layer; several, so that several are checksummed at a time.

    Args:
        writer: The pool that writes.
        name: Of the first file, without its ending; the others get a number.
        blocks: Packed tensors to come, in order.
        copies: Tensors that keep the source's bytes, by their name there; as many as the limit
            allows go to the first file, the others to files of their own.
        staging: Host memory; None on a CPU, where packed tensors are written from where they are.
        device: Where blocks come from.
        limit: Bytes of packed tensors, and of copies, after which the next file begins (a block is
            never cut).
    """

    def __init__(
        self,
        writer: ShardWriter,
        name: str,
        blocks: Sequence[Block],
        copies: Mapping[str, Writable],
        staging: StagingRing | None,
        device: torch.device,
        *,
        limit: int,
    ) -> None:
        self._writer, self._name = writer, name
        self._staging, self._device = staging, device
        self._parts = _split(blocks, limit)
        self._starts = {part[0].names[0]: index for index, part in enumerate(self._parts) if part}
        sizes = [copy.nbytes for copy in copies.values()]
        first, *self._rest = split_by_size(list(copies), sizes, limit) or [[]]
        self._all_copies = copies
        self._copies = copies = {name: copies[name] for name in first}
        self._sizes = sorted({_itemsize(copy) for copy in copies.values()}, reverse=True)
        self._done: list[Future[FileRecord]] = []
        self._file = self._open(0)

    def send(self, packed: Sequence[PackedBlock]) -> None:
        """Queues blocks; may wait for room in host memory."""
        for block, tensors in packed:
            part = self._starts.get(block.names[0], 0)
            if part > 0:
                self._close()
                self._file = self._open(part)
            self._send_copies(at_least=block.dtype.itemsize)
            if self._staging is None:
                for name, tensor in zip(block.names, tensors.unbind(0), strict=True):
                    self._file.put(name, tensor)
            else:
                self._send_staged(block, tensors)

    def finish(self) -> list[Future[FileRecord]]:
        """Everything was sent; the records follow when the files are durable."""
        self._close()
        for index, names in enumerate(self._rest, start=len(self._parts)):
            copies = {name: self._all_copies[name] for name in names}
            file = self._writer.open(self._file_name(index), _layout([], copies))
            for name in file.names:
                file.put(name, copies[name])
            self._done.append(file.finish())
        return self._done

    def _open(self, index: int) -> ShardFile:
        copies = self._copies if index == 0 else {}
        layout = _layout(self._parts[index], copies)
        return self._writer.open(self._file_name(index), layout)

    def _file_name(self, index: int) -> str:
        number = f"-{index:02d}" if index else ""
        return f"{self._name}{number}.safetensors"

    def _close(self) -> None:
        self._send_copies(at_least=0)
        self._done.append(self._file.finish())

    def _send_copies(self, at_least: int) -> None:
        """A file holds larger elements first, and copies before packed tensors of their size."""
        while self._sizes and self._sizes[0] >= at_least:
            size = self._sizes.pop(0)
            for name, copy in self._copies.items():
                if _itemsize(copy) == size:
                    self._file.put(name, copy)

    def _send_staged(self, block: Block, tensors: torch.Tensor) -> None:
        assert self._staging is not None
        place = self._staging.acquire(block.nbytes)
        staged = place.memory.view(block.dtype).view(len(block.names), *block.shape)
        staged.view(torch.uint8).copy_(tensors.contiguous().view(torch.uint8), non_blocking=True)
        copied = Mark(self._device)
        release = _after(len(block.names), place)
        for name, tensor in zip(block.names, staged.unbind(0), strict=True):
            self._file.put(name, tensor, wait=copied.synchronize, release=release)


def _split(blocks: Sequence[Block], limit: int) -> list[list[Block]]:
    """Neighbouring blocks of at most `limit` bytes together, or single ones; at least one part."""
    parts: list[list[Block]] = [[]]
    filled = 0
    for block in blocks:
        if parts[-1] and filled + block.nbytes > limit:
            parts.append([])
            filled = 0
        parts[-1].append(block)
        filled += block.nbytes
    return parts


def _layout(blocks: Sequence[Block], copies: Mapping[str, Writable]) -> Layout:
    """Dtype and shape by name, in file order."""
    entries: list[tuple[int, int, str, tuple[str, tuple[int, ...]]]] = []
    for name, copy in copies.items():
        dtype, shape = _describe(copy)
        entries.append((-_itemsize(copy), 0, name, (dtype, shape)))
    for block in blocks:
        described = (DTYPE_NAMES[block.dtype], block.shape)
        entries += [(-block.dtype.itemsize, 1, name, described) for name in block.names]
    entries.sort(key=lambda entry: entry[:2])  # stable: blocks keep their order
    return {name: described for _, _, name, described in entries}


def _describe(copy: Writable) -> tuple[str, tuple[int, ...]]:
    if isinstance(copy, torch.Tensor):
        return DTYPE_NAMES[copy.dtype], tuple(copy.shape)
    return copy.dtype, tuple(copy.shape)


def _itemsize(copy: Writable) -> int:
    return TORCH_DTYPES[_describe(copy)[0]].itemsize


def _after(count: int, place: Place) -> Callable[[], None]:
    """Gives a place back at the `count`-th call."""
    lock, left = threading.Lock(), [count]

    def release() -> None:
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            place.release()

    return release
