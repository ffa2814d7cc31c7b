"""A map of features: where the images of each method lie among the real ones."""

import math

import numpy as np

from errors import InputError
from evaluation.report.collect import REAL, Run
from evaluation.report.inputs import evenly
from evaluation.report.style import colour, new_figure, styled, to_svg

MOST = 400
"""Most images of a method, and most real ones, on the map; spread evenly over the set."""

LEAST = 4
"""Fewest images for a map."""

PERPLEXITY = 30


def sampled_features(run: Run) -> dict[str, np.ndarray]:
    """Return features (n, D) of real images and of the methods to show, of the first seed; empty if none.

    Raises:
        InputError: a file of features is unusable, or they are not all of one extractor.
    """
    read = {m: run.features(m) for m in run.experiment.get("embedding") or ()}
    found = {method: pair for method, pair in read.items() if pair is not None}
    if not found:
        return {}
    real, _ = next(iter(found.values()))
    groups = {REAL: real, **{method: synthetic for method, (_, synthetic) in found.items()}}
    widths = {method: one.shape[1] for method, one in groups.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"embedding: the features differ in length ({widths}); save those of one extractor")
    return {method: one[evenly(range(len(one)), MOST)] for method, one in groups.items() if len(one)}


def tsne(groups: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return places (n, 2) of features (n, D) on one map of all groups, by t-SNE.

    The map keeps neighbours together; distances between clusters mean little.
    """
    from sklearn.manifold import TSNE  # takes longer to load than all else, and most runs have no features

    features = np.concatenate(list(groups.values()))
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    places = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(features)
    ends = np.cumsum([len(one) for one in groups.values()])
    return dict(zip(groups, np.split(places, ends[:-1]), strict=True))


@styled
def embedding_figure(run: Run) -> str | None:
    """Draw the map, a panel per method with the real images in grey; None without features to draw.

    Raises:
        InputError: see :func:`sampled_features`.
    """
    groups = sampled_features(run)
    methods = [method for method in groups if method != REAL]
    if REAL not in groups or not methods or groups[REAL].shape[1] < 2:
        return None
    if sum(map(len, groups.values())) < LEAST:
        return None
    places = tsne(groups)
    lines = math.ceil(len(methods) / 4)
    across = math.ceil(len(methods) / lines)
    figure = new_figure(9.0 / max(3, across) * lines + 0.2)
    panels = figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).flatten()
    for ax, method in zip(panels, methods, strict=False):
        for name, size in ((REAL, 5), (method, 7)):
            shade = "#c3cbd1" if name == REAL else colour(name, run.arms)
            ax.scatter(*places[name].T, s=size, color=shade, lw=0, rasterized=True)
        ax.set(title=method, xticks=[], yticks=[], aspect="equal")
        ax.spines[["top", "right"]].set_visible(True)
        ax.grid(visible=False)
    for ax in panels[len(methods) :]:
        ax.set_axis_off()
    return to_svg(figure)
