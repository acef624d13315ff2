"""Gates: what passes, what misses, in which words; and records that went through JSON."""

import dataclasses
import json
import math

import pytest

from pipeline.config import EvaluationConfig
from pipeline.evaluation.gates import missed_gates
from pipeline.evaluation.records import (
    EvaluationReport,
    Fidelity,
    GroupHarm,
    LayerErrors,
    restore,
)
from pipeline.report.run_json import finite

NAN, INF = math.nan, math.inf


def fidelity(mode: str, **changes: float) -> Fidelity:
    values = {"perplexity": 10.1, "kl_mean": 0.02, "kl_p99": 0.3, "top1": 0.95, "clipped": 0.0}
    return Fidelity(mode=mode, **(values | changes))


def report(*modes: Fidelity, perplexity: float = 10.0) -> EvaluationReport:
    return EvaluationReport(
        data="ids.npy",
        sequences=8,
        seq_len=4096,
        arithmetic="exact",
        perplexity=perplexity,
        modes=list(modes or (fidelity("w4a4"), fidelity("w4a16"))),
    )


def test_without_gates_nothing_is_missed() -> None:
    broken = fidelity("w4a4", perplexity=NAN, kl_mean=NAN, top1=NAN)
    assert missed_gates(report(broken), EvaluationConfig()) == []


@pytest.mark.parametrize(
    ("gate", "at", "beyond"),
    [("max_kl", 0.02, 0.0199), ("min_top1", 0.95, 0.951), ("max_perplexity_ratio", 1.01, 1.0099)],
)
def test_a_figure_at_its_gate_passes(gate: str, at: float, beyond: float) -> None:
    assert missed_gates(report(), EvaluationConfig(**{gate: at})) == []
    missed = missed_gates(report(), EvaluationConfig(**{gate: beyond}))
    assert [line.split(":")[0] for line in missed] == ["W4A4", "W4A16"]
    assert all(f"{gate}={beyond:g}, measured " in line for line in missed)


def test_every_missed_gate_is_told_with_its_mode_and_figure() -> None:
    asked = EvaluationConfig(max_kl=0.05, min_top1=0.9, max_perplexity_ratio=1.02)
    worse = fidelity("w4a16", kl_mean=0.0625, top1=0.8125, perplexity=10.5)
    assert missed_gates(report(fidelity("w4a4"), worse), asked) == [
        "W4A16: max_kl=0.05, measured 0.0625",
        "W4A16: min_top1=0.9, measured 0.8125",
        "W4A16: max_perplexity_ratio=1.02, measured 1.05",
    ]


@pytest.mark.parametrize(
    ("gate", "limit", "figure"),
    [("max_kl", INF, "kl_mean"), ("min_top1", 1e-9, "top1"), ("max_perplexity_ratio", INF, "")],
)
def test_what_is_no_number_misses(gate: str, limit: float, figure: str) -> None:
    broken = fidelity("w4a4", **{figure or "perplexity": NAN})
    (missed,) = missed_gates(report(broken), EvaluationConfig(**{gate: limit}))
    assert missed.startswith(f"W4A4: {gate}=")
    assert missed.endswith("measured nan")


def test_a_reference_that_broke_misses_the_ratio() -> None:
    asked = EvaluationConfig(max_perplexity_ratio=2.0)
    assert len(missed_gates(report(perplexity=NAN), asked)) == 2
    both = report(fidelity("w4a4", perplexity=INF), perplexity=INF)
    assert len(missed_gates(both, asked)) == 1


def whole() -> EvaluationReport:
    found = report()
    found.layers = [
        LayerErrors(layer=0, layer_type="mamba", accumulated={"w4a4": 0.01}, alone={"w4a4": 0.02})
    ]
    found.groups = [
        GroupHarm(
            layer=0,
            layer_type="mamba",
            group="in_proj",
            pattern="*",
            format="fp8",
            kl_mean=0.001,
            extra_bits_fp8=None,
            extra_bits_bf16=0.25,
        )
    ]
    found.group_tokens, found.seconds, found.rejected = 512, 1.5, ["W4A4: max_kl=1"]
    return found


def through_json(found: EvaluationReport) -> EvaluationReport:
    values = json.loads(json.dumps(finite(dataclasses.asdict(found)), allow_nan=False))
    return restore(values)


def test_a_report_comes_back_from_json() -> None:
    assert through_json(whole()) == whole()
    assert through_json(report()) == report()


def test_null_comes_back_as_what_is_no_number_and_misses_its_gate() -> None:
    broken = whole()
    broken.perplexity = INF
    broken.modes[1].kl_mean = broken.modes[1].top1 = NAN
    broken.layers[0].accumulated["w4a4"] = NAN
    broken.layers[0].alone["w4a4"] = INF
    broken.groups[0].kl_mean = NAN
    found = through_json(broken)
    for value in (
        found.perplexity,
        found.modes[1].kl_mean,
        found.modes[1].top1,
        found.layers[0].accumulated["w4a4"],
        found.layers[0].alone["w4a4"],
        found.groups[0].kl_mean,
    ):
        assert math.isnan(value)
    assert found.groups[0].extra_bits_fp8 is None, "null says there: FP8 already"
    assert found.modes[0] == broken.modes[0]
    asked = EvaluationConfig(max_kl=1.0, min_top1=0.1)
    assert len(missed_gates(found, asked)) == 2
