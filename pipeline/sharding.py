"""Which part of which tensor a rank holds: the rank grid and the shard rules.

In: the architecture and the degrees of parallelism. Out: for any tensor and any rank, the slices
of the *source* tensor which, concatenated, are that rank's shard. Reading, refilling slots,
assembling packed shards and planning all follow these rules. Pure arithmetic.

Two grids cover the same ranks (megatron-core's default order, fastest axis first):

    dense tensors    rank = tp_rank  + tp  * dp_rank
    routed experts   rank = etp_rank + etp * (ep_rank + ep * edp_rank)
"""

from __future__ import annotations

import dataclasses

from pipeline.architecture import Architecture, LayerType, Role, TensorSpec
from pipeline.errors import LayoutError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """The degrees of the rank grid, checked on construction.

    Attributes:
        world: Number of ranks.
        tp: Tensor parallelism of dense projections, Mamba heads and attention heads.
        ep: Expert parallelism.
        etp: Tensor parallelism inside an expert.

    Raises:
        LayoutError: The degrees do not multiply to the number of ranks.
    """

    world: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        """Checks both equations; the message shows them whole."""
        for name in ("world", "tp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise LayoutError(
                    f"parallel.{name}",
                    value=getattr(self, name),
                    rule="every degree is at least 1",
                    remedy="leave it out for 1",
                )
        if self.world % self.tp or self.world % (self.ep * self.etp):
            raise LayoutError(
                "parallel degrees",
                value=f"world={self.world}, tp={self.tp}, ep={self.ep}, etp={self.etp}",
                rule=(
                    f"world = tp * dp = {self.tp} * dp and "
                    f"world = etp * ep * edp = {self.etp} * {self.ep} * edp "
                    "must hold in whole numbers"
                ),
                remedy="change the degrees or the number of ranks (torchrun --nproc-per-node)",
            )

    @property
    def dp(self) -> int:
        """Data parallelism: how many ways the calibration sequences are split."""
        return self.world // self.tp

    @property
    def edp(self) -> int:
        """How many replicas of every routed expert there are."""
        return self.world // (self.ep * self.etp)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank` on both grids."""
        outer = rank // self.etp
        return Coordinates(
            tp_rank=rank % self.tp,
            dp_rank=rank // self.tp,
            etp_rank=rank % self.etp,
            ep_rank=outer % self.ep,
            edp_rank=outer // self.ep,
        )

    def describe(self) -> str:
        """Degrees on one line."""
        return (
            f"world={self.world} (tp={self.tp} dp={self.dp}; "
            f"etp={self.etp} ep={self.ep} edp={self.edp})"
        )


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Place of one rank on the dense grid (tp, dp) and on the expert grid (etp, ep, edp)."""

    tp_rank: int
    dp_rank: int
    etp_rank: int
    ep_rank: int
    edp_rank: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of a logical tensor that one rank holds.

    Attributes:
        dim: The dim that is cut; -1 when the tensor is held whole.
        ranges: Half-open ranges of the logical dim, in local order.
        shape: Shape of the shard.
        counted: False where another rank of the group holds the same part too (a shared
            key/value head, a replicated tensor) and is the one that counts it in a SUM.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    counted: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether the shard is the whole tensor."""
        return self.dim < 0


def shard_of(
    spec: TensorSpec, architecture: Architecture, dims: ParallelDims, rank: int
) -> Shard | None:
    """The part of `spec` that `rank` holds, or None where another EP rank owns the expert."""
    at = dims.coordinates(rank)
    if spec.role is Role.routed_expert:
        local = architecture.n_routed_experts // dims.ep
        if spec.expert // local != at.ep_rank:
            return None
        dim = 0 if spec.name.endswith("up_proj.weight") else 1
        return _cut(spec, dim, (spec.shape[dim],), dims.etp, at.etp_rank)
    tail = ".".join(spec.name.split(".")[4:])
    if spec.role in (Role.attention_qkv, Role.bias) and tail[:2] in ("k_", "v_", "q_"):
        heads = architecture.num_attention_heads
        if tail[0] != "q":
            heads = architecture.num_key_value_heads
        return _cut_heads(spec, heads, architecture.head_dim, dims.tp, at.tp_rank)
    rule = _dense_rule(spec, tail, architecture)
    if rule is None:
        return dataclasses.replace(_whole(spec), counted=at.tp_rank == 0)
    return _cut(spec, rule[0], rule[1], dims.tp, at.tp_rank)


def check_layout(architecture: Architecture, dims: ParallelDims) -> list[LayoutError]:
    """Every reason why this model cannot be sharded by these degrees (empty: it can)."""
    a, errors = architecture, []

    def need(ok: bool, what: str, value: object, rule: str) -> None:
        if not ok:
            errors.append(LayoutError(what, value=value, rule=rule, remedy="choose another degree"))

    for kind in sorted(set(a.layers)):
        if kind is LayerType.mamba:
            for name in ("mamba_num_heads", "n_groups"):
                count = getattr(a, name)
                need(count % dims.tp == 0, "parallel.tp", dims.tp, f"must divide {name}={count}")
        elif kind is LayerType.attention:
            heads, kv = a.num_attention_heads, a.num_key_value_heads
            need(
                heads % dims.tp == 0,
                "parallel.tp",
                dims.tp,
                f"must divide num_attention_heads={heads}",
            )
            need(
                kv % dims.tp == 0 or dims.tp % kv == 0,
                "parallel.tp",
                dims.tp,
                f"must divide num_key_value_heads={kv} or be a multiple of it",
            )
        elif kind is LayerType.moe:
            need(
                a.n_routed_experts % dims.ep == 0,
                "parallel.ep",
                dims.ep,
                f"must divide n_routed_experts={a.n_routed_experts}",
            )
            width, shared = a.moe_intermediate_size, a.moe_shared_expert_intermediate_size
            need(
                width % dims.etp == 0,
                "parallel.etp",
                dims.etp,
                f"must divide moe_intermediate_size={width}",
            )
            need(
                not a.has_shared_experts or shared % dims.tp == 0,
                "parallel.tp",
                dims.tp,
                f"must divide moe_shared_expert_intermediate_size={shared}",
            )
        else:
            width = a.intermediate_size
            need(width % dims.tp == 0, "parallel.tp", dims.tp, f"must divide {width}")
    return errors


def _dense_rule(spec: TensorSpec, tail: str, a: Architecture) -> tuple[int, tuple[int, ...]] | None:
    """Dim that TP cuts and its parts (each part is cut on its own), or None for replicated."""
    if tail in ("in_proj.weight", "in_proj.bias"):
        return 0, a.mamba_in_parts
    if tail in ("conv1d.weight", "conv1d.bias"):
        return 0, a.mamba_conv_parts
    if tail in ("A_log", "D", "dt_bias") or (
        tail == "norm.weight" and spec.role is Role.mamba_other
    ):
        return 0, (spec.shape[0],)
    if spec.role in (Role.shared_expert, Role.mlp, Role.bias) and ".up_proj." in f".{tail}":
        return 0, (spec.shape[0],)
    if tail.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
        return 1, (spec.shape[1],)
    return None


def _whole(spec: TensorSpec) -> Shard:
    return Shard(-1, (), spec.shape)


def _cut(spec: TensorSpec, dim: int, parts: tuple[int, ...], degree: int, rank: int) -> Shard:
    if degree == 1:
        return _whole(spec)
    ranges, offset = [], 0
    for part in parts:
        size = part // degree
        ranges.append((offset + rank * size, offset + (rank + 1) * size))
        offset += part
    return _shard(spec, dim, ranges)


def _cut_heads(spec: TensorSpec, heads: int, head_dim: int, degree: int, rank: int) -> Shard:
    if degree == 1:
        return _whole(spec)
    if degree <= heads:
        local = heads // degree
        first, last, counted = rank * local, (rank + 1) * local, True
    else:  # a key/value head is shared by degree / heads neighbouring ranks
        first = rank * heads // degree
        last, counted = first + 1, rank % (degree // heads) == 0
    shard = _shard(spec, 0, [(first * head_dim, last * head_dim)])
    return dataclasses.replace(shard, counted=counted)


def _shard(spec: TensorSpec, dim: int, ranges: list[tuple[int, int]]) -> Shard:
    shape = list(spec.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    return Shard(dim, tuple(ranges), tuple(shape))
