"""Groups of projections: which a layer has, the pattern that names each, what moving it costs."""

import dataclasses
import math
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pipeline.architecture import Architecture, expected_tensors
from pipeline.evaluation.groups import Group, groups_of, harms
from pipeline.evaluation.records import GroupHarm
from pipeline.job import Job, build_job, estimate_stored
from pipeline.nvfp4.formats import Format
from pipeline.recipe import load_recipe, resolve
from pipeline.recipe.records import Entry, modules_of
from pipeline.sharding import ParallelDims
from tests.unit.checkpoint.tiny import tiny_config

PRESETS = Path(__file__).parents[3] / "conf" / "recipe"
ARCHITECTURE = Architecture.from_hf_config(tiny_config())  # MEM*EM-MEM*E: layers 1 and 11
EVERYTHING = "general/ptq/nvfp4_default-kv_fp8"
EXPECTED = {
    EVERYTHING: {
        "mamba": [("in_proj", "nvfp4"), ("out_proj", "nvfp4")],
        "moe": [("shared_experts", "nvfp4"), ("latent", "nvfp4"), ("routed_experts", "nvfp4")],
        "attention": [("qkv", "nvfp4"), ("o_proj", "nvfp4"), ("kv_cache", "fp8")],
        "mlp": [("mlp", "nvfp4")],
    },
    "nvfp4_four_over_six": {
        "mamba": [("in_proj", "fp8"), ("out_proj", "fp8")],
        "moe": [("shared_experts", "fp8"), ("routed_experts", "nvfp4")],
        "attention": [("kv_cache", "fp8")],
        "mlp": [],
    },
    "nvfp4_weight_only": {
        "mamba": [],
        "moe": [("shared_experts", "nvfp4"), ("routed_experts", "nvfp4")],
        "attention": [],
        "mlp": [("mlp", "nvfp4")],
    },
    "fp8": {
        "mamba": [("in_proj", "fp8"), ("out_proj", "fp8")],
        "moe": [("shared_experts", "fp8"), ("latent", "fp8"), ("routed_experts", "fp8")],
        "attention": [("qkv", "fp8"), ("o_proj", "fp8"), ("kv_cache", "fp8")],
        "mlp": [("mlp", "fp8")],
    },
}
TAPS = {
    "qkv": {"qkv"},
    "kv_cache": {"k_cache", "v_cache"},
    "latent": {"fc1_latent_proj", "fc2_latent_proj"},
    "shared_experts": {"shared_experts.up_proj", "shared_experts.down_proj"},
    "routed_experts": {"experts.up_proj", "experts.down_proj"},
    "mlp": {"up_proj", "down_proj"},
}


def job_of(recipe: str) -> Job:
    loaded = load_recipe(recipe, PRESETS)
    return build_job(ARCHITECTURE, ParallelDims(), loaded, estimate_stored(ARCHITECTURE))


def groups_under(job: Job) -> list[Group]:
    return [group for schedule in job.schedules for group in groups_of(schedule, ARCHITECTURE)]


def harm_of(group: Group, parameters: int = 1000) -> GroupHarm:
    (harm,) = harms([group], [0.5], parameters)
    return harm


@pytest.mark.parametrize("recipe", EXPECTED)
def test_groups_of_every_layer(recipe: str) -> None:
    job = job_of(recipe)
    for schedule in job.schedules:
        groups = groups_of(schedule, ARCHITECTURE)
        kind = schedule.layer_type.value
        found = [(group.name, harm_of(group).format) for group in groups]
        assert sorted(found) == sorted(EXPECTED[recipe][kind])
        names = [name for name, _ in found]
        assert "routed_experts" not in names[:-1], "its weights cannot be put back"
        for group in groups:
            assert (group.layer, group.layer_type) == (schedule.layer, kind)
            assert group.taps == TAPS.get(group.name, {group.name})
        weights = [spec.module for group in groups for spec, _ in group.weights]
        formats = job.resolution.formats.items()
        prefix = f"backbone.layers.{schedule.layer}."
        wanted = [name for name, f in formats if f.is_quantized and name.startswith(prefix)]
        assert sorted(weights) == sorted(wanted)


@pytest.mark.parametrize("recipe", [EVERYTHING, "nvfp4_weight_only"])
def test_a_pattern_matches_the_group_and_nothing_else(recipe: str) -> None:
    job = job_of(recipe)
    modules = [spec.module for spec in expected_tensors(ARCHITECTURE) if spec.is_linear_weight]
    for group in groups_under(job):
        found = {name for name in modules if fnmatch(name, harm_of(group).pattern)}
        assert found == {spec.module for spec, _ in group.weights}


def test_a_pattern_at_the_end_of_the_recipe_leaves_the_group_in_bf16() -> None:
    job = job_of(EVERYTHING)
    modules = modules_of(expected_tensors(ARCHITECTURE))
    before = job.resolution
    for group in groups_under(job):
        if group.name == "kv_cache":
            continue  # the same for all attention layers
        entry = Entry(len(job.recipe.entries), harm_of(group).pattern, enable=False)
        recipe = dataclasses.replace(job.recipe, entries=(*job.recipe.entries, entry))
        after = resolve(recipe, modules)
        assert entry.pattern not in after.unmatched_patterns
        changed = {name for name, f in after.formats.items() if f != before.formats[name]}
        assert changed == {spec.module for spec, _ in group.weights}
        assert all(after.formats[name].weight_format is Format.bf16 for name in changed)
        assert after.kv == before.kv


def test_the_cache_s_pattern_names_its_quantizers_alone() -> None:
    (first, *_) = [group for group in groups_under(job_of("fp8")) if group.name == "kv_cache"]
    names = [f"model.layers.{first.layer}.mixer.{x}_bmm_quantizer" for x in "qkvp"]
    found = [name for name in names if fnmatch(name, harm_of(first).pattern)]
    assert found == names[1:3]


def test_bits_that_other_formats_would_add() -> None:
    """Two experts of [64, 64] up and down: 16,384 parameters; NVFP4 takes 4.5 bits, FP8 8."""
    by_format = {}
    for recipe in (EVERYTHING, "fp8"):
        groups = {g.name: g for g in groups_under(job_of(recipe)) if g.layer in (1, 3)}
        by_format[recipe] = {name: harm_of(group, 2**20) for name, group in groups.items()}
    routed = by_format[EVERYTHING]["routed_experts"]
    assert routed.extra_bits_fp8 == pytest.approx(16384 * 3.5 / 2**20, rel=1e-12)
    assert routed.extra_bits_bf16 == pytest.approx(16384 * 11.5 / 2**20, rel=1e-12)
    routed = by_format["fp8"]["routed_experts"]
    assert routed.extra_bits_fp8 is None
    assert routed.extra_bits_bf16 == pytest.approx(16384 * 8 / 2**20, rel=1e-12)
    cache = by_format[EVERYTHING]["kv_cache"]
    assert (cache.extra_bits_fp8, cache.extra_bits_bf16) == (None, 0.0)


def test_bits_of_a_group_in_two_formats() -> None:
    (group,) = [g for g in groups_under(job_of(EVERYTHING)) if g.name == "mlp"]
    (up, nvfp4), (down, _) = group.weights
    fp8 = dataclasses.replace(nvfp4, weight_format=Format.fp8, weight_method=None)
    harm = harm_of(dataclasses.replace(group, weights=((up, nvfp4), (down, fp8))), 64 * 64)
    assert harm.format == "fp8, nvfp4"
    assert harm.extra_bits_fp8 == 3.5
    assert harm.extra_bits_bf16 == 11.5 + 8


def test_the_worst_comes_first() -> None:
    groups = groups_under(job_of("nvfp4_four_over_six"))[:4]
    found = harms(groups, [0.1, math.nan, 0.3, 0.2], 1000)
    assert [(h.layer, h.group) for h in found] == [
        (groups[i].layer, groups[i].name) for i in (1, 2, 3, 0)
    ]
