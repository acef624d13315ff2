"""The weights that a server computes with, in the place of those that they were made from.

In: a slot that holds a layer's BF16 weights, the layer's schedule. Out: the same slot, its weights
quantized and dequantized; then, on request, as Hopper's kernels see them. The amax, the method and
the backend are those of packing, so the values are those of the packed bytes, under every layout;
every rank does it for all weights that it holds, whichever of them it packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.amax import dense_amax, expert_amax
from pipeline.architecture import Architecture
from pipeline.nvfp4.backends import get_backend
from pipeline.nvfp4.formats import Format
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Ranks
from pipeline.schedule import EXPERT_PROJECTIONS, DenseItem, LayerSchedule, tap_of
from pipeline.sharding import ParallelDims, shard_of
from pipeline.weights import LayerSlot

_PIECE = 2**27
"""Weights that are quantized at a time: what is needed beside them is about as large."""


class ServedWeights:
    """One layer's weights on their way from BF16 to what a server multiplies.

    Making one is a collective (over TP and ETP) and changes nothing.

    Args:
        schedule: What the layer's tensors become.
        slot: Holds the layer in BF16.
        architecture: Shape of the model.
        dims: The rank grid.
        ranks: Groups to reduce over.
        backend: Name of what quantizes.
    """

    def __init__(
        self,
        schedule: LayerSchedule,
        slot: LayerSlot,
        architecture: Architecture,
        dims: ParallelDims,
        ranks: Ranks,
        backend: str,
    ) -> None:
        self._schedule, self._slot, self._backend = schedule, slot, get_backend(backend)
        self._scaled: list[tuple[torch.Tensor, torch.Tensor]] = []  # weights, block scales
        self._done: set[str] = set()
        self._dense: dict[str, torch.Tensor] = {}
        self._experts: dict[str, torch.Tensor] = {}
        items = schedule.dense
        if items:
            local = [slot.weight(item.spec.name) for item in items]
            shards = [shard_of(item.spec, architecture, dims, ranks.rank) for item in items]
            counted = [shard is not None and shard.counted for shard in shards]
            _, amax = dense_amax(items, local, counted, self._backend, ranks.tp)
            self._dense = dict(zip((item.spec.name for item in items), amax, strict=True))
        stacks = {
            name: slot.experts(name)[0] for name in EXPERT_PROJECTIONS if name in schedule.experts
        }
        if stacks:
            _, self._experts = expert_amax(schedule.experts, stacks, self._backend, ranks.etp)

    def dequantize(self, taps: frozenset[str] | None = None) -> None:
        """Quantizes and dequantizes the weights in place, none of them twice.

        Args:
            taps: Only those that read the inputs of these names; None: all.
        """
        for item in self._dense_of(taps):
            amax = self._dense[item.spec.name]
            weight = self._slot.weight(item.spec.name)
            self._replace(weight[None], amax[None], item.module_format)
        for projection, amax in self._experts.items():
            tap = f"experts.{projection}"
            if tap not in self._done and (taps is None or tap in taps):
                stack, _ = self._slot.experts(projection)
                self._replace(stack, amax, self._schedule.experts[projection])
        everything = {tap_of(item.spec.module) for item in self._schedule.dense}
        everything |= {f"experts.{projection}" for projection in self._experts}
        self._done |= everything if taps is None else everything & taps

    @contextmanager
    def only(self, taps: frozenset[str]) -> Iterator[None]:
        """Dense weights that read the inputs of these names are quantized for a while."""
        assert not any(tap.startswith("experts.") for tap in taps), "too large to be kept twice"
        weights = [self._slot.weight(item.spec.name) for item in self._dense_of(taps)]
        kept, scaled, done = [w.clone() for w in weights], len(self._scaled), set(self._done)
        self.dequantize(taps)
        yield
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)
        del self._scaled[scaled:]
        self._done = done

    def _dense_of(self, taps: frozenset[str] | None) -> list[DenseItem]:
        """Dense weights that are still in BF16."""
        return [
            item
            for item in self._schedule.dense
            if (tap := tap_of(item.spec.module)) not in self._done and (taps is None or tap in taps)
        ]

    def flush(self) -> None:
        """Zeroes the blocks, once dequantized, whose scales Hopper's kernels flush to zero."""
        for weight, weight_scale in self._scaled:
            self._backend.zero_flushed(weight, weight_scale)
        self._scaled.clear()

    def _replace(self, stack: torch.Tensor, amax: torch.Tensor, formats: ModuleFormat) -> None:
        """[E, N, K] weights in place, a piece at a time."""
        for weight, piece_amax in _pieces(stack, amax):
            if formats.weight_format is Format.fp8:
                packed_fp8 = self._backend.pack_fp8(weight, piece_amax)
                scale = packed_fp8.weight_scale[:, None, None]
                weight.copy_(packed_fp8.codes.to(torch.float32).mul_(scale))
                continue
            assert formats.weight_method is not None
            packed = self._backend.quantize_nvfp4(weight, piece_amax, formats.weight_method)
            self._backend.dequantize_nvfp4(packed, weight.dtype, out=weight)
            self._scaled.append((weight, packed.weight_scale))


def _pieces(stack: torch.Tensor, amax: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some matrices at a time, or some rows of a large one; views."""
    matrices, rows, columns = stack.shape
    step = max(1, _PIECE // (rows * columns))
    row_step = max(1, _PIECE // columns)
    for first in range(0, matrices, step):
        for row in range(0, rows, row_step):
            piece = stack[first : first + step, row : row + row_step]
            yield piece, amax[first : first + step]
