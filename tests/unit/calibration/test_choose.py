"""Choosing scales: first of equals, constants, clamps, and what nothing was seen of."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.architecture import Architecture, Role, expected_tensors
from pipeline.calibration.choose import choose_fp8_amax, choose_scalars
from pipeline.errors import NumericsError
from pipeline.nvfp4.formats import Format, WeightMethod
from pipeline.recipe import KVFormat, ModuleFormat
from pipeline.schedule import schedule_layers
from pipeline.sharding import ParallelDims
from tests.unit.checkpoint.tiny import tiny_config

NVFP4 = ModuleFormat(Format.nvfp4, WeightMethod.max, input_format=Format.nvfp4)
W4A16 = ModuleFormat(Format.nvfp4, WeightMethod.max)
FP8 = ModuleFormat(Format.fp8, input_format=Format.fp8)
CONSTANT = ModuleFormat(Format.fp8, input_format=Format.fp8, constant_input_amax=448.0)
ARCHITECTURE = Architecture.from_hf_config(
    tiny_config(hybrid_override_pattern="E*", num_hidden_layers=2, n_routed_experts=3)
)
R448 = np.float32(1 / 448)
R2688 = np.float32(1 / (6 * 448))


def scalars(
    layer: int,
    amax: dict[str, float],
    choose: dict[Role, ModuleFormat],
    kv: KVFormat | None = None,
    **options: Any,
) -> dict[str, float]:
    specs = [s for s in expected_tensors(ARCHITECTURE) if s.is_linear_weight]
    formats = {s.module: choose[s.role] for s in specs if s.role in choose}
    kvs = {} if kv is None else {layer: kv}
    schedule = schedule_layers(ARCHITECTURE, ParallelDims(), formats, kvs)[layer]
    return choose_scalars(
        schedule,
        {name: torch.tensor([value]) for name, value in amax.items()},
        ARCHITECTURE.n_routed_experts,
        **{"clamp_kv_scales": True, "unobserved_input_scale": None} | options,
    )


def test_the_first_of_equal_multipliers_wins() -> None:
    amax = torch.tensor([2.0, 2.0, 2.0])
    errors = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert choose_fp8_amax(amax, errors, (1.0, 1.5)).tolist() == [2.0, 3.0, 2.0]
    assert choose_fp8_amax(amax, errors, (1.5, 1.0)).tolist() == [3.0, 2.0, 3.0]
    assert choose_fp8_amax(amax, torch.empty(3, 0), ()) is amax


def test_ties_are_told_apart_in_fp64() -> None:
    errors = torch.tensor([[1.0 + 2e-16, 1.0]], dtype=torch.float64)
    assert choose_fp8_amax(torch.tensor([1.0]), errors, (1.0, 1.5)).tolist() == [1.5]


def test_query_key_value_get_one_scale_and_output_its_own() -> None:
    found = scalars(
        1, {"qkv": 3.0, "o_proj": 5.0}, {Role.attention_qkv: NVFP4, Role.attention_out: FP8}
    )
    prefix = "backbone.layers.1.mixer"
    assert found == {
        **{f"{prefix}.{x}_proj.input_scale": float(np.float32(3.0) * R2688) for x in "qkv"},
        f"{prefix}.o_proj.input_scale": float(np.float32(5.0) * R448),
    }


def test_all_experts_share_one_scale_per_projection() -> None:
    found = scalars(
        0, {"experts.up_proj": 1.0, "experts.down_proj": 9.0}, {Role.routed_expert: NVFP4}
    )
    prefix = "backbone.layers.0.mixer.experts"
    assert found == {
        f"{prefix}.{e}.{projection}.input_scale": float(np.float32(amax) * R2688)
        for projection, amax in (("up_proj", 1.0), ("down_proj", 9.0))
        for e in range(3)
    }


def test_weight_only_and_copied_tensors_have_no_scale() -> None:
    assert scalars(0, {}, {Role.routed_expert: W4A16}) == {}
    assert scalars(1, {}, {}) == {}


def test_a_constant_amax_needs_no_observation() -> None:
    found = scalars(0, {}, {Role.latent: CONSTANT})
    assert len(found) == 2
    assert set(found.values()) == {float(np.float32(448.0) * R448)}


def test_a_projection_that_saw_nothing_is_refused_by_name() -> None:
    amax = {"experts.up_proj": 1.0, "experts.down_proj": 0.0}
    with pytest.raises(NumericsError) as caught:
        scalars(0, amax, {Role.routed_expert: NVFP4})
    message = str(caught.value)
    assert message.startswith("backbone.layers.0.mixer.experts.0.down_proj input amax: found 0.0; ")
    assert "or give unobserved_input_scale=VALUE" in message
    found = scalars(0, amax, {Role.routed_expert: NVFP4}, unobserved_input_scale=0.25)
    down = {value for name, value in found.items() if "down_proj" in name}
    up = {value for name, value in found.items() if "up_proj" in name}
    assert down == {0.25}
    assert up == {float(np.float32(1.0) * R2688)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_amax_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match=r"layers\.1\.mixer\.o_proj"):
        scalars(1, {"o_proj": bad}, {Role.attention_out: FP8}, unobserved_input_scale=1.0)


@pytest.mark.parametrize(("clamp", "expected"), [(True, 1.0), (False, float(100 * R448))])
def test_kv_scales_are_clamped_on_request(clamp: bool, expected: float) -> None:
    found = scalars(
        1, {"k_cache": 100.0, "v_cache": 896.0}, {}, kv=KVFormat(), clamp_kv_scales=clamp
    )
    prefix = "backbone.layers.1.mixer"
    assert found == pytest.approx(
        {f"{prefix}.k_proj.k_scale": expected, f"{prefix}.v_proj.v_scale": 2.0}, rel=1e-7
    )


def test_constant_kv_scales() -> None:
    found = scalars(1, {}, {}, kv=KVFormat(constant_amax=448.0))
    assert set(found.values()) == {1.0}
    assert len(found) == 2


def test_keys_that_are_all_zero_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"layers\.1\.mixer\.v_proj\.v_scale"):
        scalars(1, {"k_cache": 1.0, "v_cache": 0.0}, {}, kv=KVFormat())
