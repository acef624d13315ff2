"""Choose and pack one layer: from the weights in a slot to the tensors of this rank's shard file.

In: a layer's weights (this rank's shards), its schedule, the groups. Out: the packed tensors that
this rank writes, and what packing cost. The order is reduce first, choose after: amax of whole
logical tensors (MAX), then squared errors of FP8 candidates (SUM), then every rank packs its
shards; a tensor that TP or ETP cut is assembled, already packed, on one owner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from pipeline.architecture import Architecture, TensorSpec
from pipeline.calibration.choose import choose_fp8_amax
from pipeline.errors import NumericsError
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import (
    PackedWeight,
    fp8_squared_errors,
    quantize_fp8,
    quantize_nvfp4,
    tensor_amax,
)
from pipeline.nvfp4.statistics import measure_statistics, squared_error_of_max, squared_weight
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Ranks, gather_bytes, reduce_max, reduce_sum
from pipeline.schedule import (
    EXPERT_PROJECTIONS,
    DenseItem,
    LayerSchedule,
    expert_owner,
    packs_expert,
    tap_of,
)
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


@dataclasses.dataclass
class PackedLayer:
    """What this rank made of a layer.

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
    """

    architecture: Architecture
    dims: ParallelDims
    ranks: Ranks
    compare_to_max: bool = True

    def pack(self, schedule: LayerSchedule, weights: LayerWeights) -> PackedLayer:
        """Reduces, chooses and packs; a collective call: every rank makes it for every layer.

        Raises:
            NumericsError: NaN or Inf in a weight, named with its rank.
        """
        packed = PackedLayer()
        if schedule.dense:
            self._pack_dense(schedule, weights, packed)
        for projection in EXPERT_PROJECTIONS:
            if projection in schedule.experts:
                self._pack_experts(schedule, projection, weights, packed)
        return packed

    def _pack_dense(
        self, schedule: LayerSchedule, weights: LayerWeights, packed: PackedLayer
    ) -> None:
        at = self.dims.coordinates(self.ranks.rank)
        items = [item for item in schedule.dense if item.replica == at.dp_rank]
        if not items:
            return
        shards = [self._shard(item.spec) for item in items]
        local = [weights.weight(item.spec.name) for item in items]
        amax = torch.stack([tensor_amax(weight) for weight in local])
        self._check_finite([item.spec.name for item in items], amax)
        amax = reduce_max(amax, self.ranks.tp).cpu()
        amax = _share_in_fused_groups(items, amax)
        amax = self._choose_dense_fp8(items, shards, local, amax)
        for item, shard, weight, value in zip(items, shards, local, amax, strict=True):
            if shard.is_whole and item.owner != at.tp_rank:
                continue  # replicated over TP: the owner packs it alone
            value = value.to(weight.device)
            parts = _quantize(weight, value, item.module_format)
            if shard.is_whole or shard.counted:
                measured = self._measure(weight, value, parts, item.module_format)
                packed.statistics[item.spec.name] = measured[0]
            self._assemble(item, shard, parts, packed)

    def _choose_dense_fp8(
        self,
        items: list[DenseItem],
        shards: list[Shard],
        local: list[torch.Tensor],
        amax: torch.Tensor,
    ) -> torch.Tensor:
        """Applies the FP8 multiplier search to the dense tensors whose recipe asks for one."""
        for multipliers in dict.fromkeys(item.module_format.fp8_multipliers for item in items):
            chosen = [
                i for i, x in enumerate(items) if x.module_format.fp8_multipliers == multipliers
            ]
            if not multipliers:
                continue
            errors = torch.stack(
                [
                    fp8_squared_errors(local[i], amax[i].to(local[i].device), multipliers)
                    * float(shards[i].counted)
                    for i in chosen
                ]
            )
            errors = reduce_sum(errors, self.ranks.tp).cpu()
            errors = _sum_in_fused_groups([items[i] for i in chosen], errors)
            amax = amax.clone()
            amax[chosen] = choose_fp8_amax(amax[chosen], errors, multipliers)
        return amax

    def _assemble(
        self, item: DenseItem, shard: Shard, parts: dict[str, torch.Tensor], packed: PackedLayer
    ) -> None:
        """Gathers the packed shards of one tensor on its owner and puts them in place."""
        module = item.spec.module
        for name, part in parts.items():
            if part.ndim == 0 or shard.is_whole:
                if item.owner == self.dims.coordinates(self.ranks.rank).tp_rank:
                    packed.tensors[f"{module}.{name}"] = part.cpu()
                continue
            pieces = gather_bytes(part, item.owner, self.ranks.tp)
            if pieces is not None:
                packed.tensors[f"{module}.{name}"] = self._place(item.spec, shard, pieces)

    def _place(self, spec: TensorSpec, shard: Shard, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Joins packed shards [N, K'] by the ranges of the logical tensor they came from."""
        local = shard.shape[1]
        shape = list(pieces[0].shape)
        # Packed columns are fewer than logical ones: by 2 for codes, by 16 for block scales.
        per_column = local // shape[1]
        shape[0], shape[1] = spec.shape[0], spec.shape[1] // per_column
        whole = torch.empty(shape, dtype=torch.uint8)
        for tp_rank, piece in enumerate(pieces):
            ranges = self._shard_at(spec, tp_rank).ranges
            data, offset = piece.view(torch.uint8).cpu(), 0
            for start, stop in ranges:
                step = per_column if shard.dim == 1 else 1
                start, length = start // step, (stop - start) // step
                target = whole.narrow(shard.dim, start, length)
                target.copy_(data.narrow(shard.dim, offset, length))
                offset += length
        return whole.view(pieces[0].dtype)

    def _pack_experts(
        self,
        schedule: LayerSchedule,
        projection: str,
        weights: LayerWeights,
        packed: PackedLayer,
    ) -> None:
        module_format = schedule.experts[projection]
        at = self.dims.coordinates(self.ranks.rank)
        count = self.architecture.n_routed_experts // self.dims.ep
        first = count * at.ep_rank
        mine = [e for e in range(count) if packs_expert(e, at, self.dims)]
        if not mine:
            return
        prefix = f"backbone.layers.{schedule.layer}.mixer.experts"
        names = [f"{prefix}.{first + e}.{projection}" for e in mine]
        stack = weights.experts(projection, mine)
        amax = tensor_amax(stack)
        self._check_finite([f"{name}.weight" for name in names], amax)
        amax = reduce_max(amax, self.ranks.etp)
        if module_format.fp8_multipliers:
            errors = fp8_squared_errors(stack, amax, module_format.fp8_multipliers)
            errors = reduce_sum(errors, self.ranks.etp)
            amax = choose_fp8_amax(amax, errors, module_format.fp8_multipliers)
        for owner in range(self.dims.etp):
            chosen = [i for i, e in enumerate(mine) if expert_owner(e, self.dims) == owner]
            if not chosen:
                continue
            part_of_stack = stack if len(chosen) == len(mine) else stack[chosen]
            parts = _quantize(part_of_stack, amax[chosen], module_format)
            measured = self._measure(part_of_stack, amax[chosen], parts, module_format)
            for i, statistics in zip(chosen, measured, strict=True):
                packed.statistics[f"{names[i]}.weight"] = statistics
            for key, part in parts.items():
                whole = self._join_experts(part, owner, 1 if projection == "up_proj" else 2)
                if whole is not None:
                    for i, tensor in zip(chosen, whole.unbind(0), strict=True):
                        packed.tensors[f"{names[i]}.{key}"] = tensor

    def _join_experts(self, part: torch.Tensor, owner: int, dim: int) -> torch.Tensor | None:
        """Packed experts [E, N, K'] or scalars [E], whole, on their owner; None elsewhere."""
        if part.ndim == 1:
            mine = self.dims.coordinates(self.ranks.rank).etp_rank == owner
            return part.cpu() if mine else None
        pieces = gather_bytes(part, owner, self.ranks.etp)
        if pieces is None:
            return None
        if len(pieces) == 1:
            return pieces[0].cpu()
        joined = torch.cat([piece.view(torch.uint8).cpu() for piece in pieces], dim)
        return joined.view(part.dtype)

    def _measure(
        self,
        weight: torch.Tensor,
        amax: torch.Tensor,
        parts: dict[str, torch.Tensor],
        module_format: ModuleFormat,
    ) -> list[tuple[float, ...]]:
        """`STATISTICS` of each matrix of `weight` ([N, K] or [E, N, K])."""
        stack = weight if weight.ndim == 3 else weight[None]
        amax = amax.reshape(-1)
        if module_format.weight_format is Format.fp8:
            error = fp8_squared_errors(stack, amax, (1.0,))[..., 0]
            zero = torch.zeros_like(error)
            columns = [error, squared_weight(stack), zero, zero, zero, zero, zero]
            return [tuple(row) for row in torch.stack(columns, 1).tolist()]
        method = _method(module_format)
        packed = _as_packed(parts, weight.ndim)
        measured = measure_statistics(stack, packed, amax, method)
        of_max = measured.squared_error
        if self.compare_to_max and method not in (WeightMethod.max, WeightMethod.max_dynamic):
            of_max = squared_error_of_max(stack, amax)
        values = (
            getattr(measured, name) if name != "squared_error_of_max" else of_max
            for name in STATISTICS
        )
        return [tuple(row) for row in torch.stack([v.double() for v in values], 1).tolist()]

    def _check_finite(self, names: list[str], amax: torch.Tensor) -> None:
        """Looks at this rank's own amax, before a reduction: so the rank at fault says so."""
        for name, is_finite in zip(names, amax.isfinite().tolist(), strict=True):
            if not is_finite:
                raise NumericsError(
                    f"{name} (rank {self.ranks.rank})",
                    value="NaN or Inf",
                    rule="every weight must be finite",
                    remedy="replace the source checkpoint; its weights are corrupt",
                )

    def _shard(self, spec: TensorSpec) -> Shard:
        shard = shard_of(spec, self.architecture, self.dims, self.ranks.rank)
        assert shard is not None, spec.name
        return shard

    def _shard_at(self, spec: TensorSpec, tp_rank: int) -> Shard:
        shard = shard_of(spec, self.architecture, self.dims, tp_rank)
        assert shard is not None, spec.name
        return shard


def _method(module_format: ModuleFormat) -> WeightMethod:
    assert module_format.weight_method is not None
    return module_format.weight_method


def _quantize(
    weight: torch.Tensor, amax: torch.Tensor, module_format: ModuleFormat
) -> dict[str, torch.Tensor]:
    """Tensors that replace a weight [..., N, K], by the last part of their names."""
    if module_format.weight_format is Format.fp8:
        codes, weight_scale = quantize_fp8(weight, amax)
        return {"weight": codes, "weight_scale": weight_scale}
    packed = quantize_nvfp4(weight, amax, _method(module_format))
    return {
        "weight": packed.codes,
        "weight_scale": packed.weight_scale,
        "weight_scale_2": packed.weight_scale_2,
    }


def _as_packed(parts: dict[str, torch.Tensor], ndim: int) -> PackedWeight:
    record = PackedWeight(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
    if ndim == 3:
        return record
    return PackedWeight(*(part[None] for part in parts.values()))


def _fused_groups(items: Sequence[DenseItem]) -> Iterator[list[int]]:
    """Indices of the tensors that a server fuses: q, k and v read the same input."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(tap_of(item.spec.module), []).append(index)
    yield from (group for group in groups.values() if len(group) > 1)


def _share_in_fused_groups(items: Sequence[DenseItem], amax: torch.Tensor) -> torch.Tensor:
    """One amax per fused group, the largest; [n]."""
    amax = amax.clone()
    for group in _fused_groups(items):
        amax[group] = amax[group].max()
    return amax


def _sum_in_fused_groups(items: Sequence[DenseItem], errors: torch.Tensor) -> torch.Tensor:
    """One row of candidate errors per fused group, their sum; [n, T]."""
    errors = errors.clone()
    for group in _fused_groups(items):
        errors[group] = errors[group].sum(0)
    return errors
