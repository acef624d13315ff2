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

from pipeline.evaluation.records import EvaluationReport
from pipeline.report.fidelity import (
    MODE_HARDWARE,
    advise,
    all_warnings,
    describe_fidelity,
    describe_rejection,
    describe_sample,
    layer_row,
    mode_label,
    mode_rows,
    worst_layers,
)
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
MOST_WORST = 3


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
    if report.evaluation is not None:
        print_evaluation(report.evaluation, console)
    console.print()
    for label, text in _facts(report):
        _print_fact(console, label, text)
    for label, path in {"output": report.output, **(files or {})}.items():
        line = Text(f"{label:<{LABEL_WIDTH}}", style="bold")
        console.print(line.append(str(path), style="not bold"), soft_wrap=True)
    warnings = all_warnings(report)
    for warning in warnings[:MOST_WARNINGS]:
        _print_fact(console, "warning", warning, style="yellow")
    if len(warnings) > MOST_WARNINGS:
        rest = len(warnings) - MOST_WARNINGS
        _print_fact(console, "warning", f"and {rest} more, in run.json", style="yellow")


def print_evaluation(evaluation: EvaluationReport, console: Console | None = None) -> None:
    """Print what quantization cost: verdict, serving modes, worst layers and groups, gates.

    Args:
        evaluation: What was measured.
        console: Where to; standard output when None.
    """
    console = console or Console(highlight=False)
    console.print()
    console.print(Text(describe_fidelity(evaluation), style="bold"))
    if rejection := describe_rejection(evaluation):
        console.print(Text(rejection, style="bold red"))
    if evaluation.modes:
        console.print(_mode_table(evaluation))
    _print_fact(console, "evaluated", describe_sample(evaluation))
    if evaluation.arithmetic:
        _print_fact(console, "", evaluation.arithmetic)
    layers = [
        f"layer {layer.layer} {name}: {' / '.join(errors)} % alone"
        for layer in worst_layers(evaluation, MOST_WORST)
        for _, name, *errors in [layer_row(layer, evaluation.modes)]
    ]
    groups = [
        f"{where}: {price}, {pattern}" for where, pattern, price in advise(evaluation, MOST_WORST)
    ]
    for label, lines in (("layers", layers), ("try", groups)):
        for number, line in enumerate(lines):
            _print_fact(console, "" if number else label, line)


def _mode_table(evaluation: EvaluationReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for mode in evaluation.modes:
        hardware = MODE_HARDWARE.get(str(mode.mode))
        name = mode_label(mode.mode) + (f" ({hardware})" if hardware else "")
        table.add_column(Text(name), justify="right")
    for row in mode_rows(evaluation):
        table.add_row(*map(Text, row))
    return table


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
