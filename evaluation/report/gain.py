"""Whether the first-order gain of a synthetic set foretells what retraining on it brings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.report.collect import REAL, Run
from evaluation.report.labels import CROWD, label_points
from evaluation.report.statistics import Correlation, Spread, paired_differences, spearman, spread
from evaluation.report.style import SOFT, colour, marker, new_figure, styled, to_svg
from evaluation.report.tables import Table, mean_sd

MILLI = 1000
"""Gains are shown times this."""


@dataclass(frozen=True)
class Gain:
    """What a step on the synthetic sets of a method promises, and what retraining on them brought.

    Attributes:
        method: its name.
        norm: ‖g_syn‖ of the mean gradient over a set, in the whole network.
        cosine: cos ζ of that gradient to that of real images.
        whole: first-order gain γ⟨g_syn, g_real⟩ of the whole network, in units of the loss.
        last: that of the output layer.
        retrained: by test set, ΔDSC to ``real`` in points at the largest budget, paired by seed; nothing
            where the set is larger or smaller than that.
    """

    method: str
    norm: Spread
    cosine: Spread
    whole: Spread
    last: Spread
    retrained: dict[str, Spread]


def gains(run: Run) -> list[Gain]:
    """Return the gains of every method that has any, over seeds."""
    if not run.gains:
        return []
    budget = max(run.experiment["budgets"])  # that of the set
    retrained: dict[str, dict[str, Spread]] = {}
    for d in paired_differences(run.rows, REAL):
        if d.budget == budget == max(run.budgets_of(d.method)):
            retrained.setdefault(d.method, {})[d.test_set] = d.dsc

    def over_seeds(method: str, part: str, key: str) -> Spread:
        return spread(one[part]["set"][key] for (name, _), one in run.gains.items() if name == method)

    return [
        Gain(
            method,
            over_seeds(method, "all", "norm_syn"),
            over_seeds(method, "all", "cosine"),
            over_seeds(method, "all", "gain"),
            over_seeds(method, "last", "gain"),
            retrained.get(method, {}),
        )
        for method in run.methods
        if any(name == method for name, _ in run.gains)
    ]


def correlation(found: Sequence[Gain], test_set: str) -> Correlation:
    """Return Spearman's ρ between first-order gain and ΔDSC on a test set, over at least three methods."""
    pairs = [(g.whole.mean, g.retrained[test_set].mean) for g in found if test_set in g.retrained]
    return spearman(pairs)


def gain_table(run: Run) -> Table | None:
    """Return the gain of every method, mean ± standard deviation over seeds; None without any."""
    found = gains(run)
    if not found:
        return None
    tests = list(dict.fromkeys(test_set for g in found for test_set in g.retrained))
    budget = max(run.experiment["budgets"])  # that of the set
    return Table(
        (
            *("Method", "‖g_syn‖", "cos ζ", "gain, all ×10³", "gain, last ×10³"),
            *(f"ΔDSC {test_set}, {budget:g}×" for test_set in tests),
        ),
        [
            (
                g.method,
                mean_sd(g.norm, 3),
                mean_sd(g.cosine, 3, signed=True),
                mean_sd(_scaled(g.whole), 3, signed=True),
                mean_sd(_scaled(g.last), 3, signed=True),
                *(mean_sd(g.retrained.get(t, spread([])), signed=True) for t in tests),
            )
            for g in found
        ],
        [g.method for g in found],
        _note(run),
        left=1,
    )


@styled
def gain_figure(run: Run) -> str | None:
    """Draw ΔDSC of retraining against first-order gain: a panel per test set, a point per method."""
    found = gains(run)
    tests = list(dict.fromkeys(test_set for g in found for test_set in g.retrained))
    if not tests:
        return None
    across = 1 if len(found) > CROWD else min(2, len(tests))
    lines = math.ceil(len(tests) / across)
    figure = new_figure(3.9 * lines)
    panels = figure.subplots(lines, across, squeeze=False).flatten()
    drawn = []
    for ax, test_set in zip(panels, tests, strict=False):
        here = [g for g in found if test_set in g.retrained and math.isfinite(g.whole.mean)]
        here = [g for g in here if math.isfinite(g.retrained[test_set].mean)]
        x, y = [MILLI * g.whole.mean for g in here], [g.retrained[test_set].mean for g in here]
        for g, px, py in zip(here, x, y, strict=True):
            shade = colour(g.method, run.arms)
            bars = np.nan_to_num([MILLI * g.whole.sd, g.retrained[test_set].sd])
            ax.errorbar(px, py, bars[1], bars[0], color=shade, lw=0, elinewidth=0.7, alpha=0.45, zorder=2)
            ax.plot(px, py, color=shade, marker=marker(g.method, run.arms), ms=5, lw=0, zorder=3)
        ax.axhline(0, color=SOFT, lw=1, ls=(0, (4, 2)), zorder=1)
        rho, n = correlation(found, test_set)
        shown = f"{rho:+.2f}".replace("-", "−") if math.isfinite(rho) else "–"
        ax.set(
            title=f"{test_set}: Spearman’s ρ = {shown} ({n} methods)",
            xlabel="first-order gain of the set, × 10³",
            ylabel="ΔDSC to real (points)",
        )
        ax.margins(0.08)
        drawn.append((ax, [g.method for g in here], x, y))
    for ax in panels[len(tests) :]:
        ax.set_axis_off()
    figure.draw_without_rendering()
    for one in drawn:
        label_points(*one)
    return to_svg(figure)


def _scaled(value: Spread) -> Spread:
    return Spread(value.n, *(MILLI * number for number in value[1:]))


def _note(run: Run) -> str:
    """Return how the gains were measured, where that is the same for all."""
    heads = {"loss": "loss", "gamma": "γ", "split": "real images", "n": "synthetic images per seed"}
    values = {
        head: dict.fromkeys(str(one[key]) for one in run.gains.values() if key in one)
        for key, head in heads.items()
    }
    return " · ".join(f"{head}: {', '.join(found)}" for head, found in values.items() if found)
