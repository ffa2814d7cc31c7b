"""The plots of scores and of training, as data URIs of SVG pictures."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evaluation.report.collect import REAL, Curve, Row, Run, arm_name
from evaluation.report.statistics import spread, summarise
from evaluation.report.style import DASHES, INK, RULE, SOFT, colour, marker, new_figure, rank, styled, to_svg
from files import finite

FEW = 6
"""Most methods that are drawn over each other, or named inside the axes."""

NAMES = 56
"""Most characters of the names of arms side by side, each as long as the longest."""

LANES = 60
"""Beyond as many arms, one below the other, they stand closer and the scale is repeated on top."""


def has_lanes(run: Run) -> bool:
    """Return whether the arms stand one below the other in :func:`scores_figure`.

    They do with many methods, and where their names do not fit side by side.
    """
    names = [part for arm, _ in run.tests for part in arm_name(arm.method, arm.budget).split(" ")]
    arms = {(arm.method, arm.budget) for arm, _ in run.tests}
    return run.many or len(arms) * max(map(len, names)) > NAMES


@styled
def scores_figure(run: Run) -> str:
    """Draw DSC and ASD of every arm: a point per seed, same seeds joined, the mean as a bar.

    Where the arms stand one below the other (:func:`has_lanes`), a dashed line takes the place of the joins:
    the mean of ``real``.
    """
    rows, lanes = run.rows, has_lanes(run)
    test_sets = list(dict.fromkeys(r.test_set for r in rows))
    scores = [(test_set, metric) for test_set in test_sets for metric in ("dsc", "asd")]
    across = 2
    if lanes and len(test_sets) > 2:
        scores, across = sorted(scores, key=lambda score: score[1] == "asd"), min(4, len(test_sets))
    elif lanes:
        across = len(scores)
    arms = list(dict.fromkeys((r.method, r.budget) for r in rows))
    lines = math.ceil(len(scores) / across)
    height = 0.9 + (0.16 if len(arms) <= LANES else 0.12) * len(arms) if lanes else 2.7
    figure = new_figure(lines * height)
    panels = figure.subplots(lines, across, squeeze=False, sharey=lanes).flatten()
    for ax, (test_set, metric) in zip(panels, scores, strict=False):
        here = [r for r in rows if r.test_set == test_set]
        label = "DSC (%)" if metric == "dsc" else f"ASD ({run.asd_unit})"
        (_lanes if lanes else _strip)(ax, here, metric, run.arms)
        ax.set(title=f"{test_set}: {metric.upper()}", **{"xlabel" if lanes else "ylabel": label})
    for ax in panels[len(scores) :]:
        ax.set_axis_off()
    return to_svg(figure)


def _strip(ax: Axes, rows: Sequence[Row], metric: str, methods: Sequence[str]) -> None:
    """Draw one score of every arm on one test set, the arms side by side."""
    arms, colours, scores, means = _scores(rows, metric, methods)
    places = range(len(arms))
    for heights in scores:
        ax.plot(places, heights, color=RULE, lw=1, zorder=1)
        ax.scatter(places, heights, s=26, c=colours, zorder=3, lw=0)
    ax.hlines(means, np.array(places) - 0.22, np.array(places) + 0.22, colors=colours, lw=2.2, zorder=2)
    ax.set_xticks(places, [arm_name(*arm).replace(" ", "\n") for arm in arms])
    ax.set_xlim(-0.5, len(arms) - 0.5)
    ax.grid(axis="x", visible=False)


def _lanes(ax: Axes, rows: Sequence[Row], metric: str, methods: Sequence[str]) -> None:
    """Draw one score of every arm on one test set, the arms one below the other."""
    arms, colours, scores, means = _scores(rows, metric, methods)
    places = range(len(arms))
    for widths in scores:
        ax.scatter(widths, places, s=9, c=colours, zorder=3, lw=0)
    ax.vlines(means, np.array(places) - 0.36, np.array(places) + 0.36, colors=colours, lw=2, zorder=2)
    reference = [mean for mean, (method, _) in zip(means, arms, strict=True) if method == REAL]
    if reference and math.isfinite(reference[0]):
        ax.axvline(reference[0], color=SOFT, lw=1, ls=(0, (4, 2)), zorder=1)
    ax.set_yticks(places, [arm_name(*arm) for arm in arms], fontsize=8 if len(arms) <= LANES else 6.5)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params("y", length=0)
    ax.tick_params("x", labeltop=len(arms) > LANES)


def _scores(
    rows: Sequence[Row], metric: str, methods: Sequence[str]
) -> tuple[list[tuple[str, float]], list[str], list[np.ndarray], list[float]]:
    """Return the arms, their colours, a score of each by seed, and its mean over seeds."""
    arms = list(dict.fromkeys((r.method, r.budget) for r in rows))
    found = {(r.method, r.budget, r.seed): getattr(r, metric) for r in rows}
    scores = [
        np.array([found.get((*arm, seed)) for arm in arms], dtype=float)
        for seed in dict.fromkeys(r.seed for r in rows)
    ]
    means = [spread(column).mean for column in np.transpose(scores)]
    return arms, [colour(method, methods) for method, _ in arms], scores, means


@styled
def budget_figure(run: Run) -> str | None:
    """Draw DSC against the synthetic budget, mean ± standard deviation; None for a single budget.

    With more than :data:`FEW` methods the deviations are left out.
    """
    budgets = sorted({arm.budget for arm, _ in run.tests if arm.budget})
    if len(budgets) < 2:
        return None
    summaries = summarise(run.rows)
    test_sets = list(dict.fromkeys(s.test_set for s in summaries))
    many = len(run.methods) > FEW
    figure = new_figure(max(2.9, 0.8 + 0.17 * len(run.methods)))
    panels = figure.subplots(1, len(test_sets), squeeze=False)[0]
    for ax, test_set in zip(panels, test_sets, strict=True):
        for method in (REAL, *run.methods):
            points = [s for s in summaries if (s.test_set, s.method) == (test_set, method)]
            points.sort(key=lambda s: s.budget)
            shade = colour(method, run.arms)
            y, sd = [s.dsc.mean for s in points], np.nan_to_num([s.dsc.sd for s in points])
            if method == REAL:
                ax.axhline(y[0], color=shade, lw=1.5, ls=(0, (4, 2)), label=method)
            else:
                mark, dash = marker(method, run.arms), DASHES[rank(method, run.arms) % len(DASHES)]
                ax.errorbar(
                    [s.budget for s in points],
                    y,
                    None if many else sd,
                    color=shade,
                    marker=mark,
                    ls=dash,
                    ms=4,
                    capsize=3,
                    label=method,
                )
        ax.set(title=test_set, xlabel="synthetic budget (× N real)", ylabel="DSC (%)", xticks=budgets)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return to_svg(figure)


def histogram_methods(run: Run) -> list[str]:
    """Return the methods whose histograms are drawn: with more than :data:`FEW`, the yardsticks and ours."""
    if len(run.methods) <= FEW:
        return run.methods
    return [m for m in run.methods if m in ("base", run.mined) or m.startswith("best_of_")]


@styled
def histogram_figure(run: Run) -> str:
    """Draw the adversariality of single samples: a panel per seed, :func:`histogram_methods` overlaid."""
    cap, seeds, methods = run.cap(), run.experiment["seeds"], histogram_methods(run)
    values = {name: [v for v in one["values"] if finite(v) is not None] for name, one in run.sets.items()}
    rewards = ", ".join(dict.fromkeys(one["reward"] for one in run.sets.values()))
    drawn = [v for (method, _), one in values.items() if method in methods for v in one]
    edges = np.histogram_bin_edges(drawn, bins=36).tolist()
    lines = math.ceil(len(seeds) / 3)
    figure = new_figure(2.6 * lines + 0.4)
    panels = figure.subplots(lines, min(3, len(seeds)), squeeze=False, sharex=True, sharey=True).flatten()
    for place, (ax, seed) in enumerate(zip(panels, seeds, strict=False)):
        for method in methods:
            found = values[method, seed]
            shade, weights = colour(method, run.arms), np.full(len(found), 100 / max(1, len(found)))
            ax.hist(found, edges, weights=weights, color=shade, alpha=0.22, histtype="stepfilled")
            ax.hist(found, edges, weights=weights, color=shade, histtype="step", lw=1.6, label=method)
            if found:
                ax.axvline(float(np.mean(found)), color=shade, lw=1.2, ls=(0, (1, 1.2)))
        if cap is not None:
            ax.axvline(cap, color=INK, lw=1.2, ls=(0, (4, 2)), label=f"cap κ = {cap:g}")
        ax.set(title=f"seed {seed}", ylabel="share of images (%)")
        ax.label_outer()
        if place + 3 >= len(seeds):
            ax.set_xlabel(f"adversariality ({rewards})")
            ax.tick_params("x", labelbottom=True)
        ax.grid(axis="x", visible=False)
    for ax in panels[len(seeds) :]:
        ax.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return to_svg(figure)


@styled
def curve_figures(run: Run) -> dict[str, str]:
    """Draw the curves of every stage: a panel per scalar, a colour per arm, a dash per seed.

    Where there is one seed, the dashes tell apart the arms of the same colour.
    """
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
    arms = sorted(
        {c.arm for c in curves}, key=[*dict.fromkeys(("backbone", "reference", REAL, *run.arms))].index
    )
    seeds = list(dict.fromkeys(c.seed for c in curves))
    dash = {
        (arm, seed): DASHES[(rank(arm, run.arms) if len(seeds) == 1 else i) % len(DASHES)]
        for arm in arms
        for i, seed in enumerate(seeds)
    }
    lines = math.ceil(len(tags) / 3)
    figure = new_figure(2.15 * lines + 0.3 + 0.16 * (len(arms) // 5))
    panels = figure.subplots(lines, 3, squeeze=False).flatten()
    for ax, tag in zip(panels, tags, strict=False):
        for curve in (c for c in curves if c.tag == tag):
            ax.plot(
                curve.steps,
                curve.values,
                color=colour(curve.arm, run.arms),
                ls=dash[curve.arm, curve.seed],
                lw=1.1,
                marker="o" if len(curve.steps) < 5 else "",
                ms=3,
            )
        ax.set(title=tag, xlabel="step")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    for ax in panels[len(tags) :]:
        ax.set_axis_off()
    keys = [
        Line2D([], [], color=colour(arm, run.arms), ls=dash[arm, seeds[0]], label=arm)
        for arm in arms
        if len(arms) > 1
    ]
    keys += [
        Line2D([], [], color=SOFT, ls=dash[arms[0], seed], label=f"seed {seed}")
        for seed in seeds
        if len(seeds) > 1
    ]
    if keys:
        figure.legend(handles=keys, loc="outside upper left", ncols=6, fontsize=8, handlelength=2.6)
    return to_svg(figure)
