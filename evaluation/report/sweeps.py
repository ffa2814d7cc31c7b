"""Plots of methods that differ in one number: what it does to scores and to the synthetic sets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from evaluation.report.collect import REAL, Run
from evaluation.report.statistics import Spread, set_spread, spread, summarise
from evaluation.report.style import INK, colour, new_figure, styled, to_svg

SET_PANELS = {
    "adversariality": ("adversariality", "mean reward"),
    "kl": ("KL to the prior", "nats"),
    "fid": ("FID", "FID"),
    "mask_fidelity": ("mask fidelity", "DSC (%)"),
}
"""Figures of a synthetic set that are drawn along a sweep: title and unit."""

LOG_RATIO = 20
"""From this ratio of the largest to the smallest number above 0 on, the axis is logarithmic."""

FAR_OUT = 100
"""KL divergences up to more nats than that have a logarithmic axis, which goes on to base's 0."""

DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.2))


@dataclass(frozen=True)
class Panel:
    """A score or figure along a sweep.

    Attributes:
        title: what it is.
        unit: its unit.
        lines: by name, over seeds, at each number of the sweep.
        levels: that of ``real`` and of ``base``, where there is one.
    """

    title: str
    unit: str
    lines: dict[str, list[Spread]]
    levels: dict[str, float]


def sweep_panels(run: Run, label: str) -> list[Panel]:
    """Return DSC on every test set and the figures of the sets, at each number of a sweep, in its order.

    A line for every budget that the methods have, τ subsets one of their own; ``base`` is that of the
    experiment's smallest budget. Figures that no method has are left out.
    """
    methods, least = [method for _, method in run.sweeps[label]], min(run.experiment["budgets"])
    unknown = spread([])
    summaries = {(s.test_set, s.method, s.budget): s.dsc for s in summarise(run.rows)}
    budgets = sorted({budget for _, method, budget in summaries if method in methods})
    panels = []
    for test_set in dict.fromkeys(test_set for test_set, _, _ in summaries):
        lines = {
            f"budget {b:g}×" if len(budgets) > 1 else "mean ± SD": [
                summaries.get((test_set, m, b), unknown) for m in methods
            ]
            for b in budgets
        }
        levels = {arm: summaries.get((test_set, arm, b), unknown) for arm, b in ((REAL, 0), ("base", least))}
        panels.append(Panel(f"{test_set}: DSC", "DSC (%)", lines, _known(levels)))
    for key, (title, unit) in SET_PANELS.items():
        line = [set_spread(run, method, key) for method in methods]
        if any(value.n for value in line):
            panels.append(Panel(title, unit, {title: line}, _known({"base": set_spread(run, "base", key)})))
    return panels


def _known(levels: dict[str, Spread]) -> dict[str, float]:
    return {arm: level.mean for arm, level in levels.items() if level.n}


def places_of(numbers: Sequence[float]) -> list[float]:
    """Return where the numbers of a sweep, in ascending order, stand on their axis.

    That is at themselves, or at their logarithms, 0 then a mean step below the next one.
    """
    above = [x for x in numbers if x > 0]
    if len(above) < len(numbers) - (numbers[0] == 0) or not above or above[-1] / above[0] < LOG_RATIO:
        return [float(x) for x in numbers]
    places = [math.log(x) for x in above]
    return places if numbers[0] else [places[0] - (places[-1] - places[0]) / (len(places) - 1), *places]


@styled
def sweep_figures(run: Run) -> dict[str, str]:
    """Draw :func:`sweep_panels` of every sweep, by its name."""
    return {label: _sweep_figure(run, label) for label, points in run.sweeps.items() if points}


def _sweep_figure(run: Run, label: str) -> str:
    panels, numbers = sweep_panels(run, label), [x for x, _ in run.sweeps[label]]
    lines = math.ceil(len(panels) / 3)
    figure = new_figure(2.4 * lines + 0.3)
    grid = figure.subplots(lines, 3, squeeze=False).flatten()
    for ax, panel in zip(grid, panels, strict=False):
        _draw(ax, panel, numbers, run.arms)
        ax.set(title=panel.title, xlabel=label, ylabel=panel.unit)
    for ax in grid[len(panels) :]:
        ax.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=8)
    return to_svg(figure)


def _draw(ax: Axes, panel: Panel, numbers: Sequence[float], arms: Sequence[str]) -> None:
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.8, len(panel.lines)))
    places = places_of(numbers)
    for (name, line), shade in zip(panel.lines.items(), shades, strict=True):
        means, sd = [value.mean for value in line], np.nan_to_num([value.sd for value in line])
        ax.errorbar(
            places,
            means,
            sd,
            color=shade if len(panel.lines) > 1 else INK,
            marker="o",
            ms=4,
            capsize=3,
            label=name,
        )
    for arm, level in panel.levels.items():
        ax.axhline(level, color=colour(arm, arms), lw=1.3, ls=DASHED if arm == REAL else DOTTED, label=arm)
    if panel.unit == "nats" and ax.get_ylim()[1] > FAR_OUT:
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=0)
    ticks = _apart(places)
    ax.set_xticks([places[i] for i in ticks], [f"{numbers[i]:g}" for i in ticks])


def _apart(places: Sequence[float]) -> list[int]:
    """Return which numbers have names that do not run into the one before; the last one always."""
    least = 0.11 * (places[-1] - places[0])
    kept = [len(places) - 1]
    for i in reversed(range(len(places) - 1)):
        if places[kept[-1]] - places[i] >= least > 0:
            kept.append(i)
    return kept[::-1]
