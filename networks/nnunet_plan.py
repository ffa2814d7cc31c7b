"""nnU-Net's 2D plan: patch, stages and batch from the sizes, spacings and number of the training cases.

The rules and constants are those of ``ExperimentPlanner`` in nnunetv2 2.8
(Isensee et al., Nature Methods 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
Pairs = tuple[tuple[int, int], ...]

MIN_EDGE = 4
"""Smallest edge of the deepest feature map, in pixels."""
ANISOTROPY = 3
"""An axis is coarse when its spacing is more than so many times that of the others."""
FIRST_AREA = 2048**2
"""Pixels of the patch that planning starts from, before it is cut to the median shape."""
REFERENCE_MAPS = 85_000_000
"""Entries of all feature maps of one image with which a batch of 12 takes 8 GB."""
REFERENCE_BATCH = 12
REFERENCE_GB = 8.0
MIN_BATCH = 2
MAX_COVERED = 0.05
"""Share of the pixels of the training set that one batch may cover."""


@dataclass(frozen=True)
class Fingerprint:
    """What planning needs to know of the training cases.

    Attributes:
        shapes: voxels of each case along (D, H, W); D is 1 for a plain image.
        spacings: size of a voxel of each case along (D, H, W), in mm.
        channels: image channels.
        classes: classes, background included.
    """

    shapes: tuple[Shape, ...]
    spacings: tuple[Spacing, ...]
    channels: int
    classes: int


@dataclass(frozen=True)
class Plan:
    """nnU-Net's 2D configuration.

    Attributes:
        spacing: target spacing (H, W) in mm.
        median_shape: median of the cases' (H, W) at that spacing, in pixels.
        patch_size: (H, W) in pixels.
        strides: of each stage along (H, W).
        kernel_sizes: of each stage along (H, W).
        features: of each stage.
        convs: convolutions of each stage, in encoder and decoder.
        batch_size: patches a batch.
    """

    spacing: tuple[float, float]
    median_shape: tuple[float, float]
    patch_size: tuple[int, int]
    strides: Pairs
    kernel_sizes: Pairs
    features: tuple[int, ...]
    convs: int
    batch_size: int


@dataclass(frozen=True)
class Topology:
    """Stages for a patch: ``strides`` and ``kernel_sizes``, and the patch, padded so that they divide it."""

    strides: Pairs
    kernel_sizes: Pairs
    patch_size: tuple[int, int]

    @property
    def divisor(self) -> tuple[int, int]:
        """What the edges of an image must be multiples of."""
        factors = np.prod(self.strides, axis=0)
        return int(factors[0]), int(factors[1])


def topology(patch: Sequence[float], spacing: Sequence[float] = (1, 1), min_edge: int = MIN_EDGE) -> Topology:
    """Return the stages that nnU-Net gives a patch.

    A stage halves every edge of at least 2 · ``min_edge``, but those first that are finer than the others by
    a factor of 2; an edge that would be halved alone needs 3 · ``min_edge``. Kernels reach along an axis as
    soon as its spacing is within a factor of 2 of the finest.

    Args:
        patch: height and width in pixels.
        spacing: of the pixels along them.
        min_edge: smallest edge of the deepest feature map, in pixels.
    """
    edges, sizes = list(patch), list(spacing)
    strides, kernels = [(1, 1)], []
    kernel = [1, 1]
    while True:
        able = [axis for axis in (0, 1) if edges[axis] >= 2 * min_edge]
        finest = min((sizes[axis] for axis in able), default=0)
        able = [axis for axis in able if sizes[axis] / finest < 2]
        if not able or (len(able) == 1 and edges[able[0]] < 3 * min_edge):
            break
        kernel = [3 if sizes[axis] / min(sizes) < 2 else kernel[axis] for axis in (0, 1)]
        kernels.append((kernel[0], kernel[1]))
        for axis in able:
            sizes[axis] *= 2
            edges[axis] = -(-edges[axis] // 2)
        strides.append((2 if 0 in able else 1, 2 if 1 in able else 1))
    factors = np.prod(strides, axis=0)
    padded = [int(-(-edge // factor) * factor) for edge, factor in zip(patch, factors, strict=True)]
    return Topology(tuple(strides), (*kernels, (3, 3)), (padded[0], padded[1]))


def stage_features(stages: int, base: int = 32, highest: int = 512) -> tuple[int, ...]:
    """Return the features of each stage: ``base`` · 2^i, at most ``highest``."""
    return tuple(min(base * 2**i, highest) for i in range(stages))


def target_spacing(fingerprint: Fingerprint) -> np.ndarray:
    """Return the spacing (3,) that cases are brought to: the median, or less along a coarse axis.

    An axis is coarse when both its spacing and its number of voxels differ from the others' by more than a
    factor of 3; it gets the 10th percentile.
    """
    spacings = np.array(fingerprint.spacings)
    target = np.percentile(spacings, 50, axis=0)
    shape = np.percentile(np.array(fingerprint.shapes), 50, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    finer = max(target[others])
    if target[worst] > ANISOTROPY * finer and shape[worst] * ANISOTROPY < min(shape[others]):
        low = np.percentile(spacings[:, worst], 10)
        target[worst] = low if low >= finer else finer + 1e-5
    return target


def feature_map_entries(planned: Topology, features: Sequence[int], channels: int, classes: int) -> int:
    """Return how many numbers the convolutions make of one patch, as the package of architectures counts."""
    with torch.device("meta"):
        network = PlainConvUNet(
            channels,
            len(features),
            tuple(features),
            nn.Conv2d,
            planned.kernel_sizes,
            planned.strides,
            2,
            classes,
            2,
        )
    return int(network.compute_conv_feature_map_size(planned.patch_size))


def plan_2d(fingerprint: Fingerprint, memory: float = REFERENCE_GB) -> Plan:
    """Return the 2D plan of a training set.

    The patch is the median shape at the target spacing, padded so that the stages divide it; it shrinks while
    a batch of two exceeds the memory. The batch fills the memory, and covers 5 % of the training pixels at
    most. Slices lie along the first axis, whatever the spacing.

    Args:
        fingerprint: of the training set, at least one case.
        memory: of the GPU, in GB; nnU-Net's own target is 8.
    """
    target = target_spacing(fingerprint)
    shapes = [
        [round(old / new * voxels) for old, new, voxels in zip(spacing, target, shape, strict=True)]
        for spacing, shape in zip(fingerprint.spacings, fingerprint.shapes, strict=True)
    ]
    median = np.median(shapes, axis=0)
    pixels = float(np.prod(median, dtype=np.float64) * len(shapes))
    spacing, shape = target[1:].tolist(), median[1:].tolist()
    scale = (FIRST_AREA / np.prod([1 / size for size in spacing])) ** 0.5
    wide = [1 / size * scale for size in spacing]
    planned = topology([min(round(edge), top) for edge, top in zip(wide, shape, strict=True)], spacing)

    def entries() -> int:
        features = stage_features(len(planned.strides))
        return feature_map_entries(planned, features, fingerprint.channels, fingerprint.classes)

    reference = REFERENCE_MAPS * memory / REFERENCE_GB
    while entries() / REFERENCE_BATCH * MIN_BATCH > reference:
        planned = _smaller(planned, spacing, shape)
    batch = round(reference / entries() * REFERENCE_BATCH)
    covered = round(pixels * MAX_COVERED / np.prod(planned.patch_size, dtype=np.float64))
    return Plan(
        spacing=(spacing[0], spacing[1]),
        median_shape=(shape[0], shape[1]),
        patch_size=planned.patch_size,
        strides=planned.strides,
        kernel_sizes=planned.kernel_sizes,
        features=stage_features(len(planned.strides)),
        convs=2,
        batch_size=max(min(batch, covered), MIN_BATCH),
    )


def _smaller(planned: Topology, spacing: list[float], shape: list[float]) -> Topology:
    """Return the next smaller patch: the edge that is longest beside the median shape loses a step."""
    patch = list(planned.patch_size)
    axis = int(np.argsort([edge / median for edge, median in zip(patch, shape, strict=True)])[-1])
    trial = list(patch)
    trial[axis] -= planned.divisor[axis]
    patch[axis] -= topology(trial, spacing).divisor[axis]
    return topology(patch, spacing)


# ------------------------------------------------------------------------------ grey values


class Intensities:
    """Grey values of the foreground of each channel, in which every case counts the same.

    nnU-Net draws equally many foreground voxels of each case; this is what its figures tend to.
    """

    def __init__(self, channels: int) -> None:
        self.values: list[list[np.ndarray]] = [[] for _ in range(channels)]
        self.weights: list[np.ndarray] = []

    def add(self, images: np.ndarray, mask: np.ndarray) -> None:
        """Take in a case: ``images`` ``(C, …)`` and its class map ``mask`` ``(…)``."""
        inside = mask > 0
        count = int(inside.sum())
        if count:
            for channel, values in zip(images, self.values, strict=True):
                values.append(channel[inside].astype(np.float64))
            self.weights.append(np.full(count, 1 / count))

    def summary(self) -> list[dict[str, float]]:
        """Return ``mean``, ``std``, ``lower`` and ``upper`` (0.5 and 99.5 percentiles) of each channel.

        Raises:
            ValueError: no case has any foreground.
        """
        if not self.weights:
            raise ValueError("no case has any foreground")
        weights = np.concatenate(self.weights) / len(self.weights)
        return [_summary(np.concatenate(values), weights) for values in self.values]


def _summary(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    mean = float((weights * values).sum())
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order])
    lower, upper = (
        float(values[order[min(int(np.searchsorted(share, q)), len(values) - 1)]]) for q in (0.005, 0.995)
    )
    std = float(np.sqrt((weights * (values - mean) ** 2).sum()))
    return {"mean": mean, "std": std, "lower": lower, "upper": upper}
