"""The schedule: one writer per tensor, fused tensors in one replica, even turns, right taps."""

from collections import Counter
from itertools import product
from typing import Any

import pytest

from pipeline.architecture import Architecture, LayerType, Role, expected_tensors
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.recipe import KVFormat, ModuleFormat
from pipeline.schedule import (
    LayerSchedule,
    expert_owner,
    packs_expert,
    schedule_layers,
    spread,
    tap_of,
)
from pipeline.sharding import ParallelDims, shard_of
from tests.unit.checkpoint.tiny import tiny_config

NVFP4 = ModuleFormat(Format.nvfp4, WeightMethod.max, input_format=Format.nvfp4)
W4A16 = ModuleFormat(Format.nvfp4, WeightMethod.max)
FP8 = ModuleFormat(Format.fp8, input_format=Format.fp8)
CONSTANT = ModuleFormat(Format.fp8, input_format=Format.fp8, constant_input_amax=448.0)
BF16 = ModuleFormat(Format.bf16)

ARCHITECTURE = Architecture.from_hf_config(
    tiny_config(
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_num_heads=4,
        n_groups=4,
        n_routed_experts=8,
    )
)
COMBINATIONS = [
    ParallelDims(world=world, tp=tp, ep=ep, etp=etp)
    for world, tp, ep, etp in product((1, 4, 8), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4))
    if world % tp == 0 and world % (ep * etp) == 0
]


def formats_of(choose: Any) -> dict[str, ModuleFormat]:
    specs = expected_tensors(ARCHITECTURE)
    return {s.module: choose(s) for s in specs if s.is_linear_weight}


def writers(schedule: LayerSchedule, dims: ParallelDims) -> Counter[tuple[str, int]]:
    """How often each rank writes each tensor of a layer."""
    found: Counter[tuple[str, int]] = Counter()
    for spec, rank in schedule.copies:
        found[spec.name, rank] += 1
    for item in schedule.dense:
        found[item.spec.name, item.owner + dims.tp * item.replica] += 1
    local = ARCHITECTURE.n_routed_experts // dims.ep
    prefix = f"backbone.layers.{schedule.layer}.mixer.experts"
    for rank, e in product(range(dims.world), range(local)):
        at = dims.coordinates(rank)
        if packs_expert(e, at, dims) and expert_owner(e, dims) == at.etp_rank:
            for projection in schedule.experts:
                found[f"{prefix}.{local * at.ep_rank + e}.{projection}.weight", rank] += 1
    return found


@pytest.mark.parametrize("dims", COMBINATIONS, ids=lambda d: f"{d.world}-{d.tp}-{d.ep}-{d.etp}")
def test_every_tensor_is_written_by_exactly_one_rank_that_holds_it(dims: ParallelDims) -> None:
    formats = formats_of(lambda s: BF16 if s.role is Role.latent else NVFP4)
    schedules = schedule_layers(ARCHITECTURE, dims, formats, {})
    found: Counter[tuple[str, int]] = Counter()
    for schedule in schedules:
        found += writers(schedule, dims)
    inside = [s for s in expected_tensors(ARCHITECTURE) if s.layer is not None]
    assert sorted(name for name, _ in found.elements()) == sorted(s.name for s in inside)
    copied = {spec.name for schedule in schedules for spec, _ in schedule.copies}
    specs = {s.name: s for s in inside}
    for name, rank in found:
        assert 0 <= rank < dims.world
        assert name in copied or shard_of(specs[name], ARCHITECTURE, dims, rank) is not None
    for schedule in schedules:
        replicas = {tap_of(i.spec.module): set[int]() for i in schedule.dense}
        for item in schedule.dense:
            replicas[tap_of(item.spec.module)].add(item.replica)
        assert all(len(replica) == 1 for replica in replicas.values())


def test_query_key_value_share_a_tap_and_a_replica() -> None:
    dims = ParallelDims(world=4, tp=1)
    attention = schedule_layers(ARCHITECTURE, dims, formats_of(lambda s: FP8), {})[3]
    assert attention.layer_type is LayerType.attention
    replicas = {item.spec.module[-6:]: item.replica for item in attention.dense}
    assert replicas["q_proj"] == replicas["k_proj"] == replicas["v_proj"]
    assert replicas["o_proj"] != replicas["q_proj"]
    assert attention.observed == ("qkv", "o_proj")


def test_work_is_spread_over_the_ranks() -> None:
    dims = ParallelDims(world=4, tp=2, ep=2)
    schedules = schedule_layers(ARCHITECTURE, dims, formats_of(lambda s: NVFP4), {})
    turns: Counter[tuple[int, int]] = Counter()
    copied: Counter[int] = Counter()
    experts: Counter[int] = Counter()
    for schedule in schedules:
        turns.update((item.replica, item.owner) for item in schedule.dense)
        copied.update(rank for _, rank in schedule.copies)
        for (name, rank), count in writers(schedule, dims).items():
            experts[rank] += count * (".experts." in name)
    assert set(turns) == set(product(range(2), range(2)))
    assert max(turns.values()) <= 2 * min(turns.values())
    assert set(copied) == set(range(4))
    assert len(set(experts.values())) == 1


@pytest.mark.parametrize("dims", COMBINATIONS[::3], ids=lambda d: d.describe())
def test_experts_are_packed_once_and_evenly(dims: ParallelDims) -> None:
    local = ARCHITECTURE.n_routed_experts // dims.ep
    load = Counter[int]()
    for rank, e in product(range(dims.world), range(local)):
        at = dims.coordinates(rank)
        load[rank] += packs_expert(e, at, dims) and expert_owner(e, dims) == at.etp_rank
    assert load.total() == ARCHITECTURE.n_routed_experts
    assert max(load.values()) - min(load.values()) <= 1


def test_spread_gives_to_the_least_loaded_and_the_lowest_on_a_tie() -> None:
    assert spread([5, 1, 1, 4, 1], 3) == [0, 1, 2, 1, 2]
    assert spread([], 3) == []
    assert spread([3, 2, 1], 1) == [0, 0, 0]


def test_what_is_not_quantized_is_copied() -> None:
    dims = ParallelDims(world=1)
    schedules = schedule_layers(ARCHITECTURE, dims, {}, {})
    assert all(not schedule.is_quantized and not schedule.observed for schedule in schedules)
    assert sum(len(s.copies) for s in schedules) == sum(
        spec.layer is not None for spec in expected_tensors(ARCHITECTURE)
    )


def test_only_what_needs_an_amax_is_observed() -> None:
    chosen = {
        Role.mamba_in: W4A16,
        Role.mamba_out: CONSTANT,
        Role.routed_expert: NVFP4,
        Role.shared_expert: FP8,
        Role.latent: W4A16,
    }
    formats = formats_of(lambda s: chosen.get(s.role, BF16))
    kv = {3: KVFormat(), 9: KVFormat(constant_amax=448.0)}
    schedules = schedule_layers(ARCHITECTURE, ParallelDims(), formats, kv)
    assert schedules[0].observed == ()
    assert schedules[0].is_quantized
    assert schedules[1].observed == (
        "shared_experts.up_proj",
        "shared_experts.down_proj",
        "experts.up_proj",
        "experts.down_proj",
    )
    assert schedules[3].observed == ("k_cache", "v_cache")
    assert not schedules[3].is_quantized
    assert schedules[9].observed == ()
    assert schedules[9].kv == KVFormat(constant_amax=448.0)


@pytest.mark.parametrize(
    ("module", "tap"),
    [
        ("backbone.layers.3.mixer.q_proj", "qkv"),
        ("backbone.layers.3.mixer.v_proj", "qkv"),
        ("backbone.layers.3.mixer.o_proj", "o_proj"),
        ("backbone.layers.1.mixer.experts.17.down_proj", "experts.down_proj"),
        ("backbone.layers.1.mixer.shared_experts.up_proj", "shared_experts.up_proj"),
        ("backbone.layers.6.mixer.up_proj", "up_proj"),
    ],
)
def test_tap_of(module: str, tap: str) -> None:
    assert tap_of(module) == tap
