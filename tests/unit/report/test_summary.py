"""Totals, the verdict and the figures in words."""

import math

import pytest

from pipeline.report.summary import (
    describe_coverage,
    describe_loss,
    describe_size,
    format_bytes,
    format_change,
    format_percent,
    format_seconds,
    layer_seconds,
    summarize,
    summarize_kinds,
    verdict,
)


def test_kinds_add_up_over_layers(report):
    lines = summarize_kinds(report)
    assert [line.label for line in lines] == [
        "routed experts", "Mamba in", "attention QKV", "router", "Mamba other", "embedding", "head",
    ]  # fmt: skip
    experts = lines[0]
    assert (experts.tensors, experts.parameters, experts.stored_bytes) == (64, 320_000, 180_000)
    assert experts.relative_error == pytest.approx(0.09)
    assert experts.change_from_max == pytest.approx(-0.19)
    assert experts.m4_share == pytest.approx(9004 / 20_000)
    assert experts.flushed_share == pytest.approx(0.002)
    assert experts.worst_tensor == "backbone.layers.3.mixer.experts.3.up_proj.weight"
    assert lines[1].change_from_max is None
    assert lines[1].m4_share is None


def test_copied_tensors_can_share_a_line_and_have_no_error(report):
    *_, copied = lines = summarize_kinds(report, merge_copied=True)
    assert len(lines) == 3
    assert copied.label == "copied as it is"
    assert copied.tensors == 6
    assert copied.relative_error is None
    assert copied.worst_tensor == ""


def test_total_compares_only_what_was_measured_under_max(report):
    total = summarize([kind for layer in report.layers for kind in layer.kinds], "total")
    assert total.relative_error == pytest.approx(math.sqrt((2 * 0.81 + 0.07) / 300))
    assert total.change_from_max == pytest.approx(-0.19)
    assert (total.format, total.method) == ("", "")


def test_verdict(report):
    assert verdict(report) == (
        "Passed the audit: 873.8 kB of BF16 became 373.8 kB, 6.84 bits per parameter; "
        "relative error 7.51 % (squared error -19.0 % against max); 1 min 07 s on 2 x CPU."
    )
    report.audit["passed"] = False
    assert verdict(report).startswith("FAILED the audit: ")
    report.audit.clear()
    assert verdict(report).startswith("Not audited: ")


def test_coverage_names_experts_without_tokens(report):
    assert describe_coverage(report) == "2 layers x 16, 1 saw no token: layer 3 expert 15"
    report.coverage[0].tokens_per_expert = [0] * 16
    assert "17 saw no token: layer 1 expert 0," in describe_coverage(report)
    assert describe_coverage(report).endswith("layer 1 expert 5 and 11 more")


def test_coverage_of_reached_experts_names_the_least(report):
    del report.coverage[1]
    assert describe_coverage(report) == (
        "1 layer x 16, all reached; fewest: 1,000 tokens, 6.10 % of its layer's (layer 1 expert 0)"
    )


def test_loss_beside_unigram_loss(report, weight_only_report):
    assert describe_loss(report) == (
        "1.2345 nats per token in BF16 (token frequencies alone: 3.2100)"
    )
    report.loss = 4.0
    assert "WORSE than token frequencies alone: 3.2100" in describe_loss(report)
    assert describe_loss(weight_only_report) == ""


def test_size_beside_the_plan(report):
    assert describe_size(report).endswith("as planned to the byte")
    report.predicted_bytes -= 1500
    assert describe_size(report).endswith("+1,500 bytes off the plan")


def test_seconds_add_up_over_layers(report):
    assert layer_seconds(report) == pytest.approx(
        {"waiting for the source": 0.4, "computing": 9.6, "waiting for the files": 0.8}
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (12, "12 B"),
        (1500, "1.50 kB"),
        (352.3e9, "352.3 GB"),
        (1121.04e9, "1,121 GB"),
        (12e12, "12.00 TB"),
    ],
)
def test_bytes(count, text):
    assert format_bytes(count) == text


def test_other_figures():
    assert [format_percent(x) for x in (None, math.nan, 0, 3e-5, 0.0263)] == [
        "-", "-", "0.00", "<0.01", "2.63",
    ]  # fmt: skip
    assert [format_change(x) for x in (None, -0.164, 0.0)] == ["-", "-16.4 %", "+0.0 %"]
    assert [format_seconds(x) for x in (1.25, 59.99, 245, 3725)] == [
        "1.2 s", "60.0 s", "4 min 05 s", "1 h 02 min",
    ]  # fmt: skip
