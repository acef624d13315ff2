"""The end of a run: from committed layers to a published, audited checkpoint with its report.

In: the journal of a complete sweep. Out: the final directory, which appears by one rename after
the audit has passed, and the `RunReport`. Rank 0 alone does this.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.audit import AuditResult, audit
from pipeline.checkpoint.journal import Journal, LayerRecord
from pipeline.checkpoint.publish import finalize, publish
from pipeline.checkpoint.source import Source
from pipeline.checkpoint.writer import FileRecord, write_safetensors
from pipeline.errors import OutputError
from pipeline.job import Job, quantization_configs
from pipeline.preparation import Prepared
from pipeline.report.html import write_html
from pipeline.report.records import RunReport
from pipeline.report.run_json import write_run_json
from pipeline.run_report import build_report
from pipeline.sweep import LOSS, OUTER, SCALARS

REPORT_DIRECTORY = "layersweep"
METRICS = "metrics.jsonl"


def publish_run(
    prepared: Prepared, journal: Journal, *, resolved_config: str, phases: dict[str, float]
) -> RunReport:
    """Names the files, writes the configs, audits, reports, and renames the directory.

    Args:
        prepared: What was decided and promised; the audit holds the directory to it.
        journal: All units committed.
        resolved_config: Saved beside the checkpoint.
        phases: Seconds so far, by phase.

    Raises:
        AuditError: The directory breaks a rule; it keeps its working name.
        OutputError: Writing failed, or a unit is not committed.
    """
    clock = time.monotonic()
    job, work = prepared.job, prepared.work
    units: list[int | str] = [*range(len(job.schedules)), OUTER]
    if job.resolution.needs_forward:
        units.append(LOSS)
    records = {unit: _committed(journal, unit) for unit in units}
    files = [file for record in records.values() for file in record.files]
    scalars = {
        name: value for record in records.values() for name, value in _scalars(record).items()
    }
    if scalars:
        files.append(_write_scalars(work.files / "scalars.safetensors", scalars))
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
    result = _audit(prepared, named)
    phases["audit"] = time.monotonic() - clock
    report = build_report(prepared, records, audit=_describe(result))
    report.phases = phases
    _write_reports(work.files / REPORT_DIRECTORY, report, named)
    finalize(work)
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


def _scalars(record: LayerRecord) -> dict[str, float]:
    for part in record.parts:
        if part.part == SCALARS:
            return dict(part.statistics.get("scalars", {}))
    return {}


def _write_scalars(path: Path, scalars: dict[str, float]) -> FileRecord:
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
    return write_safetensors(path, tensors)


def _describe(result: AuditResult) -> dict[str, object]:
    return {
        "passed": result.ok,
        "checks": len(result.checks),
        "tensors": result.figures.tensors,
        "notes": list(result.notes),
    }


def _write_reports(directory: Path, report: RunReport, files: list[FileRecord]) -> None:
    write_run_json(report, directory / "run.json")
    write_html(report, directory / "report.html")
    checksums = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    (directory / "SHA256SUMS").write_text(checksums, encoding="ascii")
