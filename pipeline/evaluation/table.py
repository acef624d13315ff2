"""What `launch.evaluate` says at its end: a table, or the same as JSON.

In: an `EvaluationResult`. Out: lines on a terminal, at most 80 columns where names allow it, and
`evaluation.json`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.checkpoint.durable import write_json
from pipeline.evaluation.records import EvaluationReport
from pipeline.report.run_json import finite
from pipeline.report.summary import format_seconds
from pipeline.report.terminal import print_evaluation

FILE = "evaluation.json"
SCHEMA = 1


@dataclasses.dataclass(kw_only=True)
class EvaluationResult:
    """An evaluation of one directory.

    Attributes:
        directory: The quantized checkpoint.
        source: The BF16 one.
        report: What was measured; `rejected` also names weights that are not the source's.
        weight_errors: Relative error by quantized module.
        warnings: What stands out and fails nothing.
    """

    directory: str
    source: str
    report: EvaluationReport
    weight_errors: dict[str, float]
    warnings: list[str]


def to_values(result: EvaluationResult) -> dict[str, Any]:
    """The result as plain JSON values."""
    values: dict[str, Any] = finite(
        {"schema": SCHEMA, "ok": not result.report.rejected, **dataclasses.asdict(result)}
    )
    return values


def write_result(result: EvaluationResult, directory: Path) -> Path:
    """Writes evaluation.json in one step; returns its path.

    Raises:
        OutputError: It cannot be written.
    """
    write_json(directory / FILE, to_values(result))
    return directory / FILE


def print_result(result: EvaluationResult, console: Console | None = None) -> None:
    """Prints figures by serving mode, the worst layers and weights, and what is wrong."""
    console = console or Console(highlight=False)
    report = result.report
    print_evaluation(dataclasses.replace(report, rejected=[]), console)
    console.print(Text(f"{'weights':<10}{_describe_weights(result.weight_errors)}"))
    console.print(Text(f"{'time':<10}{format_seconds(report.seconds)}"))
    for warning in result.warnings:
        console.print(Text(f"{'warning':<10}{warning}", style="yellow"))
    for reason in report.rejected:
        console.print(Text(f"{'rejected':<10}{reason}", style="bold red"))
    verdict = "evaluation FAILED" if report.rejected else "evaluation passed"
    style = "bold red" if report.rejected else "bold green"
    console.print(Text(f"{verdict}: {result.directory} against {result.source}", style=style))


def _describe_weights(errors: dict[str, float]) -> str:
    if not errors:
        return "none is quantized"
    worst = max(errors, key=lambda module: errors[module])
    return f"at most {errors[worst]:.4f} away from the source's ({worst})"
