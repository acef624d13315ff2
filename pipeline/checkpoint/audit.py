"""The audit: everything that a loader silently relies on, checked on the finished directory.

In: any directory that claims to be a Model Optimizer checkpoint of a Nemotron-H model, and, where
known, its source, its planned size and its checksums. Out: an `AuditResult`. Headers, scales and
checksums are read, not a terabyte of codes; with `source` everything is read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from pipeline.architecture import Architecture, TensorSpec, expected_tensors
from pipeline.checkpoint import audit_config, audit_scales, audit_source, audit_tensors
from pipeline.checkpoint.audit_config import Declared
from pipeline.checkpoint.audit_files import FileTable, check_checksums, read_files, read_object
from pipeline.checkpoint.durable import reading_threads
from pipeline.checkpoint.source import Source
from pipeline.errors import ArchitectureError, AuditError

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        name: What was checked.
        ok: Whether it holds.
        detail: What was found.
    """

    name: str
    ok: bool
    detail: str


@dataclasses.dataclass
class AuditFigures:
    """What the audit measured.

    Attributes:
        file_bytes: Size of all weight files.
        tensor_bytes: Size of all tensors, without headers.
        tensors: Number of tensors.
        parameters: Elements of the original model.
        effective_bits: Stored weight bits over all parameters.
        flushed_share: Per layer, the share of its NVFP4 blocks that Hopper flushes to zero.
        relative_errors: Per quantized module, with a source only.
    """

    file_bytes: int = 0
    tensor_bytes: int = 0
    tensors: int = 0
    parameters: int = 0
    effective_bits: float = 0.0
    flushed_share: dict[int, float] = dataclasses.field(default_factory=dict)
    relative_errors: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class AuditResult:
    """Outcome of an audit.

    Attributes:
        directory: What was audited.
        checks: Every rule that was looked at, in order.
        problems: One line per fault, at most ten and a count per rule.
        notes: What a user should know and no rule forbids.
        figures: What was measured.
    """

    directory: Path
    checks: list[Check] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    figures: AuditFigures = dataclasses.field(default_factory=AuditFigures)

    @property
    def ok(self) -> bool:
        """Whether every rule holds."""
        return not self.problems

    def record(self, name: str, problems: list[str], detail: str) -> bool:
        """Adds a check; returns whether it holds."""
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f"... and {len(problems) - _SHOWN} more")
        self.problems += [f"{name}: {problem}" for problem in shown]
        plural = "s" * (len(problems) != 1)
        found = f"{len(problems)} problem{plural}: {problems[0]}" if problems else detail
        self.checks.append(Check(name, not problems, found))
        return not problems

    def raise_if_failed(self) -> None:
        """Raises AuditError with every problem, if there is one."""
        if self.problems:
            raise AuditError(
                f"{self.directory}: {len(self.problems)} problem{'s' * (len(self.problems) != 1)}",
                value="\n  - ".join(["", *self.problems]),
                rule="a published checkpoint must load, and be what it says",
                remedy="do not serve this directory; export it again",
            )


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What the audit knows after reading headers and configs."""

    table: FileTable
    architecture: Architecture
    specs: list[TensorSpec]
    declared: Declared
    expected: dict[str, audit_tensors.Expected]


def audit(
    directory: Path,
    *,
    source: Source | None = None,
    expected_bytes: int | None = None,
    expected_effective_bits: float | None = None,
    checksums: Mapping[str, str] | None = None,
    hopper: bool = False,
    workers: int | None = None,
) -> AuditResult:
    """Checks a directory; never raises for what it finds (see `AuditResult.raise_if_failed`).

    Args:
        directory: A finished checkpoint.
        source: Compare with it: copied tensors byte for byte, quantized ones by their error.
        expected_bytes: Planned size of all tensors (without headers).
        expected_effective_bits: Planned effective bits.
        checksums: SHA-256 per weight file.
        hopper: Whether input widths must also suit Hopper (a multiple of 64).
        workers: Threads for scales, checksums and comparisons; None for one per core, at most 8.
    """
    result, workers = AuditResult(Path(directory)), workers or reading_threads()
    try:
        checkpoint = _read(result)
        if checkpoint is not None:
            _check_description(result, checkpoint, hopper=hopper)
    except (TypeError, AttributeError, KeyError, ValueError, IndexError, RecursionError) as problem:
        # Another tool's JSON may hold anything anywhere; whatever cannot be read is a finding.
        result.record("configs", [f"malformed: {type(problem).__name__}: {problem}"], "")
        return result
    if checkpoint is None:
        return result
    _check_size(result, checkpoint, expected_bytes, expected_effective_bits)
    mapped = audit_scales.MappedTensors(checkpoint.table.tensors)
    _check_scales(result, checkpoint, mapped, workers)
    if checksums is not None:
        files = checkpoint.table.files
        problems = check_checksums(result.directory, files, checksums, workers)
        result.record("checksums", problems, f"SHA-256 of {len(files)} files agrees")
    if source is not None:
        _compare(result, checkpoint, mapped, source, workers)
    return result


def _read(result: AuditResult) -> _Checkpoint | None:
    """Files, configs and key set; None where there is nothing to go on with."""
    if not result.directory.is_dir():
        result.record("files", [f"{result.directory} is not a directory"], "")
        return None
    table, file_problems, index_problems = read_files(result.directory)
    figures = result.figures
    figures.file_bytes, figures.tensor_bytes = table.file_bytes, table.tensor_bytes
    figures.tensors = len(table.tensors)
    result.record("files", file_problems, f"{len(table.files)} files, {table.file_bytes:,} bytes")
    result.record("index", index_problems, f"{len(table.tensors)} tensors")
    config, problems = read_object(result.directory / "config.json")
    quantization = config.get("quantization_config")
    if not problems and not isinstance(quantization, dict):
        problems = ["config.json has no quantization_config"]
    architecture = None
    if not problems:
        try:
            architecture = Architecture.from_hf_config(config)
        except ArchitectureError as problem:
            problems = [str(problem)]
    if architecture is None or not isinstance(quantization, dict):
        result.record("config.json", problems, "")
        return None
    specs = expected_tensors(architecture)
    broken = audit_config.check_names(quantization, table.tensors)
    result.record("names", broken, "no broken name")
    declared, problems = audit_config.read_declared(quantization, specs)
    problems += audit_config.check_groups(quantization, declared)
    count = len(declared.algorithms)
    result.record("config.json", problems, f"{count} quantized projections")
    hf_quant_config, problems = read_object(result.directory / "hf_quant_config.json")
    if not problems:
        problems = audit_config.check_hf_quant_config(hf_quant_config, quantization)
    result.record("hf_quant_config.json", problems, "says the same as config.json")
    if not table.tensors:
        return None
    expected = audit_tensors.expected_of(architecture, specs, declared, table.tensors)
    return _Checkpoint(table, architecture, specs, declared, expected)


def _check_description(result: AuditResult, checkpoint: _Checkpoint, *, hopper: bool) -> None:
    declared, specs = checkpoint.declared, checkpoint.specs
    tensors = checkpoint.table.tensors
    keys, stored = audit_tensors.check_keys(checkpoint.expected, tensors)
    result.record("key set", keys, f"exactly the {len(checkpoint.expected)} expected tensors")
    result.record("shapes and dtypes", stored, "as expected")
    result.record(
        "stored formats",
        audit_config.check_stored_formats(declared, specs, tensors),
        "as declared",
    )
    result.record("mtp", audit_tensors.check_mtp(checkpoint.architecture, tensors), "as promised")
    result.record(
        "ignore rules",
        audit_config.check_ignore(declared, tensors),
        f"{len(declared.ignore)} entries exclude what they should and nothing else",
    )
    result.record("experts", audit_config.check_experts(declared, specs), "one format per layer")
    result.record(
        "fused formats",
        audit_config.check_fused_formats(declared, specs),
        "q, k and v agree",
    )
    problems, notes = audit_config.check_alignment(declared, specs, hopper=hopper)
    result.record(
        "alignment", problems, "input widths fit the blocks" + " and Hopper's kernels" * hopper
    )
    result.notes += notes


def _check_size(
    result: AuditResult,
    checkpoint: _Checkpoint,
    expected_bytes: int | None,
    expected_effective_bits: float | None,
) -> None:
    figures, tensors = result.figures, checkpoint.table.tensors
    figures.parameters = audit_tensors.count_parameters(checkpoint.specs, tensors)
    figures.effective_bits = audit_tensors.effective_bits(figures.parameters, tensors)
    problems = []
    if expected_bytes is not None and expected_bytes != figures.tensor_bytes:
        problems.append(f"{figures.tensor_bytes:,} bytes instead of the planned {expected_bytes:,}")
    planned = expected_effective_bits
    if planned is not None and abs(planned - figures.effective_bits) > 1e-6:
        problems.append(
            f"{figures.effective_bits:.6f} effective bits instead of the planned {planned:.6f}"
        )
    result.record(
        "size",
        problems,
        f"{figures.tensor_bytes:,} bytes, {figures.effective_bits:.4f} effective bits",
    )


def _check_scales(
    result: AuditResult, checkpoint: _Checkpoint, mapped: audit_scales.MappedTensors, workers: int
) -> None:
    declared = checkpoint.declared
    result.record("scalar scales", audit_scales.check_scalars(mapped), "finite and positive")
    counts = audit_scales.scan_blocks(mapped, declared, workers)
    problems = [count.problem for count in counts if count.problem]
    blocks = sum(count.blocks for count in counts)
    result.record("block scales", problems, f"{blocks:,} finite and positive")
    result.record(
        "fused scales", audit_scales.check_fused_scalars(mapped, declared), "q, k and v agree"
    )
    result.figures.flushed_share = audit_scales.flushed_shares(counts)
    flushed = sum(count.flushed for count in counts)
    if flushed:
        share = flushed / blocks
        result.notes.append(f"Hopper would flush {flushed:,} of {blocks:,} blocks ({share:.4%})")


def _compare(
    result: AuditResult,
    checkpoint: _Checkpoint,
    mapped: audit_scales.MappedTensors,
    source: Source,
    workers: int,
) -> None:
    problems = audit_source.check_passthrough(mapped, checkpoint.expected, source, workers)
    result.record("copied tensors", problems, "byte for byte the source's")
    problems = audit_source.check_small_files(result.directory, source)
    result.record("small files", problems, f"{len(source.small_files)} files agree")
    errors, problems = audit_source.measure_errors(mapped, checkpoint.declared, source, workers)
    result.figures.relative_errors = errors
    worst = max(errors, key=lambda module: errors[module], default="none")
    detail = f"at most {errors[worst]:.4f} ({worst})" if errors else "nothing quantized"
    result.record("relative errors", problems, detail)
