"""The plots of the page, as data URIs of SVG pictures."""

import base64
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from evaluation.report.collect import REAL, Curve, Row, Run, arm_name, finite
from evaluation.report.statistics import spread, summarise

INK, RULE = "#26323b", "#d5dbe0"
COLOURS = {REAL: "#5b6770", "base": "#0072b2", "miner": "#d55e00", "backbone": INK, "reference": INK}
MORE_COLOURS = (
    *("#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#8c564b", "#7f7f00", "#5e3c99", "#17becf", "#a50f15", "#4d4d4d", "#b2df8a", "#fb9a99"),
)
"""Okabe & Ito's palette, which colour-blind readers can tell apart; then others for long comparisons."""

SEED_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
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
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
    "legend.frameon": False,
}
WIDTH = 9.2
"""Width of every figure, in inches."""


def colour(arm: str, methods: Sequence[str]) -> str:
    """Return the colour of a method or stage, the same throughout the page."""
    others = [m for m in methods if m not in COLOURS]
    return COLOURS.get(arm) or MORE_COLOURS[others.index(arm) % len(MORE_COLOURS)]


def data_uri(content: bytes, kind: str) -> str:
    """Return a file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@matplotlib.rc_context(STYLE)
def scores_figure(run: Run) -> str:
    """Draw DSC and ASD of every arm: a point per seed, same seeds joined, the mean as a bar."""
    rows = run.rows
    test_sets = list(dict.fromkeys(r.test_set for r in rows))
    figure = _figure(2.7 * len(test_sets))
    axes = figure.subplots(len(test_sets), 2, squeeze=False)
    for line, test_set in zip(axes, test_sets, strict=True):
        here = [r for r in rows if r.test_set == test_set]
        for ax, metric, label in zip(line, ("dsc", "asd"), ("DSC (%)", f"ASD ({run.asd_unit})"), strict=True):
            _strip(ax, here, metric, run.arms)
            ax.set(title=f"{test_set}: {metric.upper()}", ylabel=label)
    return _svg(figure)


def _strip(ax: Axes, rows: Sequence[Row], metric: str, methods: Sequence[str]) -> None:
    """Draw one score of every arm on one test set."""
    arms = list(dict.fromkeys((r.method, r.budget) for r in rows))
    colours = [colour(method, methods) for method, _ in arms]
    places = range(len(arms))
    scores = {(r.method, r.budget, r.seed): getattr(r, metric) for r in rows}
    seeds = dict.fromkeys(r.seed for r in rows)
    for seed in seeds:
        heights = np.array([scores.get((*arm, seed)) for arm in arms], dtype=float)
        ax.plot(places, heights, color=RULE, lw=1, zorder=1)
        ax.scatter(places, heights, s=26, c=colours, zorder=3, lw=0)
    means = [spread(scores.get((*arm, seed)) for seed in seeds).mean for arm in arms]
    ax.hlines(means, np.array(places) - 0.22, np.array(places) + 0.22, colors=colours, lw=2.2, zorder=2)
    ax.set_xticks(places, [arm_name(*arm).replace(" ", "\n") for arm in arms])
    ax.set_xlim(-0.5, len(arms) - 0.5)
    ax.grid(axis="x", visible=False)


@matplotlib.rc_context(STYLE)
def budget_figure(run: Run) -> str | None:
    """Draw DSC against the synthetic budget, mean ± standard deviation; None for a single budget."""
    budgets = sorted(run.experiment["budgets"])
    if len(budgets) < 2:
        return None
    summaries = summarise(run.rows)
    test_sets = list(dict.fromkeys(s.test_set for s in summaries))
    figure = _figure(2.9)
    for ax, test_set in zip(figure.subplots(1, len(test_sets), squeeze=False)[0], test_sets, strict=True):
        for method in (REAL, *run.methods):
            points = [s for s in summaries if (s.test_set, s.method) == (test_set, method)]
            points.sort(key=lambda s: s.budget)
            shade = colour(method, run.arms)
            y, sd = [s.dsc.mean for s in points], np.nan_to_num([s.dsc.sd for s in points])
            if method == REAL:
                ax.axhline(y[0], color=shade, lw=1.5, ls=(0, (4, 2)), label=method)
            else:
                ax.errorbar(budgets, y, sd, color=shade, marker="o", ms=4, capsize=3, label=method)
        ax.set(title=test_set, xlabel="synthetic budget (× N real)", ylabel="DSC (%)", xticks=budgets)
        ax.legend()
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def histogram_figure(run: Run) -> str:
    """Draw the adversariality of single samples: a panel per seed, all methods overlaid."""
    cap, seeds = run.cap(), run.experiment["seeds"]
    values = {name: [v for v in one["values"] if finite(v) is not None] for name, one in run.sets.items()}
    rewards = ", ".join(dict.fromkeys(one["reward"] for one in run.sets.values()))
    edges = np.histogram_bin_edges([v for one in values.values() for v in one], bins=36).tolist()
    lines = math.ceil(len(seeds) / 3)
    figure = _figure(2.6 * lines + 0.4)
    panels = figure.subplots(lines, min(3, len(seeds)), squeeze=False, sharex=True, sharey=True).flatten()
    for ax, seed in zip(panels, seeds, strict=False):
        for method in run.methods:
            found = values[method, seed]
            shade, weights = colour(method, run.arms), np.full(len(found), 100 / max(1, len(found)))
            ax.hist(found, edges, weights=weights, color=shade, alpha=0.22, histtype="stepfilled")
            ax.hist(found, edges, weights=weights, color=shade, histtype="step", lw=1.6, label=method)
            if found:
                ax.axvline(float(np.mean(found)), color=shade, lw=1.2, ls=(0, (1, 1.2)))
        if cap is not None:
            ax.axvline(cap, color=INK, lw=1.2, ls=(0, (4, 2)), label=f"cap κ = {cap:g}")
        ax.set(title=f"seed {seed}", xlabel=f"adversariality ({rewards})", ylabel="share of images (%)")
        ax.label_outer()
        ax.grid(axis="x", visible=False)
    for ax in panels[len(seeds) :]:
        ax.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return _svg(figure)


@matplotlib.rc_context(STYLE)
def curve_figures(run: Run) -> dict[str, str]:
    """Draw the curves of every stage: a panel per scalar, a colour per arm, a line per seed."""
    only = (
        tuple(f"/{name}" for name in run.classes) if len(run.classes) == 1 else ()
    )  # says what the mean says
    curves = [c for c in run.curves() if not c.tag.endswith(only)]
    return {
        stage: _stage_figure([c for c in curves if c.stage == stage], run)
        for stage in dict.fromkeys(c.stage for c in curves)
    }


def _stage_figure(curves: Sequence[Curve], run: Run) -> str:
    tags = sorted({c.tag for c in curves})
    lines = math.ceil(len(tags) / 3)
    figure = _figure(2.15 * lines + 0.3)
    panels = figure.subplots(lines, 3, squeeze=False).flatten()
    seeds = list(dict.fromkeys(c.seed for c in curves))
    handles = {}
    for ax, tag in zip(panels, tags, strict=False):
        for curve in (c for c in curves if c.tag == tag):
            (handles[curve.arm, curve.seed],) = ax.plot(
                curve.steps,
                curve.values,
                color=colour(curve.arm, run.arms),
                ls=SEED_DASHES[seeds.index(curve.seed) % len(SEED_DASHES)],
                lw=1.1,
                marker="o" if len(curve.steps) < 5 else "",
                ms=3,
            )
        ax.set(title=tag, xlabel="step")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for ax in panels[len(tags) :]:
        ax.set_axis_off()
    if len(handles) > 1:
        order = [REAL, *run.arms]
        keys = sorted(handles, key=lambda key: order.index(key[0]))
        names = [f"{arm}, seed {seed}" for arm, seed in keys]
        figure.legend(
            [handles[k] for k in keys], names, loc="outside upper left", ncols=6, fontsize=8, handlelength=2.6
        )
    return _svg(figure)


def _figure(height: float) -> Figure:
    """Return an empty figure in the style of the page; the height is in inches."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the reader may have these fonts
    return Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09))


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
