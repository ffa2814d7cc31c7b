"""Colours, marks and fonts of the plots, and how a plot becomes part of the page."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evaluation.report.collect import REAL

INK, RULE, SOFT = "#26323b", "#d5dbe0", "#5b6770"
COLOURS = {REAL: SOFT, "base": "#0072b2", "miner": "#d55e00", "backbone": INK, "reference": INK}
MORE_COLOURS = (
    *("#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#8c564b", "#7f7f00", "#5e3c99", "#17becf", "#a50f15", "#4d4d4d", "#b2df8a", "#fb9a99"),
)
"""Okabe & Ito's palette, which colour-blind readers can tell apart; then others for long comparisons."""

MARKERS = ("o", "s", "^", "D", "v", "P")
CLIPS = (
    "circle(50%)",
    "inset(6%)",
    "polygon(50% 4%, 100% 96%, 0 96%)",
    "polygon(50% 0, 100% 50%, 50% 100%, 0 50%)",
    "polygon(0 4%, 100% 4%, 50% 96%)",
    "polygon(33% 0, 67% 0, 67% 33%, 100% 33%, 100% 67%, 67% 67%, "
    "67% 100%, 33% 100%, 33% 67%, 0 67%, 0 33%, 33% 33%)",
)
"""The shapes of :data:`MARKERS` in CSS. A method has the next one each time that the colours are used up."""

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
FONTS = ("'DejaVu Sans'", "'Helvetica Neue', 'Arial', 'Liberation Sans', 'DejaVu Sans'")
"""The font that figures are laid out with, wide from matplotlib itself, and those that a reader may have."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5ad",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e8ecef",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
}
WIDTH = 9.2
"""Width of every figure, in inches."""


def colour(arm: str, methods: Sequence[str]) -> str:
    """Return the colour of a method or stage, the same throughout the page."""
    return COLOURS.get(arm) or MORE_COLOURS[_others(methods).index(arm) % len(MORE_COLOURS)]


def rank(arm: str, methods: Sequence[str]) -> int:
    """Return how often the colours were used up before a method: 0 for the first ones."""
    return 0 if arm in COLOURS else _others(methods).index(arm) // len(MORE_COLOURS)


def marker(arm: str, methods: Sequence[str]) -> str:
    """Return the mark of a method, which tells apart those of the same colour."""
    return MARKERS[rank(arm, methods) % len(MARKERS)]


def swatch(arm: str, methods: Sequence[str]) -> str:
    """Return the CSS of a small patch in the colour and shape of a method."""
    return f"background:{colour(arm, methods)};clip-path:{CLIPS[rank(arm, methods) % len(CLIPS)]}"


def data_uri(content: bytes, kind: str) -> str:
    """Return a file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(uri: str) -> bytes:
    """Return the file that :func:`data_uri` was given."""
    return base64.b64decode(uri.partition(",")[2])


def new_figure(height: float) -> Figure:
    """Return an empty figure in the style of the page; the height is in inches."""
    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))


def to_svg(figure: Figure) -> str:
    """Return a figure as a data URI of an SVG picture."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=200)
    return data_uri(buffer.getvalue().replace(*FONTS).encode(), "image/svg+xml")


styled = matplotlib.rc_context(STYLE)
"""Decorator of functions that draw."""


def _others(methods: Sequence[str]) -> list[str]:
    return [m for m in methods if m not in COLOURS]
