"""The plots of the report, each an SVG text that goes into a page as it is.

In: a `RunReport`. Out: `Plot` records; a plot whose figures were not measured is left out. Series
differ by marker as well as colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from pipeline.report.drawing import INK, STYLE, WIDTH_IN, Plot, label_layers, legend, styles, to_svg
from pipeline.report.fidelity_plots import draw_depth, draw_groups
from pipeline.report.records import KindReport, RunReport
from pipeline.report.summary import FORMAT_LABELS, ROLE_LABELS, SECONDS_LABELS, role_label

NO_TOKEN = "#d55e00"
# Share of blocks that take M=4 on i.i.d. Gaussian weights.
GAUSSIAN_M4_PERCENT = 45.0


def draw_all(report: RunReport) -> list[Plot]:
    """Draw every plot that the run measured figures for."""
    drawings: list[tuple[str, str, str, Callable[[RunReport], Figure | None]]] = [
        (
            "depth",
            "Error by depth",
            "Relative error of the hidden states that leave each layer, against the BF16 model's. "
            "Above: with this layer and all before it quantized. Below: this layer alone, on the "
            "BF16 model's input; the largest are numbered.",
            draw_depth,
        ),
        (
            "groups",
            "Which layer hurts",
            "Mean KL that quantizing one group of projections adds while all others stay BF16 "
            "(W4A4), the worst first.",
            draw_groups,
        ),
        (
            "error",
            "Error per layer",
            "Above: relative error of the dequantized weights, the root of squared error over "
            "squared weight; hollow markers are what plain max scales would give. Below: change of "
            "the squared error against max; lower is better.",
            draw_error,
        ),
        (
            "m4",
            "Blocks on M=4",
            "Share of blocks whose maximum was put on 4 instead of 6 because that gives the "
            f"smaller error. On Gaussian weights it is about {GAUSSIAN_M4_PERCENT:.0f} % (dashed).",
            draw_m4,
        ),
        (
            "coverage",
            "Expert token coverage",
            "Calibration tokens per routed expert over the mean of its layer; in every layer the "
            "experts are sorted, busiest first. An expert without any token is orange.",
            draw_coverage,
        ),
        (
            "amax",
            "Input amax per layer",
            "Largest absolute value that reached each projection; input_scale is made of it.",
            draw_input_amax,
        ),
        (
            "time",
            "Time per layer",
            "Seconds of computing, and of waiting for weights or files. Files are awaited while "
            "later layers compute, so the layers may add up to more than the sweep took.",
            draw_time,
        ),
    ]
    plots = []
    with matplotlib.rc_context(STYLE):
        for name, title, caption, draw in drawings:
            figure = draw(report)
            if figure is not None:
                plots.append(Plot(name, title, caption, to_svg(figure, name, title)))
    return plots


def draw_error(report: RunReport) -> Figure | None:
    """Relative error (%) by layer and kind, and the change of squared error against max (%)."""
    series = _kinds_by_series(report)
    compared = any(k.squared_error_of_max for points in series.values() for _, k in points)
    if not series:
        return None
    figure = Figure(figsize=(WIDTH_IN, 5.0 if compared else 3.2), layout="constrained")
    rows = figure.subplots(2 if compared else 1, 1, sharex=True, squeeze=False)[:, 0]
    for (label, points), (colour, marker) in zip(series.items(), styles(series), strict=True):
        layers = [layer for layer, _ in points]
        error = [100 * math.sqrt(k.squared_error / k.squared_weight) for _, k in points]
        rows[0].plot(layers, error, marker, color=colour, label=label)
        with_max = [(layer, k, k.squared_error_of_max) for layer, k in points]
        of_max = [(layer, k, most) for layer, k, most in with_max if most]
        if not of_max:
            continue
        layers = [layer for layer, _, _ in of_max]
        error = [100 * math.sqrt(most / k.squared_weight) for _, k, most in of_max]
        rows[0].plot(layers, error, marker, color=colour, mfc="none", alpha=0.7)
        change = [100 * (k.squared_error / most - 1) for _, k, most in of_max]
        rows[1].plot(layers, change, marker, color=colour)
    rows[0].set_ylim(bottom=0)
    rows[0].set_ylabel("relative error (%)")
    if compared:
        rows[0].plot([], [], "o", color=INK, mfc="none", alpha=0.7, label="the same with max")
        rows[1].axhline(0, color=INK, linewidth=0.8)
        rows[1].set_ylabel("squared error vs max (%)")
    label_layers(rows[-1], _indices(report))
    legend(figure, rows[0])
    return figure


def draw_m4(report: RunReport) -> Figure | None:
    """Share of M=4 blocks (%) by layer and kind; None without four-over-six weights."""
    series = {
        label: [(layer, k) for layer, k in points if k.method == "four_over_six" and k.blocks]
        for label, points in _kinds_by_series(report).items()
    }
    if not any(series.values()):
        return None
    figure = Figure(figsize=(WIDTH_IN, 2.8), layout="constrained")
    axes = figure.subplots()
    for (label, points), (colour, marker) in zip(series.items(), styles(series), strict=True):
        if points:
            share = [100 * k.blocks_m4 / k.blocks for _, k in points]
            axes.plot([layer for layer, _ in points], share, marker, color=colour, label=label)
    axes.axhline(GAUSSIAN_M4_PERCENT, color=INK, linestyle="--", linewidth=0.8, alpha=0.7)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, min(low, 35)), min(100, max(high, 55)))
    axes.set_ylabel("M=4 blocks (%)")
    label_layers(axes, _indices(report))
    legend(figure, axes)
    return figure


def draw_coverage(report: RunReport) -> Figure | None:
    """Heat map [MoE layer, expert by rank] of tokens over the layer's mean, logarithmic."""
    layers = [x for x in report.coverage if sum(x.tokens_per_expert) > 0]
    if not layers:
        return None
    width = max(len(x.tokens_per_expert) for x in layers)
    relative = np.full((len(layers), width), np.nan)
    for row, layer in enumerate(layers):
        tokens = np.sort(np.array(layer.tokens_per_expert, dtype=np.float64))[::-1]
        relative[row, : len(tokens)] = tokens / tokens.mean()
    positive = relative[relative > 0]
    # At least a factor of two each way, so that an even spread does not look like a gradient.
    low, high = min(0.5, float(positive.min())), max(2.0, float(positive.max()))
    relative[relative == 0] = low / 10  # below the scale: drawn in the colour for no token
    figure = Figure(figsize=(WIDTH_IN, min(6.0, 1.5 + 0.25 * len(layers))), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["cividis"].with_extremes(under=NO_TOKEN, bad="none")
    image = axes.imshow(
        relative,
        aspect="auto",
        interpolation="none",
        cmap=colours,
        norm=LogNorm(low, high),
        extent=(0.5, width + 0.5, len(layers) - 0.5, -0.5),
    )
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_yticks(range(0, len(layers), step), [str(x.layer) for x in layers[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(False)
    axes.set_ylabel("layer")
    axes.set_xlabel("experts of the layer, busiest first")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter("")
    bar.set_label("tokens / mean of the layer")
    bar.outline.set_visible(False)
    return figure


def draw_input_amax(report: RunReport) -> Figure | None:
    """Input amax by layer and projection, and the amax of keys and values, logarithmic."""
    series: dict[str, list[tuple[int, float]]] = {}
    for layer in report.layers:
        for kind in sorted(layer.kinds, key=_role_place):
            for projection, amax in kind.input_amax.items():
                if amax > 0 and math.isfinite(amax):
                    label = f"{role_label(kind.role)}: {projection}"
                    series.setdefault(label, []).append((layer.layer, amax))
    for kv in report.kv_amax:
        for label, amax in (("KV cache: keys", kv.k_amax), ("KV cache: values", kv.v_amax)):
            if amax > 0 and math.isfinite(amax):
                series.setdefault(label, []).append((kv.layer, amax))
    if not series:
        return None
    series = dict(sorted(series.items(), key=lambda item: _label_place(item[0])))
    figure = Figure(figsize=(WIDTH_IN, 3.8), layout="constrained")
    axes = figure.subplots()
    for (label, points), (colour, marker) in zip(series.items(), styles(series), strict=True):
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=label)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("input amax")
    label_layers(axes, _indices(report))
    legend(figure, axes)
    return figure


def draw_time(report: RunReport) -> Figure | None:
    """Seconds per layer, stacked by what they went to."""
    kinds = list(dict.fromkeys(kind for layer in report.layers for kind in layer.seconds))
    if not kinds:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.0), layout="constrained")
    axes = figure.subplots()
    indices = [layer.layer for layer in report.layers]
    base = np.zeros(len(indices))
    for kind, (colour, _) in zip(kinds, styles(kinds), strict=True):
        seconds = np.array([layer.seconds.get(kind, 0.0) for layer in report.layers])
        label = SECONDS_LABELS.get(kind, kind)
        axes.bar(indices, seconds, bottom=base, width=0.8, color=colour, label=label)
        base += seconds
    axes.set_ylabel("time (s)")
    axes.grid(visible=False, axis="x")
    label_layers(axes, _indices(report))
    legend(figure, axes)
    return figure


def _kinds_by_series(report: RunReport) -> dict[str, list[tuple[int, KindReport]]]:
    """Return (layer, kind) of every quantized kind with a weight, by role and format."""
    series: dict[str, list[tuple[int, KindReport]]] = {}
    for layer in report.layers:
        for kind in layer.kinds:
            if kind.format != "bf16" and kind.squared_weight > 0:
                label = f"{role_label(kind.role)} {FORMAT_LABELS.get(kind.format, kind.format)}"
                series.setdefault(label, []).append((layer.layer, kind))
    return dict(sorted(series.items(), key=lambda item: (_role_place(item[1][0][1]), item[0])))


def _role_place(kind: KindReport) -> int:
    order = list(ROLE_LABELS)
    return order.index(kind.role) if kind.role in order else len(order)


def _label_place(label: str) -> int:
    """Return the place of a `role: projection` label in the order of roles."""
    order = list(ROLE_LABELS.values())
    role = label.partition(":")[0]
    return order.index(role) if role in order else len(order)


def _indices(report: RunReport) -> list[int]:
    return [layer.layer for layer in report.layers]
