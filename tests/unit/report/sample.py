"""Runs as the sweep would report them, with an evaluation: any number of layers, drawn from a seed.

The figures are made up but hang together: errors grow with depth as independent ones add up, some
layers are worse than their kind, some experts saw nothing.
"""

import math
import random

from pipeline.evaluation.records import EvaluationReport, Fidelity, GroupHarm, LayerErrors
from pipeline.report.records import ExpertCoverage, KindReport, KVAmax, LayerReport, RunReport

TYPES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
PATTERN = "MEMEM*EME"
ROLES = {
    "mamba": [("mamba_in", "fp8", "in_proj"), ("mamba_out", "fp8", "out_proj")],
    "moe": [("routed_expert", "nvfp4", "up_proj"), ("shared_expert", "fp8", "down_proj")],
    "attention": [("attention_qkv", "bf16", ""), ("attention_out", "nvfp4", "o_proj")],
}
GROUPS = {
    "mamba": [("in_proj", "fp8", 0.006), ("out_proj", "fp8", 0.003)],
    "moe": [("routed_experts", "nvfp4", 0.09), ("shared_experts", "fp8", 0.004)],
    "attention": [("o_proj", "nvfp4", 0.001), ("kv_cache", "fp8", 0.0)],
}
ALONE = {"mamba": 0.011, "moe": 0.024, "attention": 0.008}
WEIGHT_ERROR = {"nvfp4": 0.094, "fp8": 0.026}


def sample_report(layers: int = 9, *, experts: int = 64, seed: int = 7) -> RunReport:
    """A finished and audited run over a hybrid model of `layers` layers, with an evaluation."""
    draw = random.Random(seed)
    types = [TYPES[PATTERN[index % len(PATTERN)]] for index in range(layers)]
    moe = [index for index, kind in enumerate(types) if kind == "moe"]
    report = RunReport(
        source="/models/hybrid-550b",
        output="/results/hybrid-550b-nvfp4",
        recipe="nvfp4_four_over_six",
        layers=[_layer(index, kind, draw) for index, kind in enumerate(types)],
        outside=[
            KindReport(
                role=role, format="bf16", method="", tensors=1, parameters=10**9, stored_bytes=2**31
            )
            for role in ("embedding", "head")
        ],
        coverage=[ExpertCoverage(layer=n, tokens_per_expert=_tokens(experts, draw)) for n in moe],
        kv_amax=[
            KVAmax(layer=index, k_amax=18 + 6 * draw.random(), v_amax=4 + draw.random())
            for index, kind in enumerate(types)
            if kind == "attention"
        ],
        loss=1.6601,
        unigram_loss=7.31,
        bf16_bytes=1_118_000_000_000,
        quantized_bytes=352_300_000_000,
        predicted_bytes=352_300_000_000,
        effective_bits=5.03,
        phases={"prepare": 41.0, "sweep": 2510.0, "evaluation": 160.0, "audit": 12.0},
        layout={"world": 8, "tp": 1, "dp": 8, "ep": 8},
        versions={"torch": "2.13.0"},
        hardware="8 x NVIDIA H100",
        peak_bytes=61_000_000_000,
        audit={"passed": True, "tensors": 49_213, "problems": []},
        evaluation=sample_evaluation(types, draw),
    )
    report.coverage[-1].tokens_per_expert[3] = 0
    report.warnings = [f"layer {moe[-1]}: 1 of {experts} experts saw no calibration token: 3"]
    return report


def sample_evaluation(types: list[str], draw: random.Random) -> EvaluationReport:
    """An evaluation in both serving modes that passed its gates."""
    layers, total = [], {"w4a4": 0.0, "w4a16": 0.0}
    for index, kind in enumerate(types):
        alone = ALONE[kind] * (0.8 + 0.4 * draw.random()) * (2.2 if index % 29 == 3 else 1)
        errors = {"w4a4": alone, "w4a16": alone * (0.7 if kind == "moe" else 1)}
        total = {mode: math.hypot(0.985 * total[mode], error) for mode, error in errors.items()}
        layers.append(
            LayerErrors(layer=index, layer_type=kind, accumulated=dict(total), alone=errors)
        )
    return EvaluationReport(
        data="held-out sequences of the calibration data",
        sequences=8,
        seq_len=8192,
        arithmetic="products in BF16 of dequantized weights and inputs, sums in FP32",
        perplexity=5.2541,
        modes=[
            Fidelity(
                mode="w4a4", perplexity=5.3127, kl_mean=0.01234, kl_p99=0.1162, top1=0.9893,
                clipped=0.00021,
            ),
            Fidelity(
                mode="w4a16", perplexity=5.2894, kl_mean=0.00817, kl_p99=0.0791, top1=0.9915,
                clipped=0.00004,
            ),
        ],
        layers=layers,
        groups=_groups(types, draw),
        group_tokens=8192,
        seconds=160.0,
    )  # fmt: skip


def _groups(types: list[str], draw: random.Random) -> list[GroupHarm]:
    groups = [
        GroupHarm(
            layer=index,
            layer_type=kind,
            group=group,
            pattern=f"*layers.{index}.mixer.{group.removeprefix('routed_')}*weight_quantizer",
            format=stored,
            kl_mean=0.002 * draw.random() ** 3,
            extra_bits_fp8=3.5 * share / 8 if stored == "nvfp4" else None,
            extra_bits_bf16=share,
        )
        for index, kind in enumerate(types)
        for group, stored, share in GROUPS[kind]
    ]
    return sorted(groups, key=lambda group: -group.kl_mean)


def _layer(index: int, kind: str, draw: random.Random) -> LayerReport:
    return LayerReport(
        layer=index,
        layer_type=kind,
        tokens=4_194_304,
        seconds={
            "read stall": draw.random(),
            "compute": 18 + 4 * draw.random(),
            "write stall": 0.2,
        },
        kinds=[_kind(index, role, stored, tap, draw) for role, stored, tap in ROLES[kind]],
    )


def _kind(index: int, role: str, stored: str, tap: str, draw: random.Random) -> KindReport:
    kind = KindReport(
        role=role,
        format=stored,
        method={"nvfp4": "four_over_six", "fp8": "mse", "bf16": ""}[stored],
        tensors=512 if role == "routed_expert" else 1,
        parameters=10**8,
        stored_bytes={"nvfp4": 56_250_000, "fp8": 10**8, "bf16": 2 * 10**8}[stored],
    )
    if stored == "bf16":
        return kind
    kind.squared_weight = 1e4
    kind.squared_error = 1e4 * (WEIGHT_ERROR[stored] * (0.97 + 0.06 * draw.random())) ** 2
    kind.worst_tensor = f"backbone.layers.{index}.mixer.{tap}.weight"
    kind.worst_relative_error = 1.3 * WEIGHT_ERROR[stored]
    kind.input_amax = {tap: 4 * math.exp(3 * draw.random())}
    if stored == "nvfp4":
        kind.squared_error_of_max = kind.squared_error / 0.83
        kind.blocks = 6_250_000
        kind.blocks_m4 = int(kind.blocks * (0.44 + 0.02 * draw.random()))
        kind.blocks_flushed = 1200
    return kind


def _tokens(experts: int, draw: random.Random) -> list[int]:
    return [int(3000 * math.exp(draw.gauss(0, 0.6))) + 1 for _ in range(experts)]
