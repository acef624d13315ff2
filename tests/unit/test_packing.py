"""Packing: what pipeline.nvfp4 gives for whole tensors, on one rank and cut over four."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.architecture import Architecture, Role, TensorSpec, expected_tensors
from pipeline.errors import NumericsError
from pipeline.nvfp4 import quantize_weight
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.nvfp4.reference import fp8_squared_errors, quantize_fp8, quantize_nvfp4, tensor_amax
from pipeline.packing import STATISTICS, LayerPacker
from pipeline.recipe import ModuleFormat
from pipeline.runtime.collectives import Ranks
from pipeline.schedule import schedule_layers
from pipeline.sharding import ParallelDims, Shard, shard_of
from pipeline.weights import Buffers
from tests.distributed.helpers import run_ranks
from tests.unit.checkpoint.tiny import tiny_config

CPU = torch.device("cpu")
ARCHITECTURE = Architecture.from_hf_config(
    tiny_config(
        hybrid_override_pattern="ME*",
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=4,
        ssm_state_size=8,
        n_routed_experts=4,
    )
)
SPECS = {spec.name: spec for spec in expected_tensors(ARCHITECTURE)}
FOUR_OVER_SIX = ModuleFormat(Format.nvfp4, WeightMethod.four_over_six)
MAX = ModuleFormat(Format.nvfp4, WeightMethod.max)
FP8 = ModuleFormat(Format.fp8)
FP8_SEARCH = ModuleFormat(Format.fp8, fp8_multipliers=(1.0, 1.5))
ATTENTION = "backbone.layers.2.mixer"
EXPERTS = "backbone.layers.1.mixer.experts"

Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, dict[str, tuple[float, ...]]]


def make_weights() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(spec.shape, generator=generator) * 0.02).bfloat16()
        for name, spec in SPECS.items()
        if spec.is_linear_weight
    }


WEIGHTS = make_weights()
ONE = Ranks(None, None, None, CPU)


def mixed(spec: TensorSpec) -> ModuleFormat:
    chosen = {
        Role.routed_expert: FOUR_OVER_SIX,
        Role.shared_expert: FP8,
        Role.mamba_in: MAX,
        Role.mamba_out: FP8_SEARCH,
        Role.attention_qkv: FOUR_OVER_SIX,
        Role.attention_out: FOUR_OVER_SIX,
        Role.latent: FP8_SEARCH,
    }
    return chosen[spec.role]


def swapped(spec: TensorSpec) -> ModuleFormat:
    return FP8_SEARCH if mixed(spec).weight_format is Format.nvfp4 else FOUR_OVER_SIX


def shard(spec: TensorSpec, held: Shard, tensor: torch.Tensor) -> torch.Tensor:
    if held.is_whole:
        return tensor
    parts = [tensor.narrow(held.dim, start, stop - start) for start, stop in held.ranges]
    return torch.cat(parts, held.dim)


def buffers(layer: int, first: int, mine: Tensors, dims: ParallelDims, rank: int) -> Buffers:
    """What the sweep loads without a forward pass, from these shards."""
    loaded = Buffers(first, CPU)
    coming = []
    for name in mine:
        held = shard_of(SPECS[name], ARCHITECTURE, dims, rank)
        assert held is not None
        coming.append((SPECS[name], held))
    loaded.expect(coming)
    loaded.begin_fill(layer)
    for spec, held in coming:
        loaded.load(spec, held, mine[spec.name])
    loaded.end_fill()
    return loaded


def pack(
    choose: Callable[[TensorSpec], ModuleFormat],
    dims: ParallelDims,
    ranks: Ranks,
    rank: int,
    weights: Tensors,
    **options: Any,
) -> Packed:
    formats = {SPECS[name].module: choose(SPECS[name]) for name in weights}
    packer = LayerPacker(ARCHITECTURE, dims, ranks, **options)
    local = ARCHITECTURE.n_routed_experts // dims.ep
    first = local * dims.coordinates(rank).ep_rank
    tensors: Tensors = {}
    statistics: dict[str, tuple[float, ...]] = {}
    for schedule in schedule_layers(ARCHITECTURE, dims, formats, {}):
        mine = {}
        for name, weight in weights.items():
            held = shard_of(SPECS[name], ARCHITECTURE, dims, rank)
            if held is not None and SPECS[name].layer == schedule.layer:
                mine[name] = shard(SPECS[name], held, weight)
        packed = packer.pack(schedule, buffers(schedule.layer, first, mine, dims, rank))
        assert not tensors.keys() & packed.tensors.keys()
        tensors |= packed.tensors
        statistics |= packed.statistics
    return tensors, statistics


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype is b.dtype
        and a.shape == b.shape
        and a.contiguous()
        .flatten()
        .view(torch.uint8)
        .equal(b.contiguous().flatten().view(torch.uint8))
    )


def expected(choose: Callable[[TensorSpec], ModuleFormat]) -> Tensors:
    """From whole tensors with pipeline.nvfp4 alone."""
    amax = {name: tensor_amax(weight) for name, weight in WEIGHTS.items()}
    qkv = [f"{ATTENTION}.{x}_proj.weight" for x in "qkv"]
    amax |= dict.fromkeys(qkv, torch.stack([amax[name] for name in qkv]).max())
    errors = {
        name: fp8_squared_errors(weight, amax[name], (1.0, 1.5)) for name, weight in WEIGHTS.items()
    }
    errors |= dict.fromkeys(qkv, torch.stack([errors[name] for name in qkv]).sum(0))
    tensors: Tensors = {}
    for name, weight in WEIGHTS.items():
        module, module_format = SPECS[name].module, choose(SPECS[name])
        if module_format.weight_format is Format.nvfp4:
            assert module_format.weight_method is not None
            packed = quantize_nvfp4(weight, amax[name], module_format.weight_method)
            tensors[f"{module}.weight"] = packed.codes
            tensors[f"{module}.weight_scale"] = packed.weight_scale
            tensors[f"{module}.weight_scale_2"] = packed.weight_scale_2
            continue
        chosen = amax[name]
        if module_format.fp8_multipliers and errors[name][1] < errors[name][0]:
            chosen = chosen * 1.5
        codes, weight_scale = quantize_fp8(weight, chosen)
        tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"] = codes, weight_scale
    return tensors


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not same(found[name], wanted[name])]
    assert different == []


@pytest.mark.parametrize("choose", [mixed, swapped])
def test_one_rank_packs_what_nvfp4_gives(choose: Callable[[TensorSpec], ModuleFormat]) -> None:
    tensors, statistics = pack(choose, ParallelDims(), ONE, 0, WEIGHTS)
    assert_same(tensors, expected(choose))
    assert statistics.keys() == WEIGHTS.keys()


def test_a_tensor_of_its_own_is_what_the_public_function_gives() -> None:
    tensors, _ = pack(mixed, ParallelDims(), ONE, 0, WEIGHTS)
    for module in (f"{ATTENTION}.o_proj", f"{EXPERTS}.3.down_proj"):
        record = quantize_weight(WEIGHTS[f"{module}.weight"], "four_over_six")
        assert same(tensors[f"{module}.weight"], record.codes)
        assert same(tensors[f"{module}.weight_scale"], record.weight_scale)
        assert same(tensors[f"{module}.weight_scale_2"], record.weight_scale_2)


def test_query_key_value_share_one_scale() -> None:
    for choose, scale in ((mixed, "weight_scale_2"), (swapped, "weight_scale")):
        weights = WEIGHTS | {
            f"{ATTENTION}.k_proj.weight": WEIGHTS[f"{ATTENTION}.k_proj.weight"] * 8
        }
        tensors, _ = pack(choose, ParallelDims(), ONE, 0, weights)
        scales = {float(tensors[f"{ATTENTION}.{x}_proj.{scale}"]) for x in "qkv"}
        assert len(scales) == 1
        amax = float(weights[f"{ATTENTION}.k_proj.weight"].abs().max())
        divisor = 6 * 256 if choose is mixed else 448
        (shared,) = scales
        assert min(abs(shared * divisor / amax - t) for t in (1.0, 1.5)) < 1e-6
        assert float(tensors[f"{ATTENTION}.o_proj.{scale}"]) != shared


def test_statistics_are_measured_on_what_is_stored() -> None:
    _, statistics = pack(mixed, ParallelDims(), ONE, 0, WEIGHTS)
    for name, weight in WEIGHTS.items():
        values = dict(zip(STATISTICS, statistics[name], strict=True))
        squared = float(weight.double().square().sum())
        assert values["squared_weight"] == pytest.approx(squared, rel=1e-12)
        assert 0 < values["squared_error"] < 0.02 * squared
        nvfp4 = mixed(SPECS[name]).weight_format is Format.nvfp4
        assert values["blocks"] == (weight.numel() // 16 if nvfp4 else 0)
        if mixed(SPECS[name]) is FOUR_OVER_SIX:
            assert values["squared_error"] < values["squared_error_of_max"]
            assert 0.2 < values["blocks_m4"] / values["blocks"] < 0.7
    _, plain = pack(mixed, ParallelDims(), ONE, 0, WEIGHTS, compare_to_max=False)
    row = dict(zip(STATISTICS, plain[f"{EXPERTS}.0.up_proj.weight"], strict=True))
    assert row["squared_error_of_max"] == row["squared_error"]


def test_an_all_zero_expert_stays_zero() -> None:
    name = f"{EXPERTS}.2.up_proj"
    weights = WEIGHTS | {f"{name}.weight": torch.zeros_like(WEIGHTS[f"{name}.weight"])}
    tensors, statistics = pack(mixed, ParallelDims(), ONE, 0, weights)
    assert not tensors[f"{name}.weight"].any()
    assert 0 < float(tensors[f"{name}.weight_scale_2"]) < float("inf")
    row = dict(zip(STATISTICS, statistics[f"{name}.weight"], strict=True))
    assert row["zero_blocks"] == row["blocks"]
    assert row["blocks_flushed"] == row["squared_error"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [f"{EXPERTS}.3.down_proj.weight", f"{ATTENTION}.v_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    weight = WEIGHTS[name].clone()
    weight[5, 7] = value
    with pytest.raises(NumericsError) as caught:
        pack(mixed, ParallelDims(), ONE, 0, WEIGHTS | {name: weight})
    assert str(caught.value).startswith(f"{name} (rank 0): found NaN or Inf; every weight must")


def pack_on_ranks(rank: int, layouts: list[dict[str, int]], choose: Any) -> list[Any]:
    """Packs this rank's part under every layout; tensors travel as bytes (float8 cannot)."""
    results = []
    for degrees in layouts:
        dims = ParallelDims(**degrees)
        at = dims.coordinates(rank)
        groups = []
        for degree in (dims.tp, dims.etp):
            members = [list(range(r, r + degree)) for r in range(0, dims.world, degree)]
            made = [dist.new_group(ranks) for ranks in members]
            groups.append(made[rank // degree])
        assert at.tp_rank == dist.get_rank(groups[0])
        ranks = Ranks(dist.group.WORLD, *groups, CPU)
        tensors, statistics = pack(choose, dims, ranks, rank, WEIGHTS)
        flat = {n: (t.dtype, t.shape, t.flatten().view(torch.uint8)) for n, t in tensors.items()}
        results.append((flat, statistics))
    return results


LAYOUTS = [
    {"world": 4, "tp": 4, "ep": 2, "etp": 2},  # two ranks share each key/value head
    {"world": 4, "tp": 2, "ep": 4},
    {"world": 4, "tp": 1, "etp": 4},
    {"world": 4, "tp": 2, "ep": 1, "etp": 2},
]


@pytest.mark.parametrize("choose", [mixed, swapped])
def test_four_ranks_pack_the_same_bytes(choose: Callable[[TensorSpec], ModuleFormat]) -> None:
    _, of_one = pack(choose, ParallelDims(), ONE, 0, WEIGHTS)
    for layout, per_rank in zip(
        LAYOUTS, zip(*run_ranks(pack_on_ranks, 4, LAYOUTS, choose), strict=True), strict=True
    ):
        joined: Tensors = {}
        sums: dict[str, torch.Tensor] = {}
        for tensors, statistics in per_rank:
            assert not joined.keys() & tensors.keys(), layout
            joined |= {n: d.clone().view(t).view(shape) for n, (t, shape, d) in tensors.items()}
            for name, row in statistics.items():
                sums[name] = sums.get(name, 0) + torch.tensor(row, dtype=torch.float64)
        assert_same(joined, expected(choose))
        assert sums.keys() == of_one.keys()
        for name, row in of_one.items():
            wanted = torch.tensor(row, dtype=torch.float64)
            torch.testing.assert_close(sums[name], wanted, rtol=1e-9, atol=0)
