"""Choose and pack one layer: from the weights in a slot to the tensors of this rank's shard file.

In: a layer's weights (this rank's shards), its schedule, the groups. Out: blocks of packed tensors
on the device, in file order, and what packing cost. The order is reduce first, choose after: amax
of whole logical tensors (MAX), then squared errors of FP8 candidates (SUM), then every rank packs
its shards; a tensor that TP or ETP cut is assembled, already packed, on one owner.

Nothing here waits for the device before `LayerPacking.finish`: the steps only enqueue work, so that
they may run on a stream of their own while the layer computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from pipeline.amax import dense_amax, expert_amax
from pipeline.architecture import Architecture, TensorSpec
from pipeline.blocks import Block, DenseWork, ExpertChunk, LayerWork, plan_work
from pipeline.errors import NumericsError
from pipeline.nvfp4.backends import Backend, get_backend
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import fp8_weight_scale, weight_scale_2
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Ranks, gather_bytes
from pipeline.runtime.lanes import HostCopy
from pipeline.schedule import EXPERT_PROJECTIONS, LayerSchedule
from pipeline.sharding import ParallelDims, Shard, shard_of
from pipeline.weights import LayerWeights

STATISTICS = (
    "squared_error",
    "squared_weight",
    "squared_error_of_max",
    "blocks",
    "zero_blocks",
    "blocks_m4",
    "blocks_flushed",
)

PackedBlock = tuple[Block, torch.Tensor]
"""A block and its tensors, stacked along a new first dim."""


@dataclasses.dataclass
class PackedLayer:
    """What this rank made of a layer, on the host.

    Attributes:
        tensors: By full name; codes, scales and FP32 scalars that this rank writes.
        statistics: Per quantized weight, the sums named in `STATISTICS` over the shards that this
            rank counts; SUM over ranks gives those of the whole tensor.
    """

    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    statistics: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerPacker:
    """Packs layers on one rank.

    Args:
        architecture: Shape of the model.
        dims: The rank grid.
        ranks: Groups to reduce over.
        compare_to_max: Also measure the error that method `max` would have had.
        backend: Name of what packs: `reference` or `triton`.
    """

    architecture: Architecture
    dims: ParallelDims
    ranks: Ranks
    compare_to_max: bool = True
    backend: str = "reference"

    def begin(self, schedule: LayerSchedule, weights: LayerWeights) -> LayerPacking:
        """The packing of one layer; nothing is computed before its steps are taken."""
        work = plan_work(schedule, self.architecture, self.dims, self.ranks.rank)
        return LayerPacking(self, schedule, weights, work, get_backend(self.backend))

    def pack(self, schedule: LayerSchedule, weights: LayerWeights) -> PackedLayer:
        """Packs a whole layer at once; a collective call.

        Raises:
            NumericsError: NaN or Inf in a weight, named with its rank.
        """
        packing = self.begin(schedule, weights)
        packed = PackedLayer()
        for step in packing.steps():
            for block, tensors in step:
                packed.tensors |= dict(zip(block.names, tensors.cpu().unbind(0), strict=True))
        packed.statistics = packing.finish()
        return packed


class LayerPacking:
    """One layer on its way into a file; `steps` is a collective: every rank takes all of them."""

    def __init__(
        self,
        packer: LayerPacker,
        schedule: LayerSchedule,
        weights: LayerWeights,
        work: LayerWork,
        backend: Backend,
    ) -> None:
        self.work = work
        self._packer, self._schedule, self._weights = packer, schedule, weights
        self._backend, self._ranks = backend, packer.ranks
        self._seen: list[tuple[list[str], torch.Tensor]] = []
        self._measured: list[tuple[list[str], torch.Tensor]] = []
        self._on_host: list[HostCopy] = []

    def steps(self) -> Iterator[list[PackedBlock]]:
        """Reduces and packs, step by step; yields the blocks that this rank writes, in file order.

        The first step reads all weights once and packs the dense ones; the others pack the experts.
        """
        dense = self.work.dense
        dense_amax = self._dense_amax() if dense else None
        expert_amax = self._expert_amax() if self.work.chunks else {}
        blocks: list[PackedBlock] = []
        if self.work.scalars.names:
            blocks.append((self.work.scalars, self._scalars(dense_amax, expert_amax)))
        for index, work in enumerate(dense):
            if work.packs:
                assert dense_amax is not None
                blocks += self._pack_dense(work, dense_amax[index])
        yield blocks
        for chunk in self.work.chunks:
            yield self._pack_chunk(chunk, expert_amax[chunk.projection])
        self._on_host = [HostCopy(values) for _, values in (*self._seen, *self._measured)]

    def finish(self) -> dict[str, tuple[float, ...]]:
        """Waits for the steps, all taken, to be computed; returns the statistics.

        Raises:
            NumericsError: NaN or Inf in a weight of this rank, named with its rank.
        """
        values = [copy.get() for copy in self._on_host]
        for (names, _), amax in zip(self._seen, values, strict=False):
            self._check_finite(names, amax)
        statistics: dict[str, tuple[float, ...]] = {}
        for (names, _), columns in zip(self._measured, values[len(self._seen) :], strict=True):
            statistics |= dict(zip(names, map(tuple, columns.tolist()), strict=True))
        return statistics

    # ---- amax of whole logical tensors

    def _dense_amax(self) -> torch.Tensor:
        """What each dense tensor is scaled by, fp32 [n]."""
        items = [work.item for work in self.work.dense]
        local = [self._weights.weight(item.spec.name) for item in items]
        counted = [work.shard.counted for work in self.work.dense]
        seen, amax = dense_amax(items, local, counted, self._backend, self._ranks.tp)
        self._seen.append(([item.spec.name for item in items], seen))
        return amax

    def _expert_amax(self) -> dict[str, torch.Tensor]:
        """What this rank's experts are scaled by, fp32 [experts] for each projection."""
        formats = self._schedule.experts
        stacks = {
            name: self._weights.experts(name, self.work.experts)
            for name in EXPERT_PROJECTIONS
            if name in formats
        }
        seen, amax = expert_amax(formats, stacks, self._backend, self._ranks.etp)
        for name, values in zip(stacks, seen, strict=True):
            self._seen.append((self._expert_names(name), values))
        return amax

    def _expert_names(self, projection: str) -> list[str]:
        """Weights of one projection, by the position of their expert."""
        names: dict[int, str] = {}
        for chunk in self.work.chunks:
            if chunk.projection == projection:
                names |= dict(zip(chunk.positions, chunk.names, strict=True))
        return [f"{names[position]}.weight" for position in range(len(names))]

    def _scalars(
        self, dense_amax: torch.Tensor | None, expert_amax: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The scales of whole tensors that this rank writes, fp32 [names]."""
        parts = []
        for index, work in enumerate(self.work.dense):
            if work.blocks:
                assert dense_amax is not None
                parts.append(_tensor_scale(dense_amax[index : index + 1], work.item.module_format))
        for chunk in self.work.chunks:
            if chunk.blocks:
                amax = _rows(expert_amax[chunk.projection], chunk.positions)
                parts.append(_tensor_scale(amax, self._schedule.experts[chunk.projection]))
        return torch.cat(parts)

    # ---- packing

    def _pack_dense(self, work: DenseWork, amax: torch.Tensor) -> list[PackedBlock]:
        item = work.item
        weight = self._weights.weight(item.spec.name)
        parts, measured = self._quantize(weight[None], amax[None], item.module_format)
        if work.counts:
            self._measured.append(([item.spec.name], measured))
        if work.shard.is_whole:
            return list(zip(work.blocks, parts, strict=True))
        joined = []
        for part in parts:
            pieces = gather_bytes(part[0], item.owner, self._ranks.tp)
            if pieces is not None:
                joined.append(self._place(item.spec, work.shard, pieces)[None])
        return list(zip(work.blocks, joined, strict=True))

    def _pack_chunk(self, chunk: ExpertChunk, amax: torch.Tensor) -> list[PackedBlock]:
        at = chunk.positions
        experts = self.work.experts[at.start : at.stop : at.step]
        module_format = self._schedule.experts[chunk.projection]
        stack = self._weights.experts(chunk.projection, experts)
        parts, measured = self._quantize(stack, _rows(amax, chunk.positions), module_format)
        self._measured.append(([f"{name}.weight" for name in chunk.names], measured))
        joined = []
        for part in parts:
            pieces = gather_bytes(part, chunk.owner, self._ranks.etp)
            if pieces is None:
                continue
            if len(pieces) == 1:
                joined.append(pieces[0])
                continue
            dim = 1 if chunk.projection == "up_proj" else 2
            whole = torch.cat([piece.view(torch.uint8) for piece in pieces], dim)
            joined.append(whole.view(part.dtype))
        return list(zip(chunk.blocks, joined, strict=True))

    def _quantize(
        self, weight: torch.Tensor, amax: torch.Tensor, module_format: ModuleFormat
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Codes (and block scales) of [E, N, K] weights, and `STATISTICS` fp64 [E, 7]."""
        if module_format.weight_format is Format.fp8:
            codes, _, error, squared = self._backend.pack_fp8(weight, amax)
            zero = torch.zeros_like(error)
            return [codes], torch.stack([error, squared, zero, zero, zero, zero, zero], 1)
        method = _method(module_format)
        plain = method in (WeightMethod.max, WeightMethod.max_dynamic)
        packed, measured = self._backend.pack_nvfp4(
            weight, amax, method, compare_to_max=self._packer.compare_to_max and not plain
        )
        columns = torch.stack([getattr(measured, name).double() for name in STATISTICS], 1)
        return [packed.codes, packed.weight_scale], columns

    def _place(self, spec: TensorSpec, shard: Shard, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Joins packed shards [N, K'] by the ranges of the logical tensor they came from."""
        # Packed columns are fewer than logical ones: by 2 for codes, by 16 for block scales.
        per_column = shard.shape[1] // pieces[0].shape[1]
        shape = (spec.shape[0], spec.shape[1] // per_column)
        whole = torch.empty(shape, dtype=torch.uint8, device=pieces[0].device)
        for tp_rank, piece in enumerate(pieces):
            placed = shard_of(spec, self._packer.architecture, self._packer.dims, tp_rank)
            assert placed is not None, spec.name
            data, offset = piece.view(torch.uint8), 0
            for start, stop in placed.ranges:
                step = per_column if shard.dim == 1 else 1
                start, length = start // step, (stop - start) // step
                target = whole.narrow(shard.dim, start, length)
                target.copy_(data.narrow(shard.dim, offset, length))
                offset += length
        return whole.view(pieces[0].dtype)

    def _check_finite(self, names: Sequence[str], amax: torch.Tensor) -> None:
        """Looks at this rank's own amax, before a reduction: so the rank at fault says so."""
        for name, is_finite in zip(names, amax.isfinite().tolist(), strict=True):
            if not is_finite:
                raise NumericsError(
                    f"{name} (rank {self._ranks.rank})",
                    value="NaN or Inf",
                    rule="every weight must be finite",
                    remedy="replace the source checkpoint; its weights are corrupt",
                )


def _method(module_format: ModuleFormat) -> WeightMethod:
    assert module_format.weight_method is not None
    return module_format.weight_method


def _tensor_scale(amax: torch.Tensor, module_format: ModuleFormat) -> torch.Tensor:
    """`weight_scale` of FP8 tensors, `weight_scale_2` of NVFP4 ones; fp32 [n]."""
    if module_format.weight_format is Format.fp8:
        return fp8_weight_scale(amax)
    return weight_scale_2(amax, _method(module_format))


def _rows(values: torch.Tensor, positions: range) -> torch.Tensor:
    """The values at some positions, a view."""
    return values[positions.start : positions.stop : positions.step]
