"""The table that a run ends with, on the terminal or in a log file.

In: a `RunReport`, where its files are, a rich console. Out: at most 80 columns (paths are never
broken), no colour codes where the output is not a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.records import RunReport
from pipeline.report.summary import (
    FORMAT_LABELS,
    METHOD_LABELS,
    KindSummary,
    all_kinds,
    describe_coverage,
    describe_layout,
    describe_loss,
    describe_size,
    format_bytes,
    format_change,
    format_percent,
    format_seconds,
    has_passed,
    layer_seconds,
    summarize,
    summarize_kinds,
    verdict,
)

LABEL_WIDTH = 10
MOST_WARNINGS = 20


def print_report(
    report: RunReport, console: Console | None = None, files: Mapping[str, Path] | None = None
) -> None:
    """Print the final report.

    Args:
        report: The run.
        console: Where to; standard output when None.
        files: Further paths to show, by what they are (report, run, metrics).
    """
    console = console or Console(highlight=False)
    colour = {True: "bold green", False: "bold red", None: "bold yellow"}[has_passed(report)]
    console.print()
    console.print(Text(verdict(report), style=colour))
    console.print(_kind_table(report))
    console.print(
        Text(
            "error: root of squared error over squared weight; vs max: in squared error;\n"
            "M=4: blocks whose maximum went on 4; flushed: % of blocks that Hopper zeroes.",
            style="dim",
        )
    )
    console.print()
    for label, text in _facts(report):
        _print_fact(console, label, text)
    for label, path in {"output": report.output, **(files or {})}.items():
        line = Text(f"{label:<{LABEL_WIDTH}}", style="bold")
        console.print(line.append(str(path), style="not bold"), soft_wrap=True)
    for warning in report.warnings[:MOST_WARNINGS]:
        _print_fact(console, "warning", warning, style="yellow")
    if len(report.warnings) > MOST_WARNINGS:
        rest = len(report.warnings) - MOST_WARNINGS
        _print_fact(console, "warning", f"and {rest} more, in run.json", style="yellow")


def _kind_table(report: RunReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=False, padding=0)
    for header in ("kind", "format", "method"):
        table.add_column(header, overflow="fold")
    for header in ("tensors", "size", "error %", "vs max", "M=4 %", "flushed"):
        table.add_column(header, justify="right", no_wrap=True)
    lines = summarize_kinds(report, merge_copied=True)
    for number, line in enumerate(lines, start=1):
        table.add_row(*_cells(line), end_section=number == len(lines))
    table.add_row(*_cells(summarize(all_kinds(report), "total")), style="bold")
    return table


def _cells(line: KindSummary) -> list[Text]:
    """Return a summary's cells; as `Text`, so that brackets in names are no markup."""
    return [
        Text(cell)
        for cell in (
            line.label,
            FORMAT_LABELS.get(line.format, line.format),
            METHOD_LABELS.get(line.method, line.method),
            f"{line.tensors:,}",
            format_bytes(line.stored_bytes),
            format_percent(line.relative_error),
            format_change(line.change_from_max),
            format_percent(line.m4_share, 1),
            format_percent(line.flushed_share),
        )
    ]


def _facts(report: RunReport) -> list[tuple[str, str]]:
    """Return the lines below the table that have something to say."""
    total = summarize(all_kinds(report), "total")
    worst = (
        f"{format_percent(total.worst_relative_error)} % {total.worst_tensor}"
        if total.worst_tensor
        else ""
    )
    per_layer = ", ".join(
        f"{name} {format_seconds(s)}" for name, s in layer_seconds(report).items()
    )
    facts = [
        ("size", describe_size(report)),
        ("loss", describe_loss(report)),
        ("experts", describe_coverage(report)),
        ("worst", worst),
        ("time", _phase_lines(report)),
        ("in layers", per_layer),
        ("layout", describe_layout(report)),
        ("memory", f"{format_bytes(report.peak_bytes)} at most" if report.peak_bytes else ""),
        ("unmatched", ", ".join(report.unmatched_patterns)),
        ("source", report.source),
        ("recipe", report.recipe),
    ]
    return [(label, text) for label, text in facts if text]


def _phase_lines(report: RunReport) -> str:
    """Return one line per phase of the run: name, duration, share."""
    total = max(sum(report.phases.values()), 1e-9)
    widest = max(map(len, report.phases), default=0)
    return "\n".join(
        f"{name:<{widest}}  {format_seconds(seconds):>12}  {100 * seconds / total:>3.0f} %"
        for name, seconds in report.phases.items()
    )


def _print_fact(console: Console, label: str, text: str, style: str = "") -> None:
    """Print a label and a text that wraps beside it; a word longer than the line is folded."""
    grid = Table.grid(padding=0)
    grid.add_column(width=LABEL_WIDTH, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style="bold"), Text(text, style=style))
    console.print(grid)
