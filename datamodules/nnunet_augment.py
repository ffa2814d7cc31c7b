"""Training patches as nnU-Net makes them: normalised, cut around the foreground, transformed by its package.

The rules are those of ``nnUNetTrainer`` and ``nnUNetDataLoader`` in nnunetv2 2.8.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from datamodules.sources import Sample
from networks.normalisation import Channel, normalise

OUTSIDE = -1
"""Class of pixels beyond the border, until it becomes background."""
MAX_ASPECT = 1.5
"""Longer patches are turned by 15 degrees at most."""
ZOOM = 0.85
"""Share of the larger patch, from which the transforms draw, that the patch takes at least."""


def rotation(patch: Sequence[int]) -> tuple[float, float]:
    """Return the range of the angle of rotation, in radians."""
    angle = np.pi if max(patch) / min(patch) <= MAX_ASPECT else 15 / 180 * np.pi
    return -angle, angle


def first_patch(patch: Sequence[int]) -> tuple[int, int]:
    """Return the size (H, W) to cut out, larger than the patch by what rotation and zoom move into it."""
    height, width = patch
    angle = min(np.pi / 2, rotation(patch)[1])
    turned = (
        abs(height * np.cos(angle) + width * np.sin(angle)),
        abs(width * np.cos(angle) - height * np.sin(angle)),
    )
    return int(max(turned[0], height) / ZOOM), int(max(turned[1], width) / ZOOM)


def transforms(patch: Sequence[int]) -> Any:
    """Return nnU-Net's training transforms for 2D patches, those of ``batchgeneratorsv2``.

    Blur alone has another setting: nnU-Net lets the clock choose between two ways of computing it, which
    differ in the last bits.

    Args:
        patch: height and width that come out.
    """
    # Imported here: other levels do not need the package.
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform

    spatial = SpatialTransform(
        tuple(patch),
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=0,
        p_rotation=0.2,
        rotation=rotation(patch),
        p_scaling=0.2,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=OUTSIDE,
    )
    apart = {"synchronize_channels": False}
    gamma = apart | {"gamma": BGContrast((0.7, 1.5)), "p_per_channel": 1, "p_retain_stats": 1}
    sometimes = [
        (GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
        (GaussianBlurTransform((0.5, 1.0), synchronize_axes=False, p_per_channel=0.5, **apart), 0.2),
        (MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), p_per_channel=1, **apart), 0.15),
        (ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, p_per_channel=1, **apart), 0.15),
        (
            SimulateLowResolutionTransform(
                (0.5, 1), synchronize_axes=True, ignore_axes=None, p_per_channel=0.5, **apart
            ),
            0.25,
        ),
        (GammaTransform(p_invert_image=1, **gamma), 0.1),
        (GammaTransform(p_invert_image=0, **gamma), 0.3),
    ]
    return ComposeTransforms(
        [
            spatial,
            *(RandomTransform(transform, apply_probability=p) for transform, p in sometimes),
            MirrorTransform(allowed_axes=(0, 1)),
            RemoveLabelTransform(OUTSIDE, 0),
        ]
    )


def corner(
    mask: Tensor, first: Sequence[int], patch: Sequence[int], rng: np.random.Generator, foreground: bool
) -> tuple[int, int]:
    """Return row and column, which may lie outside, where the cut begins.

    Args:
        mask: class map ``(H, W)``.
        first: height and width of the cut.
        patch: height and width that the transforms leave in its middle; it may reach every border.
        rng: source of the randomness.
        foreground: put a pixel of a class that is drawn first, and then the pixel, into the middle of the
            cut; images without foreground are cut anywhere.
    """
    sizes = tuple(mask.shape)
    extra = [max(a - b, a - size) for a, b, size in zip(first, patch, sizes, strict=True)]
    lowest = [-gap // 2 for gap in extra]
    highest = [size + gap // 2 + gap % 2 - a for size, gap, a in zip(sizes, extra, first, strict=True)]
    classes = mask[mask > 0].unique().tolist() if foreground else []
    if classes:
        places = (mask == classes[int(rng.integers(len(classes)))]).nonzero()
        middle = places[int(rng.integers(len(places)))].tolist()
        found = [max(low, m - a // 2) for low, m, a in zip(lowest, middle, first, strict=True)]
    else:
        found = [int(rng.integers(low, high + 1)) for low, high in zip(lowest, highest, strict=True)]
    return found[0], found[1]


def cut(image: Tensor, place: tuple[int, int], size: Sequence[int], outside: float) -> Tensor:
    """Return a copy of ``size`` of the last two axes from ``place`` on, ``outside`` beyond the border."""
    bounds = [(begin, begin + edge) for begin, edge in zip(place, size, strict=True)]
    inside = [(max(a, 0), min(b, full)) for (a, b), full in zip(bounds, image.shape[-2:], strict=True)]
    (top, bottom), (left, right) = inside
    gaps = [(new[0] - old[0], old[1] - new[1]) for old, new in zip(bounds, inside, strict=True)]
    piece = image[..., top:bottom, left:right]
    return pad(piece, (*gaps[1], *gaps[0]), value=outside).clone()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of NumPy and PyTorch, which the transforms draw from, for a while."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


class NNUNetAugmentation:
    """nnU-Net's way from a whole image to a training patch.

    The image is normalised as a whole, cut (with 0 beyond its border), and transformed. What comes out is
    normalised: it goes to the network as it is.

    Args:
        patch_size: height and width of the patches in pixels.
        normalisation: how each channel is normalised.
        foreground: chance that a cut is made around a pixel of the foreground.
    """

    def __init__(
        self, patch_size: tuple[int, int], normalisation: Sequence[Channel], foreground: float = 0.33
    ) -> None:
        self.patch_size = patch_size
        self.first = first_patch(patch_size)
        self.normalisation = normalisation
        self.foreground = foreground
        self.transforms = transforms(patch_size)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return a patch of ``sample``; the same generator state, the same result."""
        mask = sample["mask"]
        place = corner(mask, self.first, self.patch_size, rng, rng.random() < self.foreground)
        image = cut(normalise(sample["image"], self.normalisation), place, self.first, 0)
        classes = cut(mask[None].to(torch.int16), place, self.first, OUTSIDE)
        with seeded(int(rng.integers(2**31))):
            out = self.transforms(image=image, segmentation=classes)
        return {"image": out["image"].float(), "mask": out["segmentation"][0].long(), "id": sample["id"]}
