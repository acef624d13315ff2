"""The two drawings of what quantization cost: error by depth, and which group of projections hurts.

In: a `RunReport` with an evaluation. Out: matplotlib figures, or None where nothing was measured.
A layer's type is told by colour and marker; the first serving mode is solid and filled, the second
dashed and hollow, in both halves of the drawing.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.evaluation.records import EvaluationReport, GroupHarm, LayerErrors
from pipeline.report.drawing import INK, MARKERS, SERIES, WIDTH_IN, label_layers
from pipeline.report.fidelity import (
    MODE_HARDWARE,
    TYPE_LABELS,
    group_label,
    mode_label,
    type_label,
    worst_groups,
    worst_layers,
)
from pipeline.report.records import RunReport

DEPTH_SIZE_IN = (7.6, 3.4)
NUMBERED = 4
RING = 1.45  # hollow markers are larger, so that one is seen around a filled one
LINES = ("-", "--", ":", "-.")


def draw_depth(report: RunReport) -> Figure | None:
    """Relative error (%) of the hidden states by layer: accumulated above, alone below."""
    evaluation = report.evaluation
    if evaluation is None or not evaluation.layers or not evaluation.modes:
        return None
    figure = Figure(figsize=DEPTH_SIZE_IN, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    layers = evaluation.layers
    size = 5.5 if len(layers) <= 24 else 4.5 if len(layers) <= 60 else 3.2
    for number, mode in enumerate(evaluation.modes):
        for axes, errors in (
            (above, [layer.accumulated for layer in layers]),
            (below, [layer.alone for layer in layers]),
        ):
            values = [_percent(error.get(str(mode.mode))) for error in errors]
            if axes is above:
                indices = [layer.layer for layer in layers]
                line = LINES[number % len(LINES)]
                axes.plot(indices, values, line, color=INK, alpha=0.55, linewidth=0.9)
            _mark_types(axes, layers, values, size, filled=number == 0)
    for axes, label in ((above, "accumulated (%)"), (below, "alone (%)")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    below.margins(y=0.18)
    below.set_ylim(bottom=0)
    _number_worst(below, evaluation)
    label_layers(below, [layer.layer for layer in layers])
    _depth_legend(figure, evaluation)
    figure.align_ylabels()
    return figure


def _mark_types(
    axes: Any, layers: list[LayerErrors], values: list[float], size: float, *, filled: bool
) -> None:
    for layer_type in dict.fromkeys(layer.layer_type for layer in layers):
        colour, marker = _type_style(layer_type)
        points = [
            (layer.layer, value)
            for layer, value in zip(layers, values, strict=True)
            if layer.layer_type == layer_type
        ]
        axes.plot(
            *zip(*points, strict=True),
            marker,
            color=colour,
            markersize=size if filled else RING * size,
            markeredgewidth=0.9,
            mfc=colour if filled else "none",
        )


def _number_worst(axes: Any, evaluation: EvaluationReport) -> None:
    """Write the index beside the worst layers, as long as the numbers stay apart."""
    span = max(1, len(evaluation.layers))
    written: list[int] = []
    for layer in worst_layers(evaluation, NUMBERED):
        error = max((_percent(e) for e in layer.alone.values()), default=math.nan)
        near = any(abs(layer.layer - other) < span / 24 for other in written)
        if math.isfinite(error) and not near:
            axes.annotate(
                str(layer.layer),
                (layer.layer, error),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
            written.append(layer.layer)


def _depth_legend(figure: Figure, evaluation: EvaluationReport) -> None:
    present = {layer.layer_type for layer in evaluation.layers}
    types = [name for name in TYPE_LABELS if name in present]
    types += sorted(present - set(types))
    handles = []
    for layer_type in types:
        colour, marker = _type_style(layer_type)
        name = type_label(layer_type)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=name))
    for number, mode in enumerate(evaluation.modes):
        hardware = MODE_HARDWARE.get(str(mode.mode))
        handles.append(
            Line2D(
                [],
                [],
                color=INK,
                marker="o",
                mfc=INK if number == 0 else "none",
                linestyle=LINES[number % len(LINES)],
                label=mode_label(mode.mode) + (f" ({hardware})" if hardware else ""),
            )
        )
    # The narrow handles keep six entries in one row.
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=2.4,
    )


def draw_groups(report: RunReport) -> Figure | None:
    """Bars: the mean KL that each of the worst groups adds, coloured by the layer's type."""
    groups = worst_groups(report.evaluation) if report.evaluation else []
    groups = [group for group in groups if math.isfinite(group.kl_mean)]
    if not groups:
        return None
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.23 * len(groups)), layout="constrained")
    axes = figure.subplots()
    places = range(len(groups))
    colours = [_type_style(group.layer_type)[0] for group in groups]
    bars = axes.barh(places, [group.kl_mean for group in groups], height=0.7, color=colours)
    axes.bar_label(bars, [f"{group.kl_mean:.3g}" for group in groups], padding=4, fontsize=9)
    axes.set_yticks(places, [_group_name(group) for group in groups])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlim(left=min(0.0, *(group.kl_mean for group in groups)))
    axes.set_xlabel("mean KL (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    present = {group.layer_type for group in groups}
    patches = [
        Patch(color=_type_style(name)[0], label=type_label(name))
        for name in (*TYPE_LABELS, *sorted(present - set(TYPE_LABELS)))
        if name in present
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches))
    return figure


def _group_name(group: GroupHarm) -> str:
    return f"layer {group.layer}, {group_label(group.group)}"


def _type_style(layer_type: str) -> tuple[str, str]:
    """Return the colour and the marker of a layer type; others than the four share the last."""
    place = list(TYPE_LABELS).index(layer_type) if layer_type in TYPE_LABELS else len(SERIES) - 1
    return SERIES[place], MARKERS[place]


def _percent(error: float | None) -> float:
    """Return a ratio in percent; NaN, which is not drawn, where it is missing or not finite."""
    return 100 * error if error is not None and math.isfinite(error) else math.nan
