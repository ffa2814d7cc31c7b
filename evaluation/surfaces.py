"""Overlap and surface distances of two masks, in 2-D or 3-D and with any spacing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from evaluation.protocols import OVERLAPS, Protocol

Mask = NDArray[np.bool_]
Maps = NDArray[np.integer]
Floats = NDArray[np.float64]


def score_case(
    prediction: Maps, target: Maps, classes: int, spacing: Sequence[float], protocol: Protocol
) -> Floats:
    """Score every foreground class of one case.

    Args:
        prediction: class map ``(H, W)`` or ``(D, H, W)``, integer labels.
        target: reference class map of that shape.
        classes: number of classes K, the background (label 0) among them.
        spacing: size of an element along each axis.
        protocol: what is measured, and how.

    Returns:
        float64 ``(K − 1, M)`` for the M measures of the protocol, overlaps in percent and distances in the
        unit of the spacing; NaN where a class is not scored.
    """
    boxes = [find_objects(maps, classes - 1) for maps in (prediction, target)]
    scores = np.empty((classes - 1, len(protocol.measures)))
    diagonal = float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    for k, (box_p, box_g) in enumerate(zip(*boxes, strict=True), start=1):
        if box_p is None or box_g is None:
            scores[k - 1] = empty_scores(box_p is not None, box_g is not None, diagonal, protocol)
        else:
            box = tuple(_hull(p, g) for p, g in zip(box_p, box_g, strict=True))
            scores[k - 1] = mask_scores(prediction[box] == k, target[box] == k, spacing, protocol)
    return scores


def empty_scores(predicted: bool, present: bool, diagonal: float, protocol: Protocol) -> list[float]:
    """Return the measures of a class that one mask or both lack.

    Args:
        predicted: whether the prediction holds the class.
        present: whether the reference holds the class.
        diagonal: that of the field of view.
        protocol: which measures, and its rule.
    """
    rule = protocol.empty(predicted, present)
    distance = diagonal if rule.distance == "diagonal" else rule.distance
    values = [rule.overlap if measure in OVERLAPS else distance for measure in protocol.measures]
    return [np.nan if value is None else float(value) for value in values]


def mask_scores(prediction: Mask, target: Mask, spacing: Sequence[float], protocol: Protocol) -> list[float]:
    """Return the measures of two masks, neither of them empty, in the order of the protocol.

    Cropping both to a common box does not change them.

    Args:
        prediction: boolean ``(H, W)`` or ``(D, H, W)``.
        target: boolean reference of that shape.
        spacing: size of an element along each axis.
        protocol: what is measured, and how.
    """
    overlap, total = np.count_nonzero(prediction & target), np.count_nonzero(prediction)
    scores: dict[str, float] = {"dsc": 100 * 2 * overlap / (total + np.count_nonzero(target))}
    if protocol.measures != ("dsc",):
        forth, back = surface_distances(prediction, target, spacing)
        both = np.concatenate([forth, back])
        asd = {"half": 0.5 * (forth.mean() + back.mean()), "forward": forth.mean(), "pooled": both.mean()}
        scores |= {"asd": asd[protocol.asd], "assd": asd["pooled"], "hd": both.max()}
        if "hd95" in protocol.measures:
            parts = [both] if protocol.hd95 == "pooled" else [forth, back]
            scores["hd95"] = max(float(np.percentile(distances, 95)) for distances in parts)
        if protocol.tolerance is not None:
            # 2 mm are 2 mm wherever the object lies, whatever is left of them by rounding.
            scores["nsd"] = 100 * float(np.mean(both <= protocol.tolerance * (1 + 1e-6)))
    return [float(scores[measure]) for measure in protocol.measures]


def surface_distances(prediction: Mask, target: Mask, spacing: Sequence[float]) -> tuple[Floats, Floats]:
    """Return the distance of every surface element of each mask to the nearest one of the other.

    Args:
        prediction: boolean mask P of any number of dimensions, not empty.
        target: boolean mask G of that shape, not empty.
        spacing: size of an element along each axis.

    Returns:
        float64 distances P→G and G→P, one for each surface element.
    """
    surface_p, surface_g = surface(prediction), surface(target)
    return _nearest(surface_p, surface_g, spacing), _nearest(surface_g, surface_p, spacing)


def surface(mask: Mask) -> Mask:
    """Return the elements of a mask that have a face neighbour outside it; the border counts as outside."""
    inside = mask.copy()
    for axis in range(mask.ndim):
        kept, whole = np.moveaxis(inside, axis, 0), np.moveaxis(mask, axis, 0)
        kept[1:] &= whole[:-1]
        kept[:-1] &= whole[1:]
        kept[0] = kept[-1] = False
    return mask & ~inside


def _nearest(start: Mask, end: Mask, spacing: Sequence[float]) -> Floats:
    """Return the distance of every element of ``start`` to the nearest of ``end``, 0 for those in both."""
    apart = ~end[start]
    distances = np.zeros(len(apart))
    if apart.any():
        points = np.argwhere(start)[apart] * spacing
        distances[apart] = KDTree(np.argwhere(end) * spacing).query(points)[0]
    return distances


def _hull(a: slice, b: slice) -> slice:
    """Return the shortest slice that holds both."""
    return slice(min(a.start, b.start), max(a.stop, b.stop))
