"""A small run as the sweep would report it: three kinds of layers, two formats, copied tensors."""

import pytest

from pipeline.report.records import ExpertCoverage, KindReport, KVAmax, LayerReport, RunReport


def copied(role: str, parameters: int) -> KindReport:
    return KindReport(
        role=role,
        format="bf16",
        method="",
        tensors=1,
        parameters=parameters,
        stored_bytes=2 * parameters,
    )


def experts(layer: int, amax: dict[str, float]) -> KindReport:
    return KindReport(
        role="routed_expert",
        format="nvfp4",
        method="four_over_six",
        tensors=32,
        parameters=160_000,
        stored_bytes=90_000,
        squared_error=0.81,
        squared_weight=100.0,
        squared_error_of_max=1.0,
        blocks=10_000,
        blocks_m4=4_500 + layer,
        blocks_flushed=20,
        zero_blocks=1,
        input_amax=amax,
        worst_tensor=f"backbone.layers.{layer}.mixer.experts.3.up_proj.weight",
        worst_relative_error=0.1 + layer / 1000,
    )


def mamba(amax: dict[str, float]) -> KindReport:
    return KindReport(
        role="mamba_in",
        format="fp8",
        method="max",
        tensors=1,
        parameters=40_000,
        stored_bytes=40_004,
        squared_error=0.07,
        squared_weight=100.0,
        input_amax=amax,
        worst_tensor="backbone.layers.0.mixer.in_proj.weight",
        worst_relative_error=0.0265,
    )


def make_report(*, forward: bool = True) -> RunReport:
    def amax(**values):
        return values if forward else {}

    seconds = {"read stall": 0.1, "compute": 2.4 if forward else 0.4, "write stall": 0.2}
    tokens = 4096 if forward else 0

    def layer(index, layer_type, *kinds):
        return LayerReport(
            layer=index, layer_type=layer_type, tokens=tokens, seconds=seconds, kinds=list(kinds)
        )

    report = RunReport(
        source="/models/tiny",
        output="/results/tiny-nvfp4",
        recipe="nvfp4_four_over_six",
        layers=[
            layer(0, "mamba", mamba(amax(in_proj=5.0)), copied("mamba_other", 300)),
            layer(1, "moe", experts(1, amax(up_proj=7.5, down_proj=130.0)), copied("gate", 1024)),
            layer(2, "attention", copied("attention_qkv", 9000)),
            layer(3, "moe", experts(3, amax(up_proj=8.5, down_proj=90.0)), copied("gate", 1024)),
        ],
        outside=[copied("embedding", 32768), copied("head", 32768)],
        bf16_bytes=873_768,
        quantized_bytes=373_772,
        predicted_bytes=373_772,
        effective_bits=6.84,
        phases={"prepare": 1.5, "sweep": 65.0, "audit": 0.5},
        layout={"world": 2, "tp": 1, "ep": 2, "etp": 1, "dp": 2},
        versions={"torch": "2.13.0"},
        hardware="2 x CPU",
        audit={"passed": True, "tensors": 1234, "problems": []},
    )
    if forward:
        report.coverage = [
            ExpertCoverage(layer=1, tokens_per_expert=[1000] * 15 + [1384]),
            ExpertCoverage(layer=3, tokens_per_expert=[1024] * 14 + [2048, 0]),
        ]
        report.kv_amax = [KVAmax(layer=2, k_amax=11.0, v_amax=4.0)]
        report.loss, report.unigram_loss = 1.2345, 3.21
        report.peak_bytes = 2_500_000_000
    return report


@pytest.fixture
def report() -> RunReport:
    return make_report()


@pytest.fixture
def weight_only_report() -> RunReport:
    return make_report(forward=False)
