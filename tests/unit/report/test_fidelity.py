"""What quantization cost, in words: verdict, modes, what to try, warnings."""

import math

import pytest

from pipeline.report.fidelity import (
    advise,
    clipping_warnings,
    describe_fidelity,
    format_bits,
    format_perplexity,
    mode_rows,
    worst_groups,
    worst_layers,
)
from pipeline.report.plots import draw_all
from tests.unit.report.sample import sample_report


@pytest.fixture
def evaluation():
    return sample_report().evaluation


def test_verdict_and_modes_say_the_same(evaluation):
    assert describe_fidelity(evaluation) == (
        "W4A4 keeps 98.9 % of the top-1 tokens, KL 0.0123 nats, perplexity 5.313 against 5.254 "
        "(+1.1 %)."
    )
    assert mode_rows(evaluation) == [
        ["perplexity (BF16: 5.254)", "5.313", "5.289"],
        ["perplexity against BF16", "+1.1 %", "+0.7 %"],
        ["mean KL, nats per token", "0.0123", "0.00817"],
        ["99th percentile of KL", "0.116", "0.0791"],
        ["same top-1 token, %", "98.9", "99.2"],
        ["clipped inputs, %", "0.021", "0.004"],
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0"), (0.99999, "99.99"), (0.9996, "99.96"), (0.9994, "99.9"), (0.5, "50.0")],
)
def test_less_than_all_never_reads_as_all(evaluation, share, text):
    evaluation.modes[0].top1 = share
    assert mode_rows(evaluation)[4][1] == text


def test_worst_layers_are_those_worst_alone_in_any_mode(evaluation):
    evaluation.layers[5].alone["w4a16"] = 0.5
    evaluation.layers[7].alone["w4a4"] = math.nan
    evaluation.layers[0].accumulated["w4a4"] = 0.9
    assert [layer.layer for layer in worst_layers(evaluation, 3)] == [7, 5, 3]


def test_what_to_try_is_the_worst_that_can_move_and_the_cheapest(evaluation):
    groups = {(group.layer, group.group): group for group in evaluation.groups}
    for group in evaluation.groups:
        group.kl_mean = 1e-6
    groups[5, "kv_cache"].kl_mean = 0.04  # worst, but one format serves all attention layers
    groups[1, "routed_experts"].kl_mean = 0.03
    groups[0, "in_proj"].kl_mean = 0.02
    groups[3, "routed_experts"].kl_mean = 0.01
    groups[5, "o_proj"].kl_mean = 0.005
    assert worst_groups(evaluation, 1)[0].group == "kv_cache"
    assert advise(evaluation) == [
        (
            "layer 1, routed experts (KL 0.03)",
            "*layers.1.mixer.experts*weight_quantizer",
            "FP8 +0.039, BF16 +0.090 bits per parameter",
        ),
        (
            "layer 0, in_proj (KL 0.02)",
            "*layers.0.mixer.in_proj*weight_quantizer",
            "BF16 +0.006 bits per parameter",
        ),
        (
            "layer 3, routed experts (KL 0.01)",
            "*layers.3.mixer.experts*weight_quantizer",
            "FP8 +0.039, BF16 +0.090 bits per parameter",
        ),
        (
            "most KL for its bits: layer 5, o_proj (KL 0.005)",
            "*layers.5.mixer.o_proj*weight_quantizer",
            "FP8 <0.001, BF16 +0.001 bits per parameter",
        ),
    ]
    evaluation.groups = []
    assert advise(evaluation) == []


def test_only_much_clipping_is_a_warning(evaluation):
    assert clipping_warnings(evaluation.modes) == []
    evaluation.modes[0].clipped = 0.001
    evaluation.modes[1].clipped = 0.0011
    (warning,) = clipping_warnings(evaluation.modes)
    assert warning.startswith("W4A16 clips 0.11 % of the quantized inputs")


def test_figures_in_words():
    values = [5.3127, 53.127, 5312.7, math.inf]
    assert [format_perplexity(x) for x in values] == ["5.313", "53.13", "5,313", "not finite"]
    values = [0.0, 1e-5, 0.0694, 1.5, math.nan]
    assert [format_bits(x) for x in values] == ["0", "<0.001", "+0.069", "+1.500", "-"]


@pytest.mark.parametrize("layers", [9, 108])
def test_drawings_name_types_modes_and_worst(layers):
    report = sample_report(layers)
    plots = {plot.name: plot.svg for plot in draw_all(report)}
    assert list(plots)[:2] == ["depth", "groups"]
    for label in ("Mamba", "attention", "MoE", "W4A4 (Blackwell)", "W4A16 (Hopper)", "alone (%)"):
        assert f">{label}</text>" in plots["depth"]
    assert ">3</text>" in plots["depth"]  # the worst layer's number; no tick of 108 layers is 3
    assert plots["groups"].count(">layer ") == 15 if layers > 9 else len(report.evaluation.groups)
    assert len(plots["depth"]) < 150_000
