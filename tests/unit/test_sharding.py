"""Shard rules: all ranks together hold every element of every tensor exactly once, counted."""

from itertools import product
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture, Role, expected_tensors
from pipeline.errors import LayoutError
from pipeline.sharding import ParallelDims, Shard, check_layout, shard_of

CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-",
    "hidden_size": 32,
    "vocab_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "attention_bias": True,
    "mamba_num_heads": 16,
    "mamba_head_dim": 4,
    "ssm_state_size": 3,
    "n_groups": 8,
    "use_bias": True,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 48,
    "mlp_bias": True,
}
ARCHITECTURE = Architecture.from_hf_config(CONFIG)
SPECS = expected_tensors(ARCHITECTURE)
COMBINATIONS = [
    ParallelDims(world=world, tp=tp, ep=ep, etp=etp)
    for world, tp, ep, etp in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4))
    if world % tp == 0 and world % (ep * etp) == 0
]


def take(shard: Shard, tensor: torch.Tensor) -> torch.Tensor:
    if shard.is_whole:
        return tensor
    return torch.cat([tensor.narrow(shard.dim, a, b - a) for a, b in shard.ranges], shard.dim)


def test_many_layouts_are_tried() -> None:
    assert len(COMBINATIONS) > 40
    assert any(dims.tp > ARCHITECTURE.num_key_value_heads and dims.dp > 1 for dims in COMBINATIONS)
    assert all(check_layout(ARCHITECTURE, dims) == [] for dims in COMBINATIONS)


@pytest.mark.parametrize("dims", COMBINATIONS, ids=lambda d: f"{d.world}-{d.tp}-{d.ep}-{d.etp}")
def test_every_element_is_counted_once_per_replica(dims: ParallelDims) -> None:
    for spec in SPECS:
        if spec.role is Role.routed_expert and spec.expert not in (0, 7):
            continue
        counts = torch.zeros(spec.shape)
        held = torch.zeros(spec.shape)
        for rank in range(dims.world):
            shard = shard_of(spec, ARCHITECTURE, dims, rank)
            if shard is None:
                assert spec.role is Role.routed_expert
                continue
            assert tuple(take(shard, counts).shape) == shard.shape
            for target, amount in ((counts, float(shard.counted)), (held, 1.0)):
                if shard.is_whole:
                    target += amount
                for start, stop in shard.ranges:
                    target.narrow(shard.dim, start, stop - start).add_(amount)
        replicas = dims.edp if spec.role is Role.routed_expert else dims.dp
        assert (counts == replicas).all(), spec.name
        assert (held >= counts).all(), spec.name


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_in_proj_is_cut_part_by_part(degree: int) -> None:
    """Rows [z 64, x 64, B 24, C 24, dt 16]: every rank gets its heads of each part."""
    names = [("z", 64), ("x", 64), ("B", 24), ("C", 24), ("dt", 16)]
    labels = [(part, i * degree // size) for part, size in names for i in range(size)]
    spec = next(s for s in SPECS if s.name.endswith("in_proj.weight"))
    for rank in range(degree):
        shard = shard_of(spec, ARCHITECTURE, ParallelDims(world=degree, tp=degree), rank)
        assert shard is not None
        rows = take(shard, torch.arange(len(labels))).tolist()
        assert [labels[row] for row in rows] == [
            (part, rank) for part, size in names for _ in range(size // degree)
        ]


def test_key_value_heads_are_shared_where_tp_exceeds_them() -> None:
    dims = ParallelDims(world=8, tp=8)
    key = next(s for s in SPECS if s.name.endswith("k_proj.weight"))
    query = next(s for s in SPECS if s.name.endswith("q_proj.weight"))
    shards = [shard_of(key, ARCHITECTURE, dims, rank) for rank in range(8)]
    assert [s.ranges for s in shards if s] == [((0, 4),)] * 4 + [((4, 8),)] * 4
    assert [s.counted for s in shards if s] == [True, False, False, False] * 2
    queries = [shard_of(query, ARCHITECTURE, dims, rank) for rank in range(8)]
    assert [s.ranges for s in queries if s] == [((4 * r, 4 * r + 4),) for r in range(8)]


def test_experts_lie_in_contiguous_ranges() -> None:
    dims = ParallelDims(world=8, tp=2, ep=2, etp=2)
    down = [s for s in SPECS if s.name.endswith("down_proj.weight") and s.is_routed_expert]
    for rank in range(8):
        at = dims.coordinates(rank)
        assert rank == at.tp_rank + 2 * at.dp_rank
        assert rank == at.etp_rank + 2 * (at.ep_rank + 2 * at.edp_rank)
        mine = [(s.expert, shard_of(s, ARCHITECTURE, dims, rank)) for s in down]
        held = {expert: shard for expert, shard in mine if shard is not None}
        assert list(held) == list(range(4 * at.ep_rank, 4 * at.ep_rank + 4))
        half = Shard(1, ((8 * at.etp_rank, 8 * at.etp_rank + 8),), (16, 8))
        assert set(held.values()) == {half}


@pytest.mark.parametrize("name", ["world", "tp", "ep", "etp"])
@pytest.mark.parametrize("value", [0, -1])
def test_degrees_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(LayoutError, match=rf"parallel\.{name}: found {value}; every degree is at"):
        ParallelDims(**{name: value})


@pytest.mark.parametrize(
    "degrees", [{"world": 6, "tp": 4}, {"world": 4, "ep": 2, "etp": 4}, {"world": 2, "ep": 3}]
)
def test_degrees_that_do_not_multiply_show_the_equation(degrees: dict[str, int]) -> None:
    with pytest.raises(LayoutError) as caught:
        ParallelDims(**degrees)
    tp, ep, etp = (degrees.get(name, 1) for name in ("tp", "ep", "etp"))
    assert f"world={degrees['world']}, tp={tp}, ep={ep}, etp={etp}" in str(caught.value)
    assert f"world = tp * dp = {tp} * dp and world = etp * ep * edp" in str(caught.value)


@pytest.mark.parametrize(
    ("degrees", "changes", "rules"),
    [
        ({"tp": 3}, {}, ["mamba_num_heads=16", "n_groups=8", "num_attention_heads=8"]),
        ({"tp": 16}, {}, ["n_groups=8", "num_attention_heads=8"]),
        (
            {"tp": 4},
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            ["must divide num_key_value_heads=6 or be a multiple of it"],
        ),
        ({"ep": 3}, {}, ["must divide n_routed_experts=8"]),
        ({"etp": 32}, {}, ["must divide moe_intermediate_size=16"]),
        (
            {"tp": 8},
            {"moe_shared_expert_intermediate_size": 36},
            ["must divide moe_shared_expert_intermediate_size=36"],
        ),
        ({"tp": 8}, {"intermediate_size": 44}, ["must divide 44"]),
    ],
)
def test_degrees_that_do_not_divide_the_model_are_refused(
    degrees: dict[str, int], changes: dict[str, Any], rules: list[str]
) -> None:
    world = max(degrees.values())
    architecture = Architecture.from_hf_config(CONFIG | changes)
    errors = check_layout(architecture, ParallelDims(world=world, **degrees))
    text = "\n".join(map(str, errors))
    assert all(rule in text for rule in rules), text
    assert all(str(error).startswith(f"parallel.{next(iter(degrees))}") for error in errors)


def test_describe_names_both_grids() -> None:
    dims = ParallelDims(world=8, tp=2, ep=2, etp=2)
    assert dims.describe() == "world=8 (tp=2 dp=4; etp=2 ep=2 edp=2)"
