"""The end of a run: from committed layers to a published, audited checkpoint with its report.

In: the journal of a complete sweep. Out: the final directory, which appears by one rename after
the audit has passed, and the `RunReport`. Of a rehearsal, the report alone. Rank 0 does this.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.attempts import Attempts
from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.durable import write_text
from pipeline.checkpoint.journal import Journal, LayerRecord
from pipeline.checkpoint.publish import final_records, finalize, publish
from pipeline.checkpoint.rehearsal import check_counts, finish_rehearsal, mark_rehearsal
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.synthetic import SyntheticSource
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.config import DISCARD, REPORT_DIRECTORY, EvaluationConfig
from pipeline.errors import OutputError
from pipeline.evaluation.gates import missed_gates
from pipeline.job import Job, quantization_configs
from pipeline.preparation import Prepared
from pipeline.report.html import write_html
from pipeline.report.records import RunReport
from pipeline.report.run_json import write_run_json
from pipeline.run_report import build_report
from pipeline.runtime.guard import Guard
from pipeline.runtime.life import Phase
from pipeline.sweep import EVALUATION, LOSS, OUTER

__all__ = ["METRICS", "REPORT_DIRECTORY", "publish_rehearsal", "publish_run"]

METRICS = "metrics.jsonl"


def publish_run(
    prepared: Prepared,
    journal: Journal,
    *,
    resolved_config: str,
    phases: dict[str, float],
    asked: EvaluationConfig,
    attempts: Attempts,
    guard: Guard,
) -> RunReport:
    """Names the files, writes the configs, audits, reports, and renames the directory.

    Args:
        prepared: What was decided and promised; the audit holds the directory to it.
        journal: All units committed.
        resolved_config: Saved beside the checkpoint.
        phases: Seconds so far, by phase.
        asked: Gates, if any; missing one changes the directory's name and nothing else.
        attempts: Told that this one has finished.
        guard: Told where this rank is.

    Raises:
        AuditError: The directory breaks a rule; it keeps its working name.
        OutputError: Writing failed, or a unit is not committed.
    """
    clock = time.monotonic()
    guard.life.enter(Phase.publish)
    job, work = prepared.job, prepared.work
    records = _read_journal(prepared, journal)
    files = _collect_files(prepared, records)
    named = publish(
        work,
        files,
        **_configs(job, prepared.source),
        small_files=prepared.source.small_files,
        extra={
            f"{REPORT_DIRECTORY}/config.yaml": resolved_config.encode(),
            f"{REPORT_DIRECTORY}/{METRICS}": (work.root / METRICS).read_bytes(),
        },
    )
    phases["publish"], clock = time.monotonic() - clock, time.monotonic()
    with guard.life.during(Phase.audit):
        result = _audit(prepared, named)
    phases["audit"] = time.monotonic() - clock
    audited = {"passed": result.ok, **_describe(result)}
    report = _build_report(prepared, records, audited, phases, asked)
    rejected = report.is_rejected
    if rejected:
        report.output = str(work.rejected)
    _finish(report, attempts, guard)
    _write_reports(work.files / REPORT_DIRECTORY, report, named)
    finalize(work, rejected=rejected)
    return report


def publish_rehearsal(
    prepared: Prepared,
    journal: Journal,
    *,
    resolved_config: str,
    phases: dict[str, float],
    asked: EvaluationConfig,
    attempts: Attempts,
    guard: Guard,
) -> RunReport:
    """Reports on a run that wrote no checkpoint, after its counts were compared with the plan.

    Args:
        prepared: What was decided and promised; `prepared.work` is a rehearsal's.
        journal: All units committed.
        resolved_config: Saved beside the report.
        phases: Seconds so far, by phase.
        asked: Gates, if any; missing one changes the directory's name and nothing else.
        attempts: Told that this one has finished.
        guard: Told where this rank is.

    Raises:
        AuditError: What would have been written is not what was planned.
        OutputError: Writing failed, a unit is not committed, or a tensor would be in two files.
    """
    clock = time.monotonic()
    guard.life.enter(Phase.publish)
    work, plan = prepared.work, prepared.plan
    records = _read_journal(prepared, journal)
    named = final_records(_collect_files(prepared, records))
    result = check_counts(
        named,
        _configs(prepared.job, prepared.source)["config"],
        expected_bytes=plan.quantized_bytes,
        expected_effective_bits=plan.effective_bits,
    )
    result.raise_if_failed()
    phases["count"] = time.monotonic() - clock
    counted = {"rehearsal": "counted, and not read back: nothing was written", **_describe(result)}
    report = _build_report(prepared, records, counted, phases, asked)
    report.output = DISCARD
    report.warnings.insert(0, "a rehearsal: no checkpoint was written")
    _finish(report, attempts, guard)
    mark_rehearsal(work)  # first: a report that was cut short may be replaced
    write_text(work.final / "config.yaml", resolved_config)
    work.metrics.replace(work.final / METRICS)
    _write_reports(work.final, report, named)
    finish_rehearsal(work)
    return report


def _finish(report: RunReport, attempts: Attempts, guard: Guard) -> None:
    """The last that is written into the work directory, which is about to disappear."""
    guard.quiet()
    attempts.end("rejected" if report.is_rejected else "finished", "")
    report.attempts = attempts.read()


def _read_journal(prepared: Prepared, journal: Journal) -> dict[int | str, LayerRecord]:
    """The records of all units, in the order of the published files."""
    units: list[int | str] = [*range(len(prepared.job.schedules)), OUTER]
    if prepared.job.resolution.needs_forward:
        units.append(LOSS)
    if journal.committed(EVALUATION) is not None:
        units.append(EVALUATION)
    return {unit: _committed(journal, unit) for unit in units}


def _collect_files(
    prepared: Prepared, records: Mapping[int | str, LayerRecord]
) -> list[FileRecord]:
    """The weight files in their published order; the file of the activations' scalars is new."""
    files = [file for record in records.values() for file in record.files]
    scalars = {
        name: value
        for record in records.values()
        for name, value in record.summary.get("scalars", {}).items()
    }
    if scalars:
        files.append(_write_scalars(prepared.work.files / "scalars.safetensors", scalars))
    return files


def _build_report(
    prepared: Prepared,
    records: Mapping[int | str, LayerRecord],
    audit: dict[str, object],
    phases: dict[str, float],
    asked: EvaluationConfig,
) -> RunReport:
    """The report; of made-up weights, without loss and evaluation, which would say nothing."""
    is_synthetic = isinstance(prepared.source, SyntheticSource)
    left_out = {LOSS} if is_synthetic else set()
    told = {unit: record for unit, record in records.items() if unit not in left_out}
    report = build_report(prepared, told, audit=audit)
    report.phases = phases
    if is_synthetic:
        measured = ""
        if report.evaluation is not None:
            measured = f"; so would the evaluation, which took {report.evaluation.seconds:.1f} s"
            report.evaluation = None
        report.warnings.insert(
            0,
            "the weights are random: loss (left out), routing, input amax and quantization error "
            f"say nothing about a trained model{measured}",
        )
    if report.evaluation is not None:
        report.evaluation.rejected = missed_gates(report.evaluation, asked)
    return report


def _audit(prepared: Prepared, files: list[FileRecord]) -> AuditResult:
    """The audit that decides about publication; reads every file once, for its checksum."""
    plan = prepared.plan
    result = audit(
        prepared.work.files,
        expected_bytes=plan.quantized_bytes,
        expected_effective_bits=plan.effective_bits,
        checksums={file.name: file.sha256 for file in files},
    )
    result.raise_if_failed()
    return result


def _configs(job: Job, source: Source) -> dict[str, Any]:
    configs = quantization_configs(job)
    return {
        "config": {**source.config, "quantization_config": configs.quantization_config},
        "hf_quant_config": configs.hf_quant_config,
    }


def _committed(journal: Journal, unit: int | str) -> LayerRecord:
    record = journal.committed(unit)
    if record is None:
        raise OutputError(
            f"journal {journal.directory}",
            value=f"{unit} is not committed",
            rule="every layer must be committed before publication",
            remedy="start the same command again; only what is missing is done again",
        )
    return record


def _write_scalars(path: Path, scalars: dict[str, float]) -> FileRecord:
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
    return write_safetensors(path, tensors)


def _describe(result: AuditResult) -> dict[str, object]:
    return {
        "checks": len(result.checks),
        "tensors": result.figures.tensors,
        "notes": list(result.notes),
    }


def _write_reports(directory: Path, report: RunReport, files: list[FileRecord]) -> None:
    write_run_json(report, directory / "run.json")
    write_html(report, directory / "report.html")
    checksums = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    write_text(directory / "SHA256SUMS", checksums)
