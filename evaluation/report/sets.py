"""Plots of the synthetic sets: how native they are for their adversariality, and which modes they show."""

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from evaluation.report.collect import Run
from evaluation.report.labels import CROWD, label_points
from evaluation.report.statistics import set_spread, spread
from evaluation.report.style import colour, marker, new_figure, styled, to_svg

NATIVENESS = {"fid": "FID", "mask_fidelity": "mask fidelity, DSC (%)"}
"""What is drawn against adversariality."""

FAR = 2.5
"""How many times as adversarial as the hardest of the yardstick a method is drawn to scale."""

Place = tuple[float, float]


def yardstick(run: Run) -> list[str]:
    """Return base and best-of-K, which change nothing but the choice of images, by adversariality."""
    methods = [m for m in run.methods if m == "base" or m.startswith("best_of_")]
    return sorted(methods, key=lambda method: set_spread(run, method, "adversariality").mean)


@styled
def nativeness_figure(run: Run) -> str | None:
    """Draw FID and mask fidelity against adversariality, a point per method; None where none has either.

    A grey line joins the methods of the :func:`yardstick`. FID is of sets of one size only, that of base. A
    method that is :data:`FAR` off stands at the right edge with its numbers: the others can be told apart.
    """
    size = {method: one["n"] for (method, _), one in run.sets.items()}
    common = size[(yardstick(run) or run.methods)[0]]
    points = {
        key: {
            m: (set_spread(run, m, "adversariality").mean, set_spread(run, m, key).mean) for m in run.methods
        }
        for key in NATIVENESS
    }
    known = {key: {m: p for m, p in one.items() if np.isfinite(p).all()} for key, one in points.items()}
    if "fid" in known:
        known["fid"] = {m: p for m, p in known["fid"].items() if size[m] == common}
    known = {key: one for key, one in known.items() if one}
    if not known:
        return None
    shape = (len(known), 1) if len(run.methods) > CROWD else (1, len(known))
    figure = new_figure(4.2 * shape[0])
    panels = figure.subplots(*shape, squeeze=False).flatten()
    drawn = []
    for ax, (key, one) in zip(panels, known.items(), strict=True):
        joined = [one[m] for m in yardstick(run) if m in one]
        ax.plot(*np.array(joined).reshape(-1, 2).T, color="#b9c3ca", lw=1.5, zorder=1)
        near = {m: p for m, p in one.items() if len(joined) < 2 or p[0] <= FAR * joined[-1][0]}
        for method, place in near.items():
            shade, mark = colour(method, run.arms), marker(method, run.arms)
            ax.plot(*place, color=shade, marker=mark, ms=5.5, lw=0, zorder=3)
        ax.set(title=NATIVENESS[key].partition(",")[0], xlabel="adversariality", ylabel=NATIVENESS[key])
        ax.margins(0.1)
        edges = _at_the_edge(ax, {m: p for m, p in one.items() if m not in near})
        for method, place in edges.items():
            ax.plot(*place, color=colour(method, run.arms), marker=">", ms=6, lw=0, zorder=3, clip_on=False)
        names = [m if m in near else f"{m} ({one[m][0]:.2g}, {one[m][1]:.2g})" for m in (*near, *edges)]
        drawn.append((ax, names, [*near.values(), *edges.values()]))
    figure.draw_without_rendering()
    for ax, names, places in drawn:
        label_points(ax, names, *zip(*places, strict=True))
    return to_svg(figure)


def _at_the_edge(ax: Axes, far: dict[str, Place]) -> dict[str, Place]:
    """Return where methods that lie outside stand: at the right edge, as high as they are or as fits."""
    (_, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    if far:
        ax.set(xlim=ax.get_xlim(), ylim=(low, high))  # whatever is drawn from here on
    return {method: (right, min(max(y, low), high)) for method, (_, y) in far.items()}


def mode_shares(run: Run) -> dict[str, dict[str, float]]:
    """Return the share in percent of every appearance mode in the sets of each method, mean over seeds."""
    shares: dict[str, dict[str, float]] = {}
    for method in run.methods:
        found = [
            one["modes"]["histogram"] for (m, _), one in run.sets.items() if m == method and one.get("modes")
        ]
        modes = dict.fromkeys(mode for counts in found for mode in counts)
        mean = {
            mode: spread(100 * counts.get(mode, 0) / max(1, sum(counts.values())) for counts in found).mean
            for mode in modes
        }
        shares |= {method: mean} if mean else {}
    return shares


@styled
def mode_figure(run: Run) -> str | None:
    """Draw :func:`mode_shares` as stacked bars; None where no set knows its modes."""
    shares = mode_shares(run)
    modes = list(dict.fromkeys(mode for one in shares.values() for mode in one))
    if not modes:
        return None
    figure = new_figure(1.3 + 0.2 * len(shares))
    ax = figure.subplots()
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, len(modes)))
    places, left = range(len(shares)), np.zeros(len(shares))
    for i, (mode, shade) in enumerate(zip(modes, shades, strict=True)):
        widths = np.array([one.get(mode, 0.0) for one in shares.values()])
        ax.barh(places, widths, 0.78, left, color=shade, edgecolor="white", lw=0.6, label=mode)
        for place, width, start in zip(places, widths, left, strict=True):
            if width >= 5:
                ink = "white" if i < 0.6 * len(modes) else "black"
                ax.text(
                    start + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=7, color=ink
                )
        left += widths
    ax.set_yticks(places, list(shares), fontsize=8)
    ax.set_ylim(len(shares) - 0.4, -0.6)
    ax.set(xlabel="share of images (%)", xlim=(0, 100))
    ax.tick_params("y", length=0)
    ax.grid(visible=False)
    figure.legend(loc="outside upper left", ncols=10, title="mode", alignment="left")
    return to_svg(figure)


def mode_accuracy(run: Run) -> float:
    """Return how often a real image is judged to show its mode, in percent; NaN where no set says so."""
    found = [one["modes"].get("accuracy") for one in run.sets.values() if one.get("modes")]
    mean = spread(found).mean
    return 100 * mean if math.isfinite(mean) else math.nan
