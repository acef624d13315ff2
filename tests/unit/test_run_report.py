"""The report from the journal: shards add up to tensors, kinds to the plan, warnings by name."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.architecture import Architecture
from pipeline.checkpoint.journal import SCALARS, LayerRecord, PartRecord
from pipeline.checkpoint.publish import WorkDirectory
from pipeline.job import Job, build_job, estimate_stored
from pipeline.packing import STATISTICS
from pipeline.plan import make_plan
from pipeline.preparation import Prepared
from pipeline.recipe import load_recipe
from pipeline.report.records import RunReport
from pipeline.run_report import build_report
from pipeline.sharding import ParallelDims
from pipeline.sweep import LOSS
from tests.unit.checkpoint.tiny import tiny_config

PRESETS = Path(__file__).parents[2] / "conf" / "recipe"
CONFIG = tiny_config(hybrid_override_pattern="ME*", num_hidden_layers=3)
UP = "backbone.layers.1.mixer.experts.0.up_proj.weight"
Records = dict[int | str, LayerRecord]


@dataclasses.dataclass
class FakeSource:
    location: str = "/models/tiny"


def job_of(recipe: str = "nvfp4_four_over_six") -> Job:
    architecture = Architecture.from_hf_config(CONFIG)
    dims = ParallelDims(world=2, tp=2, ep=2)
    stored = estimate_stored(architecture)
    return build_job(architecture, dims, load_recipe(recipe, PRESETS), stored)


def row(**values: float) -> list[float]:
    return [values.get(name, 0.0) for name in STATISTICS]


def records_of(job: Job, summary: dict[str, Any] | None = None) -> Records:
    """Two ranks that share every quantized tensor; rank 0's summary."""
    records: Records = {}
    for schedule in job.schedules:
        names = [item.spec.name for item in schedule.dense]
        names += [
            spec.name
            for spec in job.specs
            if spec.layer == schedule.layer and spec.is_routed_expert
        ]
        halves = [
            row(squared_error=1.0, squared_weight=200.0, squared_error_of_max=1.5, blocks=600),
            row(squared_error=3.0, squared_weight=200.0, squared_error_of_max=3.5, blocks=400),
        ]
        parts = [
            PartRecord(f"rank{rank:05d}", (), {"packed": dict.fromkeys(names, half)})
            for rank, half in enumerate(halves)
        ]
        told = {
            "amax": {name: 2.0 for name in schedule.observed},
            "tokens": 128,
            "seconds": {"read stall": 0.5},
        }
        told |= (summary or {}) if schedule.layer == 1 else {}
        parts.append(PartRecord(SCALARS, (), told))
        records[schedule.layer] = LayerRecord(schedule.layer, tuple(parts))
    return records


def loss_record(loss: float, unigrams: float) -> LayerRecord:
    statistics = {"loss": loss, "unigram_loss": unigrams}
    return LayerRecord(LOSS, (PartRecord(SCALARS, (), statistics),))


def report_of(job: Job, records: Records) -> RunReport:
    prepared = Prepared(
        source=FakeSource(),  # type: ignore[arg-type]
        job=job,
        plan=make_plan(job, num_sequences=2, seq_len=64, compute_bytes=4),
        work=WorkDirectory.beside(Path("/results/out")),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return build_report(prepared, records, audit={"passed": True})


def test_kinds_add_up_to_the_plan() -> None:
    job = job_of()
    report = report_of(job, records_of(job))
    kinds = [*report.outside, *(kind for layer in report.layers for kind in layer.kinds)]
    scalars = 4 * sum(
        bool(m.is_quantized and m.input_format) for m in job.resolution.formats.values()
    )
    scalars += 4 * 2 * len(job.resolution.kv)
    assert sum(kind.stored_bytes for kind in kinds) + scalars == report.quantized_bytes
    assert sum(kind.tensors for kind in kinds) == len(job.stored)
    assert sum(kind.parameters for kind in kinds) == sum(t.parameters for t in job.stored.values())
    assert {kind.role for kind in report.outside} == {"embedding", "norm", "head", "mtp"}
    assert report.predicted_bytes == report.quantized_bytes
    assert [layer.layer_type for layer in report.layers] == ["mamba", "moe", "attention"]


def test_shards_are_summed_before_anything_is_divided() -> None:
    job = job_of()
    report = report_of(job, records_of(job))
    (experts,) = [k for k in report.layers[1].kinds if k.role == "routed_expert"]
    assert (experts.format, experts.method, experts.tensors) == ("nvfp4", "four_over_six", 4)
    assert (experts.squared_error, experts.squared_weight) == (4 * 4.0, 4 * 400.0)
    assert experts.squared_error_of_max == 4 * 5.0
    assert experts.blocks == 4000
    assert experts.worst_relative_error == pytest.approx(0.1)
    assert experts.input_amax == {"up_proj": 2.0, "down_proj": 2.0}
    (shared,) = [k for k in report.layers[1].kinds if k.role == "shared_expert"]
    assert (shared.format, shared.squared_error_of_max) == ("fp8", None)
    (gate,) = [k for k in report.layers[1].kinds if k.role == "gate"]
    assert (gate.format, gate.squared_weight, gate.worst_tensor) == ("f32", 0.0, "")


def test_the_worst_tensor_is_named() -> None:
    job = job_of()
    records = records_of(job)
    worse = row(squared_error=8.0, squared_weight=200.0)
    records[1].parts[0].statistics["packed"][UP] = worse
    (experts,) = [k for k in report_of(job, records).layers[1].kinds if k.role == "routed_expert"]
    assert experts.worst_tensor == UP
    assert experts.worst_relative_error == pytest.approx((11 / 400) ** 0.5)


def test_experts_without_tokens_are_warned_of() -> None:
    job = job_of()
    report = report_of(job, records_of(job, {"tokens_per_expert": [256, 0]}))
    (coverage,) = report.coverage
    assert (coverage.layer, coverage.tokens_per_expert) == (1, [256, 0])
    assert "layer 1: 1 of 2 experts saw no calibration token: 1" in report.warnings


def test_blocks_that_hopper_flushes_are_warned_of() -> None:
    job = job_of()
    records = records_of(job)
    assert not any("Hopper" in line for line in report_of(job, records).warnings)
    flushed = row(blocks=1100, zero_blocks=100, blocks_flushed=100, squared_weight=1.0)
    records[1].parts[0].statistics["packed"][UP] = flushed
    warnings = report_of(job, records).warnings
    # 100 of 600 * 3 + 400 * 4 + 1100 - 100 zero blocks.
    assert f"layer 1, routed_expert: Hopper flushes {100 / 4400:.2%} of the blocks to zero" in (
        warnings
    )


def test_key_and_value_amax() -> None:
    job = job_of()
    report = report_of(job, records_of(job))
    (kv,) = report.kv_amax
    assert (kv.layer, kv.k_amax, kv.v_amax) == (2, 2.0, 2.0)


@pytest.mark.parametrize(("loss", "warned"), [(1.5, False), (4.5, True)])
def test_a_bad_loss_that_was_allowed_is_warned_of(loss: float, warned: bool) -> None:
    job = job_of()
    report = report_of(job, records_of(job) | {LOSS: loss_record(loss, 4.0)})
    assert (report.loss, report.unigram_loss) == (loss, 4.0)
    assert any("because of allow_bad_loss" in line for line in report.warnings) == warned


def test_what_ran_where() -> None:
    job = job_of()
    report = report_of(job, records_of(job))
    assert report.source == "/models/tiny"
    assert report.output == "/results/out"
    assert report.layout == {"world": 2, "tp": 2, "dp": 1, "ep": 2, "etp": 1, "edp": 1}
    assert report.hardware.startswith("2 CPU ranks (")
    assert report.hardware.endswith("float32 on cpu")
    assert report.versions["torch"] == version("torch")
    assert (report.loss, report.unigram_loss) == (None, None)
    assert report.audit == {"passed": True}
