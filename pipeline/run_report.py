"""The report of a run, put together from the journal.

In: the job, the plan and the committed layers with their statistics. Out: a `RunReport`. Sums of
shards are added up here; nothing is measured.
"""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pipeline import __version__
from pipeline.architecture import TensorSpec, layer_tensors
from pipeline.checkpoint.journal import LayerRecord
from pipeline.evaluation.records import restore
from pipeline.job import Job
from pipeline.packing import STATISTICS
from pipeline.plan import Plan, describe_format
from pipeline.plan_ranks import packed_bytes
from pipeline.preparation import Prepared
from pipeline.report.records import (
    AgainstMax,
    ExpertCoverage,
    KindReport,
    KVAmax,
    LayerReport,
    RunReport,
)
from pipeline.schedule import tap_of
from pipeline.sweep import EVALUATION, LOSS

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "transformers", "safetensors")


def build_report(
    prepared: Prepared, records: Mapping[int | str, LayerRecord], *, audit: dict[str, object]
) -> RunReport:
    """Everything a finished run tells about itself.

    Args:
        prepared: What was decided and promised.
        records: Committed units, as they were before the files got their final names.
        audit: What the audit found.
    """
    job, plan = prepared.job, prepared.plan
    compute = f"{str(prepared.dtype).removeprefix('torch.')} on {prepared.device.type}"
    report = RunReport(
        source=prepared.source.location,
        output=str(prepared.work.final),
        recipe=job.recipe.name,
        layers=[],
        bf16_bytes=plan.bf16_bytes,
        quantized_bytes=plan.quantized_bytes,
        predicted_bytes=plan.quantized_bytes,
        effective_bits=plan.effective_bits,
        layout={
            name: getattr(job.dims, name) for name in ("world", "tp", "dp", "ep", "etp", "edp")
        },
        versions=_versions(),
        hardware=_hardware(job.dims.world, compute),
        audit=audit,
        unmatched_patterns=job.resolution.unmatched_patterns,
        outside=_outside(job),
    )
    if prepared.device.type == "cuda":
        report.peak_bytes = torch.cuda.max_memory_allocated(prepared.device)
        report.planned_peak_bytes = plan.memory.peak if plan.memory is not None else None
    report.micro_batch = plan.memory.micro_batch if plan.memory and plan.needs_forward else None
    for schedule in job.schedules:
        record = records[schedule.layer]
        summary = record.summary
        report.layers.append(_layer_report(job, schedule.layer, record, summary))
        if counts := summary.get("tokens_per_expert"):
            report.coverage.append(
                ExpertCoverage(layer=schedule.layer, tokens_per_expert=list(counts))
            )
        amax = summary.get("amax", {})
        if "k_cache" in amax:
            report.kv_amax.append(
                KVAmax(layer=schedule.layer, k_amax=amax["k_cache"], v_amax=amax["v_cache"])
            )
    if loss := records.get(LOSS):
        report.loss = loss.summary["loss"]
        report.unigram_loss = loss.summary["unigram_loss"]
    if evaluation := records.get(EVALUATION):
        report.evaluation = restore(evaluation.summary["report"])
    report.against_max = _against_max(job, records)
    report.warnings = _warnings(report, plan)
    return report


def _layer_report(
    job: Job, layer: int, record: LayerRecord, summary: Mapping[str, Any]
) -> LayerReport:
    sums = _add_shards(record)
    kinds: dict[tuple[str, str, str], KindReport] = {}
    amax = summary.get("amax", {})
    for spec in layer_tensors(job.architecture, layer):
        kind = _kind(job, spec, kinds)
        if spec.name not in sums:
            continue
        values = dict(zip(STATISTICS, sums[spec.name], strict=True))
        _add_statistics(kind, spec, values)
        tap = tap_of(spec.module)
        if tap in amax:
            kind.input_amax[tap.rpartition(".")[2]] = amax[tap]
    return LayerReport(
        layer=layer,
        layer_type=job.architecture.layers[layer].value,
        tokens=summary.get("tokens", 0),
        seconds=dict(summary.get("seconds", {})),
        kinds=list(kinds.values()),
    )


def _against_max(job: Job, records: Mapping[int | str, LayerRecord]) -> AgainstMax | None:
    ratios: dict[str, float] = {}
    for schedule in job.schedules:
        for name, sums in _add_shards(records[schedule.layer]).items():
            values = dict(zip(STATISTICS, sums, strict=True))
            if values["blocks"] and values["squared_error_of_max"] > 0:
                ratios[name] = values["squared_error"] / values["squared_error_of_max"]
    if not ratios:
        return None
    worst = max(ratios, key=lambda name: ratios[name])
    return AgainstMax(
        median=statistics.median(ratios.values()), worst=ratios[worst], worst_tensor=worst
    )


def _add_shards(record: LayerRecord) -> dict[str, list[float]]:
    """Statistics of whole tensors, from those of the ranks' shards."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(STATISTICS))
    for part in record.parts:
        for name, values in part.statistics.get("packed", {}).items():
            sums[name] = [a + b for a, b in zip(sums[name], values, strict=True)]
    return dict(sums)


def _kind(job: Job, spec: TensorSpec, kinds: dict[tuple[str, str, str], KindReport]) -> KindReport:
    """The kind that a tensor belongs to, with the tensor counted."""
    module_format = job.resolution.formats.get(spec.module) if spec.is_linear_weight else None
    stored = job.stored[spec.name]
    label, method, _ = describe_format(module_format, stored.dtype)
    key = (spec.role.value, label, method)
    kind = kinds.setdefault(
        key,
        KindReport(
            role=key[0], format=label, method=method, tensors=0, parameters=0, stored_bytes=0
        ),
    )
    kind.tensors += 1
    kind.parameters += spec.parameters
    quantized = module_format is not None and module_format.is_quantized
    kind.stored_bytes += (
        packed_bytes(spec, module_format) if quantized and module_format else stored.nbytes
    )
    return kind


def _add_statistics(kind: KindReport, spec: TensorSpec, values: Mapping[str, float]) -> None:
    kind.squared_error += values["squared_error"]
    kind.squared_weight += values["squared_weight"]
    if kind.format == "nvfp4":
        kind.squared_error_of_max = (kind.squared_error_of_max or 0.0) + values[
            "squared_error_of_max"
        ]
    kind.blocks += round(values["blocks"])
    kind.zero_blocks += round(values["zero_blocks"])
    kind.blocks_m4 += round(values["blocks_m4"])
    kind.blocks_flushed += round(values["blocks_flushed"])
    if values["squared_weight"] > 0:
        relative = float((values["squared_error"] / values["squared_weight"]) ** 0.5)
        if relative > kind.worst_relative_error:
            kind.worst_relative_error, kind.worst_tensor = relative, spec.name


def _outside(job: Job) -> list[KindReport]:
    """Tensors outside the layers, all copied."""
    roles = {spec.name: spec.role.value for spec in job.specs}
    kinds: dict[tuple[str, str], KindReport] = {}
    for name, _ in job.outer:
        stored = job.stored[name]
        key = (roles.get(name, "mtp"), stored.dtype.lower())
        kind = kinds.setdefault(
            key,
            KindReport(
                role=key[0], format=key[1], method="", tensors=0, parameters=0, stored_bytes=0
            ),
        )
        kind.tensors += 1
        kind.parameters += stored.parameters
        kind.stored_bytes += stored.nbytes
    return list(kinds.values())


def _warnings(report: RunReport, plan: Plan) -> list[str]:
    warnings = list(plan.notes)
    for coverage in report.coverage:
        unseen = [e for e, count in enumerate(coverage.tokens_per_expert) if count == 0]
        if unseen:
            names = ", ".join(map(str, unseen[:8])) + (" ..." if len(unseen) > 8 else "")
            warnings.append(
                f"layer {coverage.layer}: {len(unseen)} of {len(coverage.tokens_per_expert)} "
                f"experts saw no calibration token: {names}"
            )
    for layer in report.layers:
        for kind in layer.kinds:
            counted = kind.blocks - kind.zero_blocks
            if counted and kind.blocks_flushed / counted > 0.001:
                warnings.append(
                    f"layer {layer.layer}, {kind.role}: Hopper flushes "
                    f"{kind.blocks_flushed / counted:.2%} of the blocks to zero"
                )
    if (report.loss or 0.0) > (report.unigram_loss or 0.0):
        warnings.append(
            f"the BF16 model's loss ({report.loss:.3f}) is worse than that of token frequencies "
            f"({report.unigram_loss:.3f}); published because of allow_bad_loss"
        )
    return warnings


def _versions() -> dict[str, str]:
    found = {"layersweep": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _hardware(world: int, compute: str) -> str:
    if compute.endswith("cuda"):
        return f"{world} x {torch.cuda.get_device_name()}, {compute}"
    return f"{world} CPU rank{'s' if world > 1 else ''} ({platform.machine()}), {compute}"
