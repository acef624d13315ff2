"""`report.html`: one page that says what came out of a run; it loads nothing from elsewhere.

In: a `RunReport`. Out: HTML with inline style and inline SVG, readable on light and dark screens
and on paper. All text from the run (names of tensors, paths, warnings) is escaped.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

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


def write_html(report: RunReport, path: Path) -> None:
    """Write the page, replacing an older one in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_html(report), encoding="utf-8")
    partial.replace(path)


def render_html(report: RunReport) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    passed = has_passed(report)
    return environment.get_template(TEMPLATE).render(
        name=f"Rehearsal: {report.source}"
        if "rehearsal" in report.audit
        else Path(report.output).name or report.output,
        verdict=verdict(report),
        state={True: "good", False: "bad", None: "unknown"}[passed],
        warnings=report.warnings,
        facts=_facts(report),
        kinds=[_cells(line) for line in summarize_kinds(report)],
        total=_cells(summarize(all_kinds(report), "total")),
        # The only text that goes in as it is: drawings, whose labels matplotlib has escaped.
        plots=[(plot, Markup(plot.svg)) for plot in draw_all(report)],
        phases=_phases(report),
        layer_seconds=[(k, format_seconds(s)) for k, s in layer_seconds(report).items()],
        worst=_worst(report),
        audit=[(key, _words(value)) for key, value in report.audit.items()],
        unmatched=report.unmatched_patterns,
        versions=sorted(report.versions.items()),
    )


def _facts(report: RunReport) -> list[tuple[str, str]]:
    """Return what is known about the run as a whole; empty ones left out."""
    tokens = max((layer.tokens for layer in report.layers), default=0)
    peak = f"{format_bytes(report.peak_bytes)} on any rank" if report.peak_bytes else ""
    facts = [
        ("Source", report.source),
        ("Output", report.output),
        ("Recipe", report.recipe),
        ("Size", describe_size(report)),
        ("Loss", describe_loss(report)),
        ("Calibration tokens", f"{tokens:,}" if tokens else "none (no forward pass)"),
        ("Experts", describe_coverage(report)),
        ("Layout", describe_layout(report)),
        ("Hardware", report.hardware),
        ("Device memory", peak),
    ]
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
