"""The plan: FACTS of Nemotron 3 Ultra to the printed digit, and sums that must agree.

Every figure is linear in the number of experts (no recipe names one), so the plans of 8 and 16
experts give that of 512 exactly. (docs/recipes.md holds the full-size plans and has its own test.)
"""

import dataclasses
from functools import cache
from pathlib import Path

import pytest

from pipeline.architecture import Architecture
from pipeline.config import read_yaml
from pipeline.errors import SourceError
from pipeline.job import Job, build_job, estimate_stored
from pipeline.plan import Plan, make_plan, scalar_bytes
from pipeline.plan_ranks import layer_written_bytes, packed_bytes, written_bytes
from pipeline.recipe import load_recipe
from pipeline.sharding import ParallelDims
from tests.unit.checkpoint.tiny import tiny_config

CONF = Path(__file__).parents[2] / "conf"


def job_of(config: dict[str, object], recipe: str, dims: ParallelDims | None = None) -> Job:
    architecture = Architecture.from_hf_config(config)
    return build_job(
        architecture,
        dims or ParallelDims(),
        load_recipe(recipe, CONF / "recipe"),
        estimate_stored(architecture),
    )


def plan_job(job: Job, seq_len: int = 64) -> Plan:
    return make_plan(job, num_sequences=7, seq_len=seq_len, compute_bytes=2)


@cache
def ultra(recipe: str, experts: int) -> Plan:
    config = read_yaml(CONF / "model" / "nemotron3_ultra.yaml")
    config |= {"n_routed_experts": experts, "num_experts_per_tok": min(22, experts)}
    return plan_job(job_of(config, recipe))


def at_512(few: float, twice: float, experts: int = 512) -> float:
    return few + (experts - 8) * (twice - few) / 8


def printed(source: float, quantized: float, parameters: float, bits: float) -> tuple[str, ...]:
    return (
        f"{parameters / 1e9:.2f}",
        f"{source / 1e9:,.0f}",
        f"{quantized / 1e9:.1f}",
        f"{bits / parameters:.2f}",
    )


def figures(plan: Plan) -> list[float]:
    bits = plan.effective_bits * plan.parameters
    return [plan.bf16_bytes, plan.quantized_bytes, plan.parameters, bits]


@pytest.mark.parametrize(
    ("recipe", "size", "bits"),
    [
        ("nvfp4_four_over_six", "352.3", "5.03"),
        ("nvfp4_four_over_six_all", "339.9", "4.85"),
        ("nvfp4_four_over_six_first_moe_bf16", None, "5.25"),
        ("nvfp4_routed_only", None, "5.43"),
        ("nvfp4_routed_only_8_moe_layers_bf16", None, "7.19"),
    ],
)
def test_published_sizes_of_nemotron_3_ultra(recipe: str, size: str | None, bits: str) -> None:
    pairs = zip(figures(ultra(recipe, 8)), figures(ultra(recipe, 16)), strict=True)
    parameters, source, quantized, effective = printed(*(at_512(*pair) for pair in pairs))
    assert (parameters, source, effective) == ("560.52", "1,121", bits)
    assert size is None or quantized == size


def test_figures_are_linear_in_the_number_of_experts() -> None:
    plan = ultra("nvfp4_four_over_six", 40)
    pairs = zip(
        figures(ultra("nvfp4_four_over_six", 8)),
        figures(ultra("nvfp4_four_over_six", 16)),
        strict=True,
    )
    exact = [at_512(*pair, experts=40) for pair in pairs]
    assert figures(plan) == pytest.approx(exact, rel=1e-12)
    assert plan.layers == {"mamba": 48, "attention": 12, "moe": 48, "mlp": 0}
    assert (plan.kv_cache, plan.refusals, plan.notes) == ("fp8 (calibrated)", [], [])
    (experts,) = [g for g in plan.groups if g.role == "routed_expert"]
    assert (experts.format, experts.method, experts.activations) == (
        "nvfp4",
        "four_over_six",
        "nvfp4",
    )
    assert (experts.layers, experts.tensors) == (48, 48 * 40 * 2)
    # 4.5 bits and one FP32 scale of the tensor each.
    assert experts.stored_bytes == experts.parameters * 9 // 16 + 4 * experts.tensors


DIMS = [
    ParallelDims(),
    ParallelDims(world=2, tp=2, ep=2),
    ParallelDims(world=3),
    ParallelDims(world=4, tp=2, ep=2, etp=2),
    ParallelDims(world=8, tp=2, ep=4, etp=1),
]
RECIPES = ["nvfp4_four_over_six", "nvfp4_weight_only", "fp8", "nvfp4_four_over_six_all"]
CONFIG = tiny_config(
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    mamba_num_heads=8,
    n_groups=4,
    n_routed_experts=4,
)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dims", DIMS, ids=lambda d: d.describe())
def test_bytes_written_add_up_whatever_the_layout(recipe: str, dims: ParallelDims) -> None:
    job = job_of(CONFIG, recipe, dims)
    plan = plan_job(job)
    assert plan.refusals == []
    expected = 0
    for name, stored in job.stored.items():
        module_format = job.resolution.formats.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and module_format is not None and module_format.is_quantized:
            spec = next(spec for spec in job.specs if spec.name == name)
            expected += packed_bytes(spec, module_format)
        else:
            expected += stored.nbytes
    assert sum(written_bytes(job)) == expected
    assert plan.quantized_bytes == expected + scalar_bytes(job)
    assert sum(group.stored_bytes for group in plan.groups) == expected
    assert sum(group.source_bytes for group in plan.groups) == plan.bf16_bytes
    assert [rank.rank for rank in plan.per_rank] == list(range(dims.world))
    assert sum(rank.writes_gb for rank in plan.per_rank) * 1e9 == pytest.approx(expected)
    per_layer = [layer_written_bytes(job, schedule) for schedule in job.schedules]
    assert all(len(sizes) == dims.world for sizes in per_layer)
    assert plan.parameters == sum(stored.parameters for stored in job.stored.values())


def test_writing_is_balanced() -> None:
    job = job_of(CONFIG | {"vocab_size": 16}, "nvfp4_four_over_six", ParallelDims(world=4, ep=4))
    written = written_bytes(job)
    assert max(written) < 1.5 * min(written)


def test_effective_bits_by_hand() -> None:
    job = job_of(CONFIG, "nvfp4_weight_only")
    plan = plan_job(job)
    bits = 0.0
    for spec_name, stored in job.stored.items():
        module_format = job.resolution.formats.get(spec_name.removesuffix(".weight"))
        is_weight = spec_name.endswith(".weight")
        if is_weight and module_format is not None and module_format.is_quantized:
            bits += 4.5 * stored.parameters
        else:
            bits += 8 * stored.nbytes
    assert plan.effective_bits == pytest.approx(bits / plan.parameters, rel=1e-12)


def test_weight_only_needs_no_forward_and_no_slots() -> None:
    plan = plan_job(job_of(CONFIG, "nvfp4_weight_only"))
    assert not plan.needs_forward
    assert scalar_bytes(job_of(CONFIG, "nvfp4_weight_only")) == 0
    assert plan.kv_cache == "16-bit"
    assert plan.per_rank[0].slot_gb == 0.0
    assert plan.memory is not None
    assert plan.memory.hidden == plan.memory.activations == plan.snapshot_bytes == 0


def test_hidden_states_are_counted_for_padded_sequences_too() -> None:
    dims = ParallelDims(world=4, tp=2, ep=2)
    plan = make_plan(
        job_of(CONFIG, "nvfp4_four_over_six", dims), num_sequences=7, seq_len=64, compute_bytes=2
    )
    # ceil(7 / dp 2) = 4 sequences of 64 / tp 2 positions of 128 bf16 values.
    assert plan.memory is not None
    assert plan.memory.hidden == 4 * 32 * 128 * 2
    assert plan.snapshot_bytes == 4 * plan.memory.hidden  # of four ranks


def test_a_rank_reads_only_its_share() -> None:
    one = plan_job(job_of(CONFIG, "nvfp4_four_over_six"))
    inside = sum(
        rank.reads_gb
        for rank in plan_job(
            job_of(CONFIG, "nvfp4_four_over_six", ParallelDims(world=2, ep=2))
        ).per_rank
    )
    assert one.per_rank[0].reads_gb < inside < 2 * one.per_rank[0].reads_gb


def test_scalars_of_a_layer_by_hand() -> None:
    job = job_of(CONFIG, "nvfp4_four_over_six")
    inputs = [m for m in job.resolution.formats.values() if m.input_format and m.is_quantized]
    assert scalar_bytes(job) == 4 * (len(inputs) + 2 * 2)  # two attention layers: k and v each


def test_a_refused_layout_keeps_the_rest_of_the_answer() -> None:
    plan = plan_job(job_of(CONFIG, "nvfp4_four_over_six", ParallelDims(world=3, ep=3)))
    assert plan.per_rank == []
    assert len(plan.refusals) == 1
    assert "must divide n_routed_experts=4" in plan.refusals[0]
    assert plan.quantized_bytes == plan_job(job_of(CONFIG, "nvfp4_four_over_six")).quantized_bytes


def test_what_was_found_wrong_with_the_source_is_a_refusal() -> None:
    job = job_of(CONFIG, "nvfp4_weight_only")
    plan = make_plan(
        job,
        num_sequences=1,
        seq_len=2,
        compute_bytes=4,
        extra_refusals=[SourceError("3 tensors are missing")],
    )
    assert plan.refusals == ["3 tensors are missing"]
    assert len(plan.per_rank) == 1


def test_widths_that_hopper_cannot_serve_are_noted_once_per_kind() -> None:
    plan = plan_job(job_of(CONFIG | {"moe_intermediate_size": 80}, "nvfp4_routed_only"))
    assert plan.notes == [
        "backbone.layers.1.mixer.experts.0.down_proj has in_features 80: not a multiple of 64, "
        "so Hopper (Marlin) cannot serve it"
    ]


def test_json_carries_every_figure() -> None:
    plan = plan_job(job_of(CONFIG, "nvfp4_four_over_six"))
    values = plan.to_json()
    assert {field.name for field in dataclasses.fields(Plan)} <= set(values)
    assert values["quantized_gb"] == plan.quantized_bytes / 1e9
    assert values["groups"][0]["role"] == plan.groups[0].role
