"""Scores of every case and class, by the protocol that goes with the numbers."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from datamodules.sources import Volume
from evaluation.protocols import PROTOCOLS, Protocol, named
from evaluation.surfaces import Floats, Maps, score_case

PROTOCOL = PROTOCOLS["paper"].rules()
"""How :class:`SegmentationScore` counts by default; goes wherever its figures go."""

_IDS = 2**24  # ids below it are exact in float32
_HEADER = 4  # numbers before the bytes of a slice: id, height, width, number of bytes


class SegmentationScore(Metric):
    """Overlap and surface distances per case and class, by one of :data:`~evaluation.protocols.PROTOCOLS`.

    The mean is taken over classes, of the mean over the cases in which the class is scored: a rare class
    weighs as much as a frequent one. Where the protocol's unit is the volume, slices are kept, compressed,
    until :meth:`compute` puts the volumes together; an image that belongs to no volume is a case of its own.

    An id seen again, as under a sampler that pads the last batch, counts once. Exact under DDP, also where
    the slices of a volume lie on several processes: the states are gathered case by case and slice by slice,
    never averaged per process.

    Args:
        class_names: names of the classes by label, the background (label 0, never scored) first.
        spacing: size of an element along (height, width), or along (slice, height, width) where volumes are
            scored, in the unit that distances shall have, whatever the protocol says. ``None`` leaves it to
            the protocol: the spacing of the case in mm, or pixels.
        protocol: name of a preset, or a protocol.
        volumes: where each sample lies in a 3-D case, by id; None for an image that lies in none, and
            for all of them where the argument is None.

    Raises:
        ValueError: there is no foreground class, a spacing is not made of positive numbers, two or three, the
            protocol is not known, or the volumes lack slices, have one twice, or only some of the samples
            have the spacing that the protocol wants.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    records: list[Tensor]
    slices: list[Tensor]

    def __init__(
        self,
        class_names: Sequence[str],
        spacing: Sequence[float] | None = None,
        protocol: str | Protocol = "paper",
        volumes: Sequence[Volume | None] | None = None,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError("class_names needs the background and at least one foreground class")
        self.rule = named(protocol)
        self.class_names = tuple(class_names)
        self.volumes = tuple(volumes or ())
        self._stacks = stacks(self.volumes) if self.rule.unit == "volume" else {}
        self._stack_of = {i: first for first, ids in self._stacks.items() for i in ids}
        self._check_spacing(spacing)
        self.spacing = None if spacing is None else tuple(map(float, spacing))
        # Flat states of float32, so that a process without any case gathers with the others.
        # Per case its id, then the measures of every foreground class.
        self.add_state("records", default=[], dist_reduce_fx="cat")
        # Per slice of a volume its id, height, width, number of bytes, and the bytes.
        self.add_state("slices", default=[], dist_reduce_fx="cat")
        self._scored: dict[int, tuple[list, Floats]] = {}

    def _check_spacing(self, spacing: Sequence[float] | None) -> None:
        if spacing is not None:
            if len(spacing) not in (2, 3) or not _positive(spacing):
                raise ValueError(
                    f"spacing needs two positive numbers (height, width), or three, not {spacing}"
                )
            if self._stacks and len(spacing) == 2:
                raise ValueError(
                    f"spacing of volumes needs three numbers (slice, height, width), not {spacing}"
                )
        for volume in self.volumes if self.rule.spacing else ():
            if volume is not None and volume.spacing is not None and not _positive(volume.spacing):
                raise ValueError(
                    f"case {volume.case} has the spacing {volume.spacing}: give positive numbers, or None"
                )
        known = [volume is not None and volume.spacing is not None for volume in self.volumes]
        if spacing is None and self.rule.spacing and any(known) and not all(known):
            raise ValueError(
                f"protocol {self.rule.name} uses the spacing, and sample {known.index(False)} has none while "
                f"sample {known.index(True)} has one; choose a protocol without spacing"
            )

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of the scored classes."""
        return self.class_names[1:]

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured, as in the keys of :meth:`compute`."""
        return self.rule.measures

    @property
    def distance_unit(self) -> str:
        """Unit of the distances; px is pixels, or voxels."""
        if self.spacing is not None:
            return f"units of the spacing {self.spacing}"
        if self.rule.spacing and any(volume and volume.spacing for volume in self.volumes):
            return "mm"
        return "px"

    @property
    def protocol(self) -> dict[str, str]:
        """The rules of the protocol in words, with the unit of its distances."""
        key = "asd unit" if "asd" in self.measures else "distance unit"
        given = {} if self.spacing is None else {"spacing": f"{self.spacing}, given for all cases"}
        return {**self.rule.rules(), **given, key: self.distance_unit}

    def case_name(self, case: int) -> str | None:
        """Return the name of a scored volume by the id of its case; None for a 2-D case."""
        volume = self.volumes[case] if case in self._stacks else None
        return None if volume is None else volume.case

    def update(self, prediction: Tensor, target: Tensor, ids: Sequence[int]) -> None:
        """Score a batch, or keep it until its volumes are whole.

        Args:
            prediction: class maps ``(B, H, W)``, integer labels.
            target: reference class maps ``(B, H, W)``, integer labels.
            ids: integer id of each sample, ``B`` of them, each in [0, 2^24); where volumes are scored,
                its place among the ``volumes``.

        Raises:
            ValueError: shapes or the number of ids do not agree, labels are no integers or none of the
                classes, or an id is out of its range.
        """
        if prediction.ndim != 3 or prediction.shape != target.shape or len(ids) != len(prediction):
            raise ValueError(
                f"expected prediction and target (B, H, W) and B ids, not {tuple(prediction.shape)}, "
                f"{tuple(target.shape)} and {len(ids)} ids"
            )
        for name, maps in (("prediction", prediction), ("target", target)):
            self._check_labels(name, maps)
        limit = len(self.volumes) or _IDS
        for i in map(int, ids):
            if not 0 <= i < limit:
                raise ValueError(f"id {i}: must be at least 0 and below {limit}")
        maps_p, maps_g = prediction.cpu().numpy(), target.cpu().numpy()
        for i, p, g in zip(map(int, ids), maps_p, maps_g, strict=True):
            if i in self._stack_of:
                self.slices.append(_pack(i, p, g).to(self.device))
            else:
                record = np.append(i, self._score(i, p, g))
                self.records.append(torch.as_tensor(record, dtype=torch.float32, device=self.device))

    def _check_labels(self, name: str, maps: Tensor) -> None:
        """Raise unless every label is one of the classes."""
        if maps.is_floating_point() or maps.is_complex():
            raise ValueError(
                f"{name} is of type {maps.dtype}: give class maps of integers, not probabilities"
            )
        if maps.numel() and not 0 <= int(maps.min()) <= int(maps.max()) < len(self.class_names):
            raise ValueError(
                f"{name} has labels from {int(maps.min())} to {int(maps.max())}, and the classes are 0 to "
                f"{len(self.class_names) - 1}: map the others to classes first"
            )

    def compute(self) -> dict[str, float]:
        """Return the means over all cases.

        Returns:
            Each measure of the protocol: overlaps in percent [0, 100], distances ≥ 0 in the protocol's
            unit; the same of each foreground class as ``<measure>/<class>``; and ``n_cases``. NaN where
            nothing was scored. Volumes that have not come whole are left out, with a warning and their
            number as ``n_incomplete``.
        """
        _, scores, incomplete = self._whole_cases()
        per_class = _mean(scores, axis=0)  # (K, M)
        means = dict(zip(self.measures, map(float, _mean(per_class, axis=0)), strict=True))
        counts = {"n_cases": len(scores)}
        if incomplete:
            rank_zero_warn(f"{incomplete} volumes have not come whole and are not scored")
            counts["n_incomplete"] = incomplete
        return means | counts | self._by_class(per_class)

    def cases(self) -> list[dict[str, float]]:
        """Return the scores of every case, by id.

        Under DDP this gathers, so every process has to call it.

        Returns:
            A dict per case: ``id``, that of the first slice where the case is a volume, and
            ``<measure>/<class>`` as in :meth:`compute`, NaN where the class is not scored.
        """
        with self.sync_context():
            ids, scores, _ = self._whole_cases()
        return [{"id": int(i)} | self._by_class(case) for i, case in zip(ids, scores, strict=True)]

    def _score(self, i: int, prediction: Maps, target: Maps) -> Floats:
        """Return the scores (K, M) of one case, (H, W) or (D, H, W)."""
        volume = self.volumes[i] if i < len(self.volumes) else None
        of_case = volume.spacing if volume is not None and self.rule.spacing else None
        spacing = self.spacing or of_case or (1.0, 1.0, 1.0)
        return score_case(prediction, target, len(self.class_names), spacing[-prediction.ndim :], self.rule)

    def _by_class(self, scores: np.ndarray) -> dict[str, float]:
        """Return scores (K, M) under their names."""
        return {
            f"{measure}/{name}": float(scores[k, column])
            for column, measure in enumerate(self.measures)
            for k, name in enumerate(self.foreground)
        }

    def _whole_cases(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return ids (N,) in order, scores (N, K, M), every case once, and how many volumes lack slices."""
        shape = (len(self.foreground), len(self.measures))
        table = self._flat("records").reshape(-1, 1 + shape[0] * shape[1])
        scores = {int(row[0]): row[1:].reshape(shape) for row in table[::-1]}  # the first of each id stays
        pieces = dict(_unpack(self._flat("slices")))
        begun = {self._stack_of[i] for i in pieces}
        whole = [first for first in begun if all(i in pieces for i in self._stacks[first])]
        scores |= {first: self._score_stack(first, pieces) for first in whole}
        ids = sorted(scores)
        return np.array(ids), np.array([scores[i] for i in ids]).reshape(-1, *shape), len(begun) - len(whole)

    def _score_stack(self, first: int, pieces: dict[int, tuple[bytes, int, int]]) -> Floats:
        """Return the scores (K, M) of a volume, computed once for what has come."""
        own = [pieces[i] for i in self._stacks[first]]
        sizes = sorted({piece[1:] for piece in own})
        if len(sizes) > 1:
            raise ValueError(f"the slices of case {self.case_name(first)} have several sizes, {sizes}")
        if first not in self._scored or self._scored[first][0] != own:
            prediction, target = np.stack([_decompress(*piece) for piece in own], axis=1)  # each (D, H, W)
            self._scored[first] = (own, self._score(first, prediction, target))
        return self._scored[first][1]

    def _flat(self, state: str) -> np.ndarray:
        """Return a state as one array of float64."""
        values = getattr(self, state)
        return (dim_zero_cat(values) if len(values) else torch.zeros(0)).cpu().double().numpy()


def stacks(volumes: Sequence[Volume | None]) -> dict[int, tuple[int, ...]]:
    """Return the ids of the slices of every volume, in their order, by the first of them.

    Args:
        volumes: where each sample lies, by id; None for an image that lies in no volume.

    Raises:
        ValueError: a volume lacks a slice, has one twice, or its slices disagree about it.
    """
    cases: dict[str, dict[int, int]] = {}
    facts: dict[str, tuple] = {}
    for i, volume in enumerate(volumes):
        if volume is None:
            continue
        slices = cases.setdefault(volume.case, {})
        if volume.slice in slices:
            raise ValueError(f"case {volume.case} has slice {volume.slice} twice")
        if facts.setdefault(volume.case, (volume.slices, volume.spacing)) != (volume.slices, volume.spacing):
            raise ValueError(f"the slices of case {volume.case} disagree about their number or spacing")
        slices[volume.slice] = i
    for case, slices in cases.items():
        if set(slices) != set(range(facts[case][0])):
            raise ValueError(f"case {case} has {len(slices)} of {facts[case][0]} slices")
    ordered = [tuple(slices[k] for k in sorted(slices)) for slices in cases.values()]
    return {ids[0]: ids for ids in ordered}


def _positive(spacing: Sequence[float]) -> bool:
    return all(np.isfinite(each) and each > 0 for each in spacing)


def _pack(i: int, prediction: Maps, target: Maps) -> Tensor:
    """Return a slice as float32 numbers, each exact: id, height, width, number of bytes, the bytes."""
    data = zlib.compress(np.stack([prediction, target]).astype(np.uint16).tobytes(), 1)
    header = np.array([i, *prediction.shape, len(data)])
    return torch.from_numpy(np.append(header, np.frombuffer(data, np.uint8)).astype(np.float32))


def _unpack(flat: np.ndarray) -> Iterator[tuple[int, tuple[bytes, int, int]]]:
    """Yield the id of every slice with its bytes, height and width."""
    at = 0
    while at < len(flat):
        i, height, width, size = flat[at : at + _HEADER].astype(int)
        at += _HEADER + size
        yield int(i), (flat[at - size : at].astype(np.uint8).tobytes(), int(height), int(width))


def _decompress(data: bytes, height: int, width: int) -> np.ndarray:
    """Return prediction and target of a slice as one array (2, H, W)."""
    return np.frombuffer(zlib.decompress(data), np.uint16).reshape(2, height, width)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over the numbers along an axis, NaN where there is none."""
    scored = ~np.isnan(values)
    count = scored.sum(axis=axis)
    total = np.where(scored, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
