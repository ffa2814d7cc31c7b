"""DSC and ASD of every case and class, with the protocol that the numbers follow."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import binary_erosion, generate_binary_structure
from scipy.spatial import KDTree
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

PROTOCOL = {
    "unit": "one case is one 2-D slice",
    "classes": "foreground only; a class absent from prediction and reference is not scored in that case",
    "dsc": "2|P∩G| / (|P| + |G|), in percent",
    "asd": "½ (mean distance P→G + mean distance G→P) over surface pixels",
    "surface": "mask pixels with a 4-neighbour outside the mask; the image border counts as outside",
    "one side empty": "DSC 0, ASD = diagonal of the field of view",
    "mean": "mean over classes of the mean over the cases in which the class is scored",
}
"""How :class:`SegmentationScore` counts; goes wherever its figures go."""

_SURFACE_ELEMENT = generate_binary_structure(2, 1)[None]  # 4-neighbours, within each slice of a stack


class SegmentationScore(Metric):
    """Dice similarity coefficient (DSC) and average surface distance (ASD) per case and class.

    Follows :data:`PROTOCOL`. The mean is taken over classes, of the mean over the cases in which the
    class is scored: a rare class weighs as much as a frequent one. A case id seen again, as under a
    sampler that pads the last batch, counts once. Exact under DDP: the states are gathered case by case,
    never averaged per process.

    Args:
        class_names: names of the classes by label, the background (label 0, never scored) first.
        spacing: height and width of a pixel, in the unit that ASD shall have; ``None`` counts in pixels.

    Raises:
        ValueError: there is no foreground class, or the spacing is not two positive numbers.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    records: list[Tensor]

    def __init__(self, class_names: Sequence[str], spacing: Sequence[float] | None = None) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError("class_names needs the background and at least one foreground class")
        if spacing is not None and (len(spacing) != 2 or min(spacing) <= 0):
            raise ValueError(f"spacing needs two positive numbers (height, width), not {spacing}")
        self.class_names = tuple(class_names)
        self.spacing = None if spacing is None else (float(spacing[0]), float(spacing[1]))
        # One flat state, so that a process without any case gathers with the others: per case its id
        # (exact below 2^24), then DSC and ASD of every foreground class.
        self.add_state("records", default=[], dist_reduce_fx="cat")

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of the scored classes."""
        return self.class_names[1:]

    @property
    def protocol(self) -> dict[str, str]:
        """:data:`PROTOCOL` with the unit of ASD under ``asd unit``."""
        unit = "px" if self.spacing is None else f"units of the spacing {self.spacing}"
        return {**PROTOCOL, "asd unit": unit}

    def update(self, prediction: Tensor, target: Tensor, ids: Sequence[int]) -> None:
        """Score a batch.

        Args:
            prediction: class maps ``(B, H, W)``, integer labels.
            target: reference class maps ``(B, H, W)``, integer labels.
            ids: integer id of each case, ``B`` of them, each in [0, 2^24).

        Raises:
            ValueError: shapes or the number of ids do not agree.
        """
        if prediction.ndim != 3 or prediction.shape != target.shape or len(ids) != len(prediction):
            raise ValueError(
                f"expected prediction and target (B, H, W) and B ids, not {tuple(prediction.shape)}, "
                f"{tuple(target.shape)} and {len(ids)} ids"
            )
        maps_p, maps_g = prediction.cpu().numpy(), target.cpu().numpy()
        labels = range(1, len(self.class_names))
        scores = [class_scores(maps_p == k, maps_g == k, self.spacing or (1.0, 1.0)) for k in labels]
        record = np.concatenate([np.asarray([int(i) for i in ids])[:, None], *scores], axis=1)
        self.records.append(torch.as_tensor(record, dtype=torch.float32, device=self.device).flatten())

    def compute(self) -> dict[str, float]:
        """Return the means over all cases.

        Returns:
            ``dsc`` in percent [0, 100], ``asd`` ≥ 0 in pixels or units of the spacing, the same of each
            foreground class as ``dsc/<class>`` and ``asd/<class>``, and ``n_cases``. NaN where nothing
            was scored.
        """
        _, scores = self._unique_records()
        per_class = _mean(scores, axis=0)  # (K, 2)
        dsc, asd = _mean(per_class, axis=0)
        return {"dsc": float(dsc), "asd": float(asd), "n_cases": len(scores)} | self._by_class(per_class)

    def cases(self) -> list[dict[str, float]]:
        """Return the scores of every case, by id.

        Under DDP this gathers, so every process has to call it.

        Returns:
            A dict per case: ``id``, and ``dsc/<class>`` and ``asd/<class>`` as in :meth:`compute`, NaN
            where the class is not scored.
        """
        with self.sync_context():
            ids, scores = self._unique_records()
        return [{"id": int(i)} | self._by_class(case) for i, case in zip(ids, scores, strict=True)]

    def _by_class(self, scores: np.ndarray) -> dict[str, float]:
        """Return scores (K, 2) = (DSC, ASD) under their names."""
        return {
            f"{metric}/{name}": float(scores[k, column])
            for column, metric in enumerate(("dsc", "asd"))
            for k, name in enumerate(self.foreground)
        }

    def _unique_records(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (N,) in order and the scores (N, K, 2) = (DSC, ASD), every case once."""
        flat = dim_zero_cat(self.records) if len(self.records) else torch.zeros(0)
        table = flat.cpu().double().numpy().reshape(-1, 1 + 2 * len(self.foreground))
        ids, first = np.unique(table[:, 0].astype(int), return_index=True)
        return ids, table[first, 1:].reshape(len(ids), len(self.foreground), 2)


def class_scores(prediction: np.ndarray, target: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Score one class in a stack of slices, by the rules of :data:`PROTOCOL`.

    Args:
        prediction: boolean masks ``(B, H, W)``.
        target: boolean reference masks ``(B, H, W)``.
        spacing: height and width of a pixel.

    Returns:
        float64 ``(B, 2)``: DSC in percent and ASD in units of the spacing; NaN where both masks are empty.
    """
    size_p, size_g = prediction.sum(axis=(1, 2)), target.sum(axis=(1, 2))
    overlap = (prediction & target).sum(axis=(1, 2))
    scored, both = (size_p + size_g) > 0, (size_p > 0) & (size_g > 0)
    dsc = 100 * 2 * overlap / np.where(scored, size_p + size_g, 1)
    asd = np.full(len(dsc), np.hypot(*np.multiply(prediction.shape[1:], spacing)))
    surface_p, surface_g = _surface(prediction), _surface(target)
    for i in np.flatnonzero(both):
        asd[i] = surface_distance(surface_p[i], surface_g[i], spacing)
    return np.where(scored[:, None], np.stack([dsc, asd], axis=1), np.nan)


def surface_distance(surface_p: np.ndarray, surface_g: np.ndarray, spacing: tuple[float, float]) -> float:
    """Return ½ (mean d(P→G) + mean d(G→P)) between two surfaces.

    The two directions weigh the same whatever their numbers of pixels; medpy's ASSD and MONAI's
    ``symmetric=True`` pool the distances instead.

    Args:
        surface_p: boolean ``(H, W)``, the surface pixels of one mask, at least one.
        surface_g: boolean ``(H, W)``, those of the other, at least one.
        spacing: height and width of a pixel.
    """
    points_p, points_g = np.argwhere(surface_p) * spacing, np.argwhere(surface_g) * spacing
    forth, back = KDTree(points_g).query(points_p)[0], KDTree(points_p).query(points_g)[0]
    return 0.5 * (float(forth.mean()) + float(back.mean()))


def _surface(masks: np.ndarray) -> np.ndarray:
    """Return the surface pixels of a stack of boolean masks (B, H, W)."""
    return masks & ~binary_erosion(masks, _SURFACE_ELEMENT)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over the numbers along an axis, NaN where there is none."""
    scored = ~np.isnan(values)
    count = scored.sum(axis=axis)
    total = np.where(scored, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
