"""Rank correlation where only some of the values are ever compared."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import spearmanr

LEAST = 3
"""Fewest values of a group that are ranked."""


def spearman_within(foretold: Sequence[float], found: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return Spearman's ρ inside of each group, averaged over the groups.

    Who chooses among the draws of one mask compares no others. Over draws of all masks ρ is also high for
    what knows no more than which masks are hard.

    Args:
        foretold: the predictions.
        found: what came out.
        groups: which group each belongs to, such as its mask.

    Returns:
        The mean of ρ over groups of at least three in which neither is constant; NaN where there is none.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    correlations = []
    for rows in members.values():
        x, y = np.asarray(foretold)[rows], np.asarray(found)[rows]
        if len(rows) >= LEAST and np.ptp(x) > 0 and np.ptp(y) > 0:
            correlations.append(float(spearmanr(x, y).statistic))
    return float(np.mean(correlations)) if correlations else math.nan
