"""Who does what in each layer: plan apart from act, in plain numbers.

In: the architecture, the formats that the recipe gives every module, and the rank grid. Out: for
every layer the tensors to quantize (with the replica that packs them and the rank that writes
them), the tensors to copy (with the rank that copies them) and the projections to observe. All
ranks derive the same schedule, so they run the same collectives in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from pipeline.architecture import Architecture, LayerType, Role, TensorSpec, layer_tensors
from pipeline.nvfp4.formats import Format
from pipeline.recipe import KVFormat, ModuleFormat
from pipeline.sharding import Coordinates, ParallelDims

QKV = ("q_proj", "k_proj", "v_proj")
EXPERT_PROJECTIONS = ("up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class DenseItem:
    """One dense tensor to quantize.

    Attributes:
        spec: The tensor.
        module_format: What the recipe makes of it.
        replica: Data-parallel replica (dp_rank) that packs it; one for a whole fused group.
        owner: tp_rank, in that replica, that assembles and writes it.
    """

    spec: TensorSpec
    module_format: ModuleFormat
    replica: int
    owner: int


@dataclasses.dataclass(frozen=True)
class LayerSchedule:
    """The work of one layer.

    Attributes:
        layer: Its index.
        layer_type: Its type.
        dense: Dense tensors to quantize, in model order.
        experts: Format of the routed experts' projections; empty where they stay as they are.
        copies: Tensors copied from the source byte for byte, with the rank that copies each.
        kv: FP8 KV cache of this layer, or None.
    """

    layer: int
    layer_type: LayerType
    dense: tuple[DenseItem, ...]
    experts: Mapping[str, ModuleFormat]
    copies: tuple[tuple[TensorSpec, int], ...]
    kv: KVFormat | None

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor of this layer changes its format."""
        return bool(self.dense or self.experts)

    @property
    def observed(self) -> tuple[str, ...]:
        """Taps whose amax the layer's scalars need, in a fixed order."""
        names: dict[str, None] = {}
        for item in self.dense:
            if item.module_format.needs_input_amax:
                names[tap_of(item.spec.module)] = None
        for projection, module_format in self.experts.items():
            if module_format.needs_input_amax:
                names[f"experts.{projection}"] = None
        if self.kv is not None and self.kv.constant_amax is None:
            names["k_cache"] = names["v_cache"] = None
        return tuple(names)


def tap_of(module: str) -> str:
    """Name of the activation tap that feeds a module (q, k and v read the same input)."""
    tail = module.split(".mixer.")[1]
    if tail in QKV:
        return "qkv"
    if tail.startswith("experts."):
        return f"experts.{tail.rpartition('.')[2]}"
    return tail


def schedule_layers(
    architecture: Architecture,
    dims: ParallelDims,
    formats: Mapping[str, ModuleFormat],
    kv: Mapping[int, KVFormat],
) -> list[LayerSchedule]:
    """The schedule of every layer, in order."""
    return [
        _schedule_layer(architecture, dims, formats, kv.get(layer), layer)
        for layer in range(len(architecture.layers))
    ]


def packs_expert(local_index: int, at: Coordinates, dims: ParallelDims) -> bool:
    """Whether this rank's replica packs the `local_index`-th expert that it holds."""
    return local_index % dims.edp == at.edp_rank


def expert_owner(local_index: int, dims: ParallelDims) -> int:
    """etp_rank that assembles and writes the `local_index`-th expert."""
    return (local_index // dims.edp) % dims.etp


def spread(sizes: Iterable[int], ranks: int) -> list[int]:
    """A rank for each item: the least loaded so far, the lowest on a tie."""
    load = [0] * ranks
    chosen = []
    for size in sizes:
        rank = load.index(min(load))
        load[rank] += size
        chosen.append(rank)
    return chosen


def split_by_size(names: Sequence[str], sizes: Sequence[int], limit: int) -> list[list[str]]:
    """Groups of neighbouring names whose sizes add up to at most `limit` (or of one name)."""
    groups: list[list[str]] = []
    filled = limit
    for name, size in zip(names, sizes, strict=True):
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _schedule_layer(
    architecture: Architecture,
    dims: ParallelDims,
    formats: Mapping[str, ModuleFormat],
    kv: KVFormat | None,
    layer: int,
) -> LayerSchedule:
    dense: list[DenseItem] = []
    experts: dict[str, ModuleFormat] = {}
    copied: list[TensorSpec] = []
    groups: dict[str, int] = {}
    for spec in layer_tensors(architecture, layer):
        module_format = formats.get(spec.module) if spec.is_linear_weight else None
        if module_format is None or module_format.weight_format is Format.bf16:
            copied.append(spec)
        elif spec.role is Role.routed_expert:
            experts[spec.module.rpartition(".")[2]] = module_format
        else:
            group = groups.setdefault(tap_of(spec.module), len(groups))
            # Turns by layer too, so that no rank always gets the first tensors.
            owner = (layer // dims.dp + len(dense)) % dims.tp
            dense.append(DenseItem(spec, module_format, (group + layer) % dims.dp, owner))
    ranks = spread((spec.parameters for spec in copied), dims.world)
    ranks = [(rank + layer) % dims.world for rank in ranks]
    return LayerSchedule(
        layer,
        architecture.layers[layer],
        tuple(dense),
        experts,
        tuple(zip(copied, ranks, strict=True)),
        kv,
    )
