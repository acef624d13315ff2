"""What a rank packs and writes of one layer, in which order: plan apart from act.

In: a layer's schedule, the rank grid. Out: the work in plain numbers: which dense tensors this rank
packs, in which chunks it packs its experts, and the blocks that follow each other in its file.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from pipeline.architecture import Architecture, TensorSpec, layer_tensors
from pipeline.nvfp4.formats import BLOCK_SIZE, Format
from pipeline.recipe import ModuleFormat
from pipeline.schedule import (
    EXPERT_PROJECTIONS,
    DenseItem,
    LayerSchedule,
    expert_owner,
    packs_expert,
)
from pipeline.sharding import ParallelDims, Shard, shard_of

CHUNK_BYTES = 2**28
"""Packed codes of experts that are packed and sent to the host at a time."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Tensors of one dtype and shape that lie one after the other in a file.

    Attributes:
        names: Full names.
        dtype: Of all of them.
        shape: Of each of them.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return len(self.names) * math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class DenseWork:
    """One dense tensor.

    Attributes:
        item: What becomes of it.
        shard: This rank's part.
        packs: Whether this rank packs its part (of a tensor that TP replicates, the owner does).
        counts: Whether this rank's statistics enter the sums.
        blocks: Codes (and block scales) that this rank writes.
    """

    item: DenseItem
    shard: Shard
    packs: bool
    counts: bool
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class ExpertChunk:
    """Experts of one projection that are packed together and have one owner.

    Attributes:
        projection: `up_proj` or `down_proj`.
        positions: Places among the experts that this rank packs.
        owner: etp_rank that writes them.
        names: Full module names.
        blocks: Codes (and block scales) that this rank writes.
    """

    projection: str
    positions: range
    owner: int
    names: tuple[str, ...]
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class LayerWork:
    """One rank's packing of one layer.

    Attributes:
        dense: Dense tensors of this rank's replica.
        experts: Local indices of the experts that this rank packs.
        chunks: How they are packed.
        scalars: FP32 scales of whole tensors that this rank writes; they come first in the file.
    """

    dense: tuple[DenseWork, ...]
    experts: range
    chunks: tuple[ExpertChunk, ...]
    scalars: Block

    @property
    def blocks(self) -> list[Block]:
        """Everything this rank writes, in file order."""
        blocks = [self.scalars] if self.scalars.names else []
        for dense in self.dense:
            blocks += dense.blocks
        for chunk in self.chunks:
            blocks += chunk.blocks
        return blocks


def plan_work(
    schedule: LayerSchedule,
    architecture: Architecture,
    dims: ParallelDims,
    rank: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> LayerWork:
    """The packing of one layer on one rank."""
    at = dims.coordinates(rank)
    dense, scalars = [], []
    for item in schedule.dense:
        if item.replica != at.dp_rank:
            continue
        shard = shard_of(item.spec, architecture, dims, rank)
        assert shard is not None, item.spec.name
        owns = item.owner == at.tp_rank
        packs = owns or not shard.is_whole
        blocks = _blocks([item.spec.module], item.spec.shape, item.module_format) if owns else ()
        dense.append(
            DenseWork(item, shard, packs, packs and (shard.is_whole or shard.counted), blocks)
        )
        if owns:
            scalars.append(_scalar_name(item.spec.module, item.module_format))
    experts, chunks = range(0), []
    if schedule.experts:
        count = architecture.n_routed_experts // dims.ep
        experts = range(at.edp_rank, count, dims.edp)
        assert all(packs_expert(e, at, dims) for e in experts)
        first = count * at.ep_rank
        for projection in EXPERT_PROJECTIONS:
            if projection not in schedule.experts:
                continue
            module_format = schedule.experts[projection]
            spec = expert_spec(architecture, schedule.layer, projection)
            for positions in _chunks(experts, dims, spec, chunk_bytes):
                owner = expert_owner(experts[positions[0]], dims)
                prefix = f"backbone.layers.{schedule.layer}.mixer.experts"
                names = tuple(f"{prefix}.{first + experts[p]}.{projection}" for p in positions)
                blocks = _blocks(list(names), spec.shape, module_format)
                if owner != at.etp_rank:
                    blocks = ()
                else:
                    scalars += [_scalar_name(name, module_format) for name in names]
                chunks.append(ExpertChunk(projection, positions, owner, names, blocks))
    return LayerWork(tuple(dense), experts, tuple(chunks), Block(tuple(scalars), torch.float32, ()))


def experts_per_chunk(spec: TensorSpec, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many experts are packed together."""
    return max(1, chunk_bytes // (spec.parameters // 2))


def _chunks(experts: range, dims: ParallelDims, spec: TensorSpec, chunk_bytes: int) -> list[range]:
    """Positions of the experts, each chunk of one owner and of a bounded size."""
    size = experts_per_chunk(spec, chunk_bytes)
    chunks = []
    for first in range(min(dims.etp, len(experts))):
        positions = range(first, len(experts), dims.etp)
        chunks += [positions[i : i + size] for i in range(0, len(positions), size)]
    return chunks


def _blocks(
    modules: list[str], shape: tuple[int, ...], module_format: ModuleFormat
) -> tuple[Block, ...]:
    """Blocks of one-byte tensors: FP8 codes, or NVFP4 codes and their block scales."""
    rows, columns = shape
    weights = tuple(f"{module}.weight" for module in modules)
    if module_format.weight_format is Format.fp8:
        return (Block(weights, torch.float8_e4m3fn, (rows, columns)),)
    scales = tuple(f"{module}.weight_scale" for module in modules)
    return (
        Block(weights, torch.uint8, (rows, columns // 2)),
        Block(scales, torch.float8_e4m3fn, (rows, columns // BLOCK_SIZE)),
    )


def _scalar_name(module: str, module_format: ModuleFormat) -> str:
    is_fp8 = module_format.weight_format is Format.fp8
    return f"{module}.{'weight_scale' if is_fp8 else 'weight_scale_2'}"


def expert_spec(architecture: Architecture, layer: int, projection: str) -> TensorSpec:
    """The spec of a layer's first expert; all have its shape."""
    return next(
        spec
        for spec in layer_tensors(architecture, layer)
        if spec.is_routed_expert and spec.module.endswith(projection) and spec.is_linear_weight
    )
