"""Filling a slot from files: first with a layer of the source, then with its quantized weights.

In: the opened source and the opened quantized checkpoint. Out: filled slots, and how far every
quantized weight is from the source's: when its values arrive, the slot still holds the others.
Threads read a few tensors ahead; values are computed on the device, one tensor at a time.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from pipeline.architecture import TensorSpec, layer_tensors
from pipeline.checkpoint.safetensors_file import TORCH_DTYPES
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.weight_errors import Part, WeightErrors, compare_weights, read_errors
from pipeline.evaluation.quantized import QuantizedCheckpoint, StoredShard, dequantize
from pipeline.evaluation.records import ServingMode
from pipeline.job import StoredTensor
from pipeline.sharding import ParallelDims, Shard, shard_of
from pipeline.weights import LayerSlot


class LayerFiller:
    """Fills slots on one rank; a context manager that ends its threads.

    Args:
        source: The BF16 checkpoint.
        stored: Its tensors by logical name.
        checkpoint: The quantized one.
        dims: The rank grid.
        rank: This rank.
        device: Where the slots are.
        backend: Name of what dequantizes.
        threads: Readers.
        cast: Round F16 and F32 linear weights of the source to BF16.
    """

    def __init__(
        self,
        source: Source,
        stored: dict[str, StoredTensor],
        checkpoint: QuantizedCheckpoint,
        dims: ParallelDims,
        rank: int,
        *,
        device: torch.device,
        backend: str,
        threads: int,
        cast: bool = False,
    ) -> None:
        self._source, self._stored, self._checkpoint = source, stored, checkpoint
        self._dims, self._rank, self._cast = dims, rank, cast
        self._device, self._backend, self._threads = device, backend, threads
        self._pool = ThreadPoolExecutor(threads)
        self._errors: dict[str, tuple[torch.Tensor, Shard]] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._flushes = False

    def __enter__(self) -> LayerFiller:
        """Ready."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def fill_from_source(self, slot: LayerSlot, layer: int) -> None:
        """Fills a slot with the BF16 layer."""

        def fetch(spec: TensorSpec, shard: Shard) -> torch.Tensor:
            tensor = self._source.read(self._stored[spec.name].name, shard)
            return tensor.bfloat16() if self._cast and spec.is_linear_weight else tensor

        ahead = self._read_ahead(layer, fetch)
        slot.fill(layer, lambda spec, shard: next(ahead).to(self._device))

    def fill_quantized(self, slot: LayerSlot, layer: int, mode: ServingMode) -> None:
        """Fills the slot that holds the BF16 layer, or another mode's, with a mode's weights.

        The first mode of a layer is compared with what the slot holds. A later one is read again
        only where it differs on this rank: where a block scale is flushed.
        """
        compares = mode is ServingMode.w4a4
        if not compares and not self._flushes:
            return
        flushes = False

        def fetch(spec: TensorSpec, shard: Shard) -> StoredShard:
            return self._checkpoint.fetch(spec, shard)

        def read(spec: TensorSpec, shard: Shard) -> torch.Tensor:
            nonlocal flushes
            stored = next(ahead)
            flushes = flushes or stored.flushes
            tensor = dequantize(stored, mode, self._device, self._backend)
            if stored.algorithm is None:
                # Another tool may have widened what it copied; the slot computes in the source's.
                tensor = tensor.to(TORCH_DTYPES[self._stored[spec.name].dtype])
                if compares:
                    held = slot.target_of(spec)
                    self._copies[spec.name] = (tensor.to(held.dtype) != held).any()
            elif compares:
                assert stored.algorithm is not None
                found = compare_weights(
                    tensor, slot.target_of(spec), stored.algorithm, stored.scale
                )
                self._errors[spec.module] = (found, shard)
            return tensor

        ahead = self._read_ahead(layer, fetch)
        slot.fill(layer, read)
        self._flushes = flushes

    def weight_errors(self) -> dict[str, WeightErrors]:
        """Of this rank's part of every quantized module so far."""
        if not self._errors:
            return {}
        values = torch.stack([found for found, _ in self._errors.values()]).tolist()
        return {
            module: _in_tensor(read_errors(found, shard.shape[1]), shard)
            for (module, (_, shard)), found in zip(self._errors.items(), values, strict=True)
        }

    def changed_copies(self) -> list[str]:
        """Unquantized tensors of the layers so far whose values are not the source's."""
        if not self._copies:
            return []
        differs = torch.stack(list(self._copies.values())).tolist()
        return [name for name, changed in zip(self._copies, differs, strict=True) if changed]

    def _read_ahead[T](self, layer: int, fetch: Callable[[TensorSpec, Shard], T]) -> Iterator[T]:
        """This rank's tensors of a layer, in the order in which a slot asks for them."""
        waiting: deque[Future[T]] = deque()
        for spec in layer_tensors(self._checkpoint.architecture, layer):
            shard = shard_of(spec, self._checkpoint.architecture, self._dims, self._rank)
            if shard is None:
                continue
            waiting.append(self._pool.submit(fetch, spec, shard))
            if len(waiting) > 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _in_tensor(errors: WeightErrors, shard: Shard) -> WeightErrors:
    """With the places of the worst row and block in the whole tensor."""
    if shard.is_whole:
        return errors

    def moved(part: Part) -> Part:
        name = ("row", "column")[shard.dim]
        return dataclasses.replace(part, **{name: _position(getattr(part, name), shard)})

    return dataclasses.replace(errors, row=moved(errors.row), block=moved(errors.block))


def _position(local: int, shard: Shard) -> int:
    """Where a place of the shard is in the dim that is cut."""
    for start, stop in shard.ranges:
        if local < stop - start:
            return start + local
        local -= stop - start
    raise AssertionError(f"{local} beyond {shard}")
