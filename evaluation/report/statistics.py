"""Means, deviations and paired differences over seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import stats

from evaluation.report.collect import REAL, Row, Run

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Fewest seeds for which an interval is given."""

REFERENCES = (REAL, "base")
YARDSTICK = "best_of_4"
"""Arms that the others are compared with."""


class Spread(NamedTuple):
    """Mean, sample standard deviation and t interval of the mean over ``n`` seeds; NaN where undefined."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


class Correlation(NamedTuple):
    """Spearman's ρ over ``n`` methods, NaN where undefined."""

    rho: float
    n: int


@dataclass(frozen=True)
class Summary:
    """Scores of one arm on one test set, or their paired difference to a reference, over seeds."""

    test_set: str
    method: str
    budget: float
    n_real: int
    n_synthetic: int
    dsc: Spread
    asd: Spread


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean, standard deviation (n − 1) and 95 % t interval of the values that are defined.

    The mean needs one value, the standard deviation two, the interval :data:`MIN_SEEDS`.
    """
    x = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=float)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    sd = float(x.std(ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * sd / math.sqrt(n) if n >= MIN_SEEDS else math.nan
    return Spread(n, mean, sd, mean - half, mean + half)


def spearman(pairs: Iterable[tuple[float, float]]) -> Correlation:
    """Return Spearman's ρ over the pairs that are defined, at least three."""
    x, y = np.array([pair for pair in pairs if np.isfinite(pair).all()]).reshape(-1, 2).T
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, len(x))
    return Correlation(float(stats.spearmanr(x, y).statistic), len(x))


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Return DSC and ASD of every arm on every test set, over its seeds, in the order of the rows."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.test_set, row.method, row.budget), []).append(row)
    return [
        Summary(*arm, r[0].n_real, r[0].n_synthetic, spread(x.dsc for x in r), spread(x.asd for x in r))
        for arm, r in groups.items()
    ]


def paired_differences(rows: Sequence[Row], reference: str, budget: float | None = None) -> list[Summary]:
    """Return arm − reference per seed, over seeds, for every other arm and test set.

    Both arms of a difference have the same seed. Seeds in which either is undefined do not count; an arm
    whose reference has no such budget is left out.

    Args:
        rows: of one experiment.
        reference: the method that others are compared with.
        budget: at which budget of it; None for that of each arm. ``real`` has none, which is 0.
    """
    budget = 0 if reference == REAL else budget
    by_arm = {(r.test_set, r.method, r.budget, r.seed): r for r in rows}
    references = {(r.test_set, r.budget) for r in rows if r.method == reference}
    differences = []
    for row in rows:
        at = row.budget if budget is None else budget
        if (row.method, row.budget) == (reference, at) or (row.test_set, at) not in references:
            continue
        other = by_arm.get((row.test_set, reference, at, row.seed))
        dsc, asd = (_minus(row.dsc, other.dsc), _minus(row.asd, other.asd)) if other else (None, None)
        differences.append(replace(row, dsc=dsc, asd=asd))
    return summarise(differences)


def set_spread(run: Run, method: str, key: str) -> Spread:
    """Return a figure of the synthetic sets of a method, over seeds; undefined where none has it."""
    return spread(one.get(key) for (name, _), one in run.sets.items() if name == method)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
