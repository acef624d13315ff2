"""The job: every reason to refuse before any weight is read, and who copies what."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.architecture import Architecture
from pipeline.errors import LayersweepError, LayoutError, RecipeError
from pipeline.job import (
    Job,
    StoredTensor,
    build_job,
    estimate_stored,
    find_refusals,
    quantization_configs,
)
from pipeline.recipe import load_recipe
from pipeline.sharding import ParallelDims
from tests.unit.checkpoint.tiny import tiny_config

PRESETS = Path(__file__).parents[2] / "conf" / "recipe"
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "intermediate_size": 96,
}


def job_of(
    recipe: str = "nvfp4_four_over_six", dims: ParallelDims | None = None, **changes: Any
) -> Job:
    architecture = Architecture.from_hf_config(tiny_config(**WIDE | changes))
    stored = estimate_stored(architecture)
    return build_job(architecture, dims or ParallelDims(), load_recipe(recipe, PRESETS), stored)


def refusals(job: Job, seq_len: int = 64) -> list[LayersweepError]:
    return find_refusals(job, seq_len)


def test_a_job_that_fits_is_not_refused() -> None:
    for dims in (ParallelDims(), ParallelDims(world=4, tp=2, ep=2, etp=2)):
        assert refusals(job_of(dims=dims)) == []


def test_degrees_that_do_not_divide_are_refused() -> None:
    (error,) = refusals(job_of(dims=ParallelDims(world=3, ep=3)))
    assert isinstance(error, LayoutError)
    assert str(error).startswith("parallel.ep: found 3; must divide n_routed_experts=4")


def test_a_block_never_crosses_an_expert_shard() -> None:
    found = refusals(job_of("nvfp4_routed_only", ParallelDims(world=4, etp=4)))
    assert [type(error) for error in found] == [LayoutError]
    message = str(found[0])
    assert ".mixer.experts.0.down_proj.weight: found K=96 / etp=4 = 24; " in message
    assert "is not a multiple of 16: a block never crosses a shard" in message
    assert message.endswith("use parallel.etp <= 3")


def test_a_block_never_crosses_a_dense_shard() -> None:
    found = refusals(job_of("nvfp4_four_over_six_all", ParallelDims(world=4, tp=4)))
    text = "\n".join(map(str, found))
    assert "shared_experts.down_proj.weight: found K=96 / tp=4 = 24" in text
    assert "To mend it: use parallel.tp <= 3" in text


def test_the_remedy_for_a_crossed_block_works() -> None:
    """Whoever follows the remedy to the letter must not be refused again."""
    (error,) = refusals(job_of("nvfp4_routed_only", ParallelDims(world=4, etp=4)))
    largest = int(error.remedy.rpartition(" ")[2])
    again = job_of("nvfp4_routed_only", ParallelDims(world=largest, etp=largest))
    assert refusals(again) == []


def test_a_width_that_is_no_multiple_of_16_is_the_recipes_fault() -> None:
    found = refusals(job_of("nvfp4_routed_only", moe_intermediate_size=88))
    assert [type(error) for error in found] == [RecipeError]
    message = str(found[0])
    assert ".experts.0.down_proj.weight: found K=88; NVFP4 needs in_features" in message
    assert "leave '*down_proj*' unquantized in the recipe" in message


def test_fp8_weights_may_be_cut_anywhere() -> None:
    assert refusals(job_of("fp8", ParallelDims(world=4, tp=4, etp=4))) == []


@pytest.mark.parametrize(("seq_len", "nearest"), [(63, 62), (65, 64), (1, 2)])
def test_sequences_must_be_cut_evenly(seq_len: int, nearest: int) -> None:
    (error,) = refusals(job_of(dims=ParallelDims(world=2, tp=2)), seq_len)
    assert str(error) == (
        f"calibration.seq_len: found {seq_len}; sequence parallelism cuts sequences by "
        f"parallel.tp=2. To mend it: use calibration.seq_len={nearest}"
    )


def test_weight_only_recipes_do_not_care_about_sequences() -> None:
    assert refusals(job_of("nvfp4_weight_only", ParallelDims(world=2, tp=2)), 63) == []


def test_tensors_outside_the_layers_are_spread_by_size() -> None:
    job = job_of(dims=ParallelDims(world=3))
    names = [name for name, _ in job.outer]
    assert names[:2] == ["backbone.embeddings.weight", "backbone.norm_f.weight"]
    assert "lm_head.weight" in names
    assert (
        len(names)
        == len(set(names))
        == sum(not name.startswith("backbone.layers.") for name in job.stored)
    )
    assert {rank for _, rank in job.outer} == {0, 1, 2}
    load = [0, 0, 0]
    for name, rank in job.outer:
        load[rank] += job.stored[name].nbytes
    assert max(load) - min(load) <= max(job.stored[name].nbytes for name in names)


def test_sizes_of_stored_tensors() -> None:
    assert StoredTensor("x", "BF16", (3, 5)).nbytes == 30
    assert StoredTensor("x", "F32", ()).nbytes == 4
    stored = job_of().stored
    assert stored["backbone.layers.1.mixer.gate.weight"].dtype == "F32"
    assert stored["backbone.layers.0.mixer.A_log"].dtype == "BF16"
    assert "mtp.layers.0.eh_proj.weight" in stored


KV_ONLY = """
metadata: {recipe_type: ptq, description: only the KV cache}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*[kv]_bmm_quantizer', cfg: {num_bits: e4m3}}
"""


def test_a_recipe_that_quantizes_no_weight_is_refused_before_the_sweep(tmp_path: Path) -> None:
    path = tmp_path / "kv.yaml"
    path.write_text(KV_ONLY)
    (error,) = refusals(job_of(str(path)))
    assert isinstance(error, RecipeError)
    assert "found no quantized projection" in str(error)


def test_mtp_tensors_that_config_json_does_not_promise_are_excluded_all_the_same() -> None:
    architecture = Architecture.from_hf_config(tiny_config(**WIDE, num_nextn_predict_layers=0))
    stored = estimate_stored(architecture)
    recipe = load_recipe("nvfp4_four_over_six", PRESETS)
    for extra, expected in ({}, False), ({"mtp.x": StoredTensor("mtp.x", "BF16", (4,))}, True):
        job = build_job(architecture, ParallelDims(), recipe, {**stored, **extra})
        ignore = quantization_configs(job).quantization_config["ignore"]
        assert ("mtp*" in ignore) is expected
