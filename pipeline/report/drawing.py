"""What all drawings of the report share: style, palette, legend, and the way to an SVG text.

In: matplotlib figures. Out: `<svg>` elements whose colours are CSS variables with a fallback
(`--series-1` ...) and whose text takes the page's own colour, so that one drawing serves a light
page, a dark page and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette (distinct for the colour-blind), darkened where it is pale on white.
SERIES = (
    "#0072b2", "#d55e00", "#00805f", "#b5538f", "#9a6a00", "#2f8fcf", "#6b4fa0", "#6e6e6e",
)  # fmt: skip
MARKERS = "os^Dv<>P"
# Stand-ins that no drawing uses otherwise: they become the page's text colour.
INK, FAINT = "#010203", "#010204"
WIDTH_IN = 10.0
LEGEND_CHARACTERS = 135  # that fit in one row of that width
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.0,
}


@dataclass(frozen=True)
class Plot:
    """One figure: a short name (its anchor in the page), title, explanation and drawing."""

    name: str
    title: str
    caption: str
    svg: str


def styles(series: Any) -> list[tuple[str, str]]:
    """Return a colour and a marker per series; beyond eight, the pairs shift and stay distinct."""
    count = len(SERIES)
    return [
        (SERIES[i % count], MARKERS[(i + i // count) % len(MARKERS)]) for i in range(len(series))
    ]


def label_layers(axes: Any, layers: Iterable[int]) -> None:
    """Label the x axis with layer indices, over the whole model."""
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    indices = list(layers)
    axes.set_xlim(min(indices) - 0.7, max(indices) + 0.7)


def legend(figure: Figure, axes: Any) -> None:
    """Put the legend of `axes` above the figure, in rows."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        fitting = max(1, LEGEND_CHARACTERS // (max(map(len, labels)) + 6))
        figure.legend(handles, labels, loc="outside upper left", ncols=min(fitting, len(handles)))


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an `<svg>` element that takes its colours from the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The salt keeps the ids of this drawing apart from those of the others in the page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={**nothing})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[\d.]+pt"', r"\1", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    svg = re.sub(r"(?i)#01020[34]", "currentColor", svg)
    for number, colour in enumerate(SERIES, start=1):
        svg = re.sub(f"(?i){colour}", f"var(--series-{number}, {colour})", svg)
    return svg
