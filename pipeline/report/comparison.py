"""Several recipes side by side: one table, one drawing.

In: a `RunReport` for each recipe, from one comparison or from finished runs. Out: rows for a
terminal, comparison.json, and comparison.html with bits against KL.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.checkpoint.durable import write_json, write_text
from pipeline.config import REPORT_DIRECTORY
from pipeline.errors import ConfigError
from pipeline.evaluation.records import Fidelity
from pipeline.report.drawing import MARKERS, SERIES, STYLE, to_svg
from pipeline.report.fidelity import describe_sample
from pipeline.report.records import RunReport
from pipeline.report.run_json import finite, read_run_json
from pipeline.report.summary import format_bytes, format_seconds

SCHEMA = 1
SIZE_IN = (7.6, 3.6)


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        recipe: Its name.
        effective_bits: Stored weight bits over all parameters.
        quantized_bytes: Tensor bytes of the checkpoint.
        median_against_max: Squared error of the NVFP4 weights over that of `max`, median of the
            tensors; None without NVFP4.
        worst_against_max: The same of the tensor where it is largest.
        worst_tensor: Which that is.
        perplexity_bf16: Of the BF16 model.
        modes: What was measured in each serving mode.
        seconds: Spent on this recipe.
        output: Its directory, or `discard`.
        measured_on: The evaluation text, in words.
        rejected: Gates that it missed.
    """

    recipe: str
    effective_bits: float
    quantized_bytes: int
    median_against_max: float | None
    worst_against_max: float | None
    worst_tensor: str
    perplexity_bf16: float | None
    modes: list[Fidelity]
    seconds: float
    output: str
    measured_on: str
    rejected: list[str]


def row_of(report: RunReport) -> Row:
    """The row of one run."""
    evaluation, against = report.evaluation, report.against_max
    return Row(
        recipe=report.recipe,
        effective_bits=report.effective_bits,
        quantized_bytes=report.quantized_bytes,
        median_against_max=None if against is None else against.median,
        worst_against_max=None if against is None else against.worst,
        worst_tensor="" if against is None else against.worst_tensor,
        perplexity_bf16=None if evaluation is None else evaluation.perplexity,
        modes=[] if evaluation is None else evaluation.modes,
        seconds=report.phases.get("this recipe", sum(report.phases.values())),
        output=report.output,
        measured_on="" if evaluation is None else describe_sample(evaluation),
        rejected=[] if evaluation is None else evaluation.rejected,
    )


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What keeps rows of different runs from being compared, and which were rejected."""
    notes = []
    bf16 = {row.perplexity_bf16 for row in rows if row.modes}
    texts = {row.measured_on for row in rows if row.modes}
    if len(bf16) > 1 or len(texts) > 1:
        notes.append(
            "NOT COMPARABLE: measured on different text, models or devices: "
            + "; ".join(
                f"{name}: {row.measured_on}" for name, row in zip(names(rows), rows, strict=True)
            )
        )
    notes += [
        f"{name} was rejected: {'; '.join(row.rejected)}"
        for name, row in zip(names(rows), rows, strict=True)
        if row.rejected
    ]
    return notes


def names(rows: Sequence[Row]) -> list[str]:
    """What rows are called: by recipe, or by directory where recipes repeat."""
    recipes = [row.recipe for row in rows]
    if len(set(recipes)) == len(recipes):
        return recipes
    return [f"{row.recipe} ({Path(row.output).name})" for row in rows]


WEIGHTS = ("recipe", "bits", "size", "error / max", "worst", "time")
SERVED = ("recipe", "mode", "perplexity", "vs BF16", "KL", "top-1 %", "clipped %")
LEFT = ("recipe", "mode")


def weight_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each recipe, as text, under `WEIGHTS`."""
    return [
        (
            name,
            f"{row.effective_bits:.2f}",
            format_bytes(row.quantized_bytes),
            _ratio(row.median_against_max),
            _ratio(row.worst_against_max),
            format_seconds(row.seconds),
        )
        for name, row in zip(names(rows), rows, strict=True)
    ]


def served_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each recipe and serving mode, as text, under `SERVED`."""
    lines: list[tuple[str, ...]] = []
    for name, row in zip(names(rows), rows, strict=True):
        for number, mode in enumerate(row.modes):
            assert row.perplexity_bf16 is not None
            lines.append(
                (
                    name if number == 0 else "",
                    mode.mode.upper(),
                    f"{mode.perplexity:.5g}",
                    _ratio(mode.perplexity / row.perplexity_bf16, digits=2),
                    f"{mode.kl_mean:.3g}",
                    f"{100 * mode.top1:.2f}",
                    f"{100 * mode.clipped:.2g}",
                )
            )
        if not row.modes:
            lines.append((name, "not evaluated", *("-",) * (len(SERVED) - 2)))
    return lines


def read_rows(runs: Sequence[str]) -> list[Row]:
    """The rows of finished runs, from the run.json of each.

    Raises:
        ConfigError: A directory holds no report of a run.
        OutputError: A report cannot be read.
    """
    rows = []
    for run in runs:
        places = [Path(run) / name for name in ("run.json", f"{REPORT_DIRECTORY}/run.json")]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ConfigError(
                "runs",
                value=run,
                rule="holds no run.json of a finished run",
                remedy="name an OUTPUT directory, or the report directory of a rehearsal",
            )
        rows.append(row_of(read_run_json(found)))
    return rows


def print_rows(
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    console: Console | None = None,
    files: Path | None = None,
) -> None:
    """The table on a terminal; wider than 80 columns where names are long.

    Args:
        rows: To be shown.
        notes: To be shown below.
        console: Where to; None: stdout.
        files: Directory of comparison.json and comparison.html, to be named.
    """
    console = console or Console(highlight=False)
    for headings, lines in ((WEIGHTS, weight_cells(rows)), (SERVED, served_cells(rows))):
        table = Table(box=box.SIMPLE_HEAD, header_style="", padding=(0, 1, 0, 0))
        for heading in headings:
            justify: Any = "left" if heading in LEFT else "right"
            table.add_column(heading, justify=justify, no_wrap=heading != "recipe", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(_explanation(rows))
    for note in notes:
        console.print(note)
    if files is not None:
        console.print(f"table     {files / 'comparison.json'}")
        console.print(f"page      {files / 'comparison.html'}")


def write_rows(rows: Sequence[Row], directory: Path, notes: Sequence[str]) -> None:
    """Writes comparison.json and comparison.html."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "comparison.json", to_values(rows, notes))
    write_text(directory / "comparison.html", _page(rows, notes))


def to_values(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """All rows as JSON values; what is no finite number becomes null."""
    values: dict[str, Any] = finite(
        {"schema": SCHEMA, "notes": list(notes), "rows": [dataclasses.asdict(r) for r in rows]}
    )
    return values


def draw_rows(rows: Sequence[Row]) -> Figure | None:
    """Effective bits against mean KL: filled W4A4, hollow W4A16."""
    measured = [row for row in rows if row.modes]
    if not measured:
        return None
    with matplotlib.rc_context(STYLE):
        return _draw(measured)


def _draw(measured: Sequence[Row]) -> Figure:
    figure = Figure(figsize=SIZE_IN, layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(measured):
        colour = SERIES[number % len(SERIES)]
        marker = MARKERS[number % len(MARKERS)]
        for index, mode in enumerate(row.modes):
            axes.plot(
                [row.effective_bits],
                [mode.kl_mean],
                marker,
                color=colour,
                markersize=8 if index else 6,
                markerfacecolor="none" if index else colour,
                label=f"{row.recipe}, {mode.mode.upper()}",
            )
    axes.set_xlabel("effective bits per parameter")
    axes.set_ylabel("mean KL (nats per token)")
    axes.margins(0.15)
    largest = max(mode.kl_mean for row in measured for mode in row.modes)
    if math.isfinite(largest) and largest > 0:
        axes.set_ylim(0, 1.12 * largest)
    figure.legend(loc="outside right upper")
    return figure


def _ratio(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * (value - 1):+.{digits}f} %"


def _explanation(rows: Sequence[Row]) -> str:
    bf16 = {f"{row.perplexity_bf16:.4g}" for row in rows if row.perplexity_bf16 is not None}
    told = f"perplexity of the BF16 model: {', '.join(sorted(bf16))}; " if bf16 else ""
    return (
        f"{told}error / max: squared error of NVFP4 weights against method max, median and worst "
        "tensor; KL of the BF16 model to this one, nats per token; W4A4 on Blackwell, W4A16 on "
        "Hopper."
    )


def _page(rows: Sequence[Row], notes: Sequence[str]) -> str:
    def line(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values) + "</tr>"

    figure = draw_rows(rows)
    drawing = "" if figure is None else to_svg(figure, "bits-and-kl", "effective bits against KL")
    tables = "\n".join(
        f'<div class="wide"><table><thead>{line(headings, "th")}</thead><tbody>'
        + "\n".join(line(values, "td") for values in lines)
        + "</tbody></table></div>"
        for headings, lines in ((WEIGHTS, weight_cells(rows)), (SERVED, served_cells(rows)))
    )
    told = "".join(f"<p>{html.escape(note)}</p>" for note in (_explanation(rows), *notes))
    return _HTML.format(tables=tables, notes=told, drawing=drawing)


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>Recipes compared - Layersweep</title>
<style>
:root {{ --page: #ffffff; --text: #1c2228; --line: #dde1e6; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --page: #14181c; --text: #e4e8ec; --line: #323a43;
    --series-1: #56b4e9; --series-2: #ff8a3d; --series-3: #2ecf9f; --series-4: #e79ac5;
    --series-5: #f0c24b; --series-6: #a5d8ff; --series-7: #b9a0ec; --series-8: #b5b5b5; }}
}}
body {{ margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 76rem; color: var(--text);
  background: var(--page); font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }}
svg {{ width: 100%; max-width: 50rem; height: auto; }}
</style>
</head>
<body>
<h1>Recipes compared</h1>
{tables}
{notes}
{drawing}
</body>
</html>
"""
