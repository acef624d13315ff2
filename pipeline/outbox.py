"""From packed blocks on the device to a shard file, without waiting.

In: blocks as packing yields them, in file order; small tensors that are copied from the source.
Out: a file that fills in the background. On a GPU each block is copied to a pinned host buffer on
the packing lane, and the writer waits for that copy; buffers come back once they are written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from pipeline.blocks import Block
from pipeline.checkpoint.safetensors_file import DTYPE_NAMES, TORCH_DTYPES
from pipeline.checkpoint.writer import FileRecord, HostBuffers, ShardFile, ShardWriter, Writable
from pipeline.packing import PackedBlock
from pipeline.runtime.lanes import Mark

Layout = dict[str, tuple[str, tuple[int, ...]]]


class Outbox:
    """One file of one rank.

    Args:
        writer: The pool that writes.
        name: File name.
        blocks: Packed tensors to come, in order.
        copies: Tensors that keep the source's bytes, by their name there.
        buffers: Host buffers; None on a CPU, where packed tensors are written from where they are.
        device: Where blocks come from.
    """

    def __init__(
        self,
        writer: ShardWriter,
        name: str,
        blocks: Sequence[Block],
        copies: Mapping[str, Writable],
        buffers: HostBuffers | None,
        device: torch.device,
    ) -> None:
        self._buffers, self._device = buffers, device
        self._copies = dict(copies)
        self._file: ShardFile = writer.open(name, _layout(blocks, copies))
        self._sizes = sorted({_itemsize(copy) for copy in copies.values()}, reverse=True)

    def send(self, packed: Sequence[PackedBlock]) -> None:
        """Queues blocks; may wait for a free host buffer."""
        for block, tensors in packed:
            self._send_copies(at_least=block.dtype.itemsize)
            if self._buffers is None:
                for name, tensor in zip(block.names, tensors.unbind(0), strict=True):
                    self._file.put(name, tensor)
            else:
                self._send_staged(block, tensors)

    def finish(self) -> Future[FileRecord]:
        """Everything was sent; the record follows when the file is durable."""
        self._send_copies(at_least=0)
        return self._file.finish()

    def _send_copies(self, at_least: int) -> None:
        """A file holds larger elements first, and copies before packed tensors of their size."""
        while self._sizes and self._sizes[0] >= at_least:
            size = self._sizes.pop(0)
            for name, copy in self._copies.items():
                if _itemsize(copy) == size:
                    self._file.put(name, copy)

    def _send_staged(self, block: Block, tensors: torch.Tensor) -> None:
        assert self._buffers is not None
        buffer = self._buffers.acquire()
        flat = buffer[: block.nbytes]
        staged = flat.view(block.dtype).view(len(block.names), *block.shape)
        staged.view(torch.uint8).copy_(tensors.contiguous().view(torch.uint8), non_blocking=True)
        copied = Mark(self._device)
        release = _after(len(block.names), self._buffers, buffer)
        for name, tensor in zip(block.names, staged.unbind(0), strict=True):
            self._file.put(name, tensor, wait=copied.synchronize, release=release)


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


def _after(count: int, buffers: HostBuffers, buffer: torch.Tensor) -> Callable[[], None]:
    """Gives a buffer back at the `count`-th call."""
    lock, left = threading.Lock(), [count]

    def release() -> None:
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            buffers.release(buffer)

    return release
