"""`report.html`: one page that says what came out of a run; it loads nothing from elsewhere.

In: a `RunReport`. Out: HTML with inline style and inline SVG, readable on light and dark screens
and on paper. Its first screen holds the verdict, the sizes, the serving modes and the error by
depth; the rest follows. All text from the run (names of tensors, paths, warnings) is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.checkpoint.durable import write_text
from pipeline.evaluation.records import EvaluationReport
from pipeline.report.drawing import Plot
from pipeline.report.fidelity import (
    HOW_TO_MEASURE,
    MODE_HARDWARE,
    advise,
    all_warnings,
    describe_fidelity,
    describe_rejection,
    describe_sample,
    group_row,
    layer_row,
    mode_label,
    mode_rows,
    worst_groups,
    worst_layers,
)
from pipeline.report.plots import draw_all
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

TEMPLATE = "template.html"
MOST_LAYERS = 9
FIRST_WARNINGS = 2


def write_html(report: RunReport, path: Path) -> None:
    """Write the page, replacing an older one in one step."""
    write_text(path, render_html(report))


def render_html(report: RunReport) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    warnings = all_warnings(report)
    # The only text that goes in as it is: drawings, whose labels matplotlib has escaped.
    plots = {plot.name: (plot, Markup(plot.svg)) for plot in draw_all(report)}
    return environment.get_template(TEMPLATE).render(
        name=f"Rehearsal: {report.source}"
        if "rehearsal" in report.audit
        else Path(report.output).name or report.output,
        verdicts=_verdicts(report),
        state=_state(report),
        warnings=warnings,
        first_warnings=warnings[:FIRST_WARNINGS],
        sizes=_known(_sizes(report)),
        facts=_known(_facts(report)),
        cost=_cost(report.evaluation, plots) if report.evaluation else None,
        kinds=[_cells(line) for line in summarize_kinds(report)],
        total=_cells(summarize(all_kinds(report), "total")),
        plots=[plot for name, plot in plots.items() if name not in {"depth", "groups"}],
        phases=_phases(report),
        layer_seconds=[(k, format_seconds(s)) for k, s in layer_seconds(report).items()],
        worst=_worst(report),
        audit=[(key, _words(value)) for key, value in report.audit.items()],
        unmatched=report.unmatched_patterns,
        versions=sorted(report.versions.items()),
    )


def _state(report: RunReport) -> str:
    """Return the colour of the verdict: bad where the audit or a gate was not passed."""
    passed = has_passed(report)
    if passed is False or (report.evaluation is not None and report.evaluation.rejected):
        return "bad"
    return "good" if passed else "unknown"


def _verdicts(report: RunReport) -> list[tuple[str, str]]:
    """Return the sentences at the top with their classes, the weightiest first."""
    audit = (verdict(report), "bad-text" if has_passed(report) is False else "")
    if report.evaluation is None:
        hint = [] if "rehearsal" in report.audit else [(HOW_TO_MEASURE, "minor")]
        return [audit, *hint]
    cost = [(describe_fidelity(report.evaluation), "")]
    if rejection := describe_rejection(report.evaluation):
        cost.append((rejection, "bad-text"))
    return [audit, *cost] if has_passed(report) is False else [*cost, (audit[0], "minor")]


def _cost(evaluation: EvaluationReport, plots: dict[str, tuple[Plot, Markup]]) -> dict[str, Any]:
    """Return what the page says of an evaluation: modes, worst layers, groups, advice, drawings."""
    labels = [mode_label(mode.mode) for mode in evaluation.modes]
    return {
        "labels": labels,
        "hardware": [MODE_HARDWARE.get(str(mode.mode), "") for mode in evaluation.modes],
        "rows": mode_rows(evaluation) if evaluation.modes else [],
        "arithmetic": evaluation.arithmetic,
        "depth": plots.get("depth"),
        "layers": [
            layer_row(layer, evaluation.modes) for layer in worst_layers(evaluation, MOST_LAYERS)
        ],
        "bars": plots.get("groups"),
        "groups": [group_row(group) for group in worst_groups(evaluation)],
        "group_tokens": f"{evaluation.group_tokens:,}",
        "more_groups": len(evaluation.groups) - len(worst_groups(evaluation)),
        "advice": advise(evaluation),
    }


def _sizes(report: RunReport) -> list[tuple[str, str]]:
    """Return what the first screen says beside the verdict and the serving modes."""
    tokens = max((layer.tokens for layer in report.layers), default=0)
    flushed = summarize(all_kinds(report), "").flushed_share
    return [
        ("Size", describe_size(report)),
        ("Recipe", report.recipe),
        ("Calibrated", f"on {tokens:,} tokens" if tokens else "no (no forward pass)"),
        ("Evaluated", f"on {describe_sample(report.evaluation)}" if report.evaluation else ""),
        ("Experts", describe_coverage(report, most_named=3)),
        ("Flushed", f"{format_percent(flushed)} % of blocks, by Hopper" if flushed else ""),
    ]


def _facts(report: RunReport) -> list[tuple[str, str]]:
    """Return the other figures of the run as a whole."""
    peak = f"{format_bytes(report.peak_bytes)} on any rank" if report.peak_bytes else ""
    seconds = format_seconds(report.evaluation.seconds) if report.evaluation else ""
    return [
        ("Source", report.source),
        ("Output", report.output),
        ("Loss", describe_loss(report)),
        ("Experts", describe_coverage(report)),
        ("Layout", describe_layout(report)),
        ("Hardware", report.hardware),
        ("Device memory", peak),
        ("Evaluation took", seconds),
    ]


def _known(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, text) for label, text in facts if text]


def _cells(line: KindSummary) -> list[str]:
    return [
        line.label,
        FORMAT_LABELS.get(line.format, line.format),
        METHOD_LABELS.get(line.method, line.method),
        f"{line.tensors:,}",
        f"{line.parameters:,}",
        format_bytes(line.stored_bytes),
        format_percent(line.relative_error),
        format_change(line.change_from_max),
        format_percent(line.m4_share),
        format_percent(line.flushed_share),
    ]


def _worst(report: RunReport) -> list[tuple[str, str, str]]:
    """Return the tensor with the largest relative error of each quantized kind."""
    return [
        (line.label, line.worst_tensor, format_percent(line.worst_relative_error))
        for line in summarize_kinds(report)
        if line.worst_tensor
    ]


def _phases(report: RunReport) -> list[tuple[str, str, str]]:
    total = sum(report.phases.values())
    return [
        (name, format_seconds(seconds), f"{100 * seconds / total:.1f}" if total else "-")
        for name, seconds in report.phases.items()
    ]


def _words(value: object) -> str:
    """Return a value of the audit as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "; ".join(_words(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_words(item)}" for key, item in value.items()) or "none"
    return str(value)
