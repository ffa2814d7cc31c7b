"""Augmentation of labelled images, driven by the generator of the item (see streams.py)."""

from typing import Literal

import numpy as np
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)
from monai.utils import convert_to_tensor

from datamodules.sources import Sample

Level = Literal["none", "flip", "full"]

# Nothing here reads MONAI's metadata, and carrying it costs more than half as much again as augmenting.
set_track_meta(False)


def _transforms(level: Level) -> list[Transform]:
    both, image = ["image", "mask"], ["image"]
    flips: list[Transform] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in (0, 1)]
    if level == "none":
        return []
    if level == "flip":
        return flips
    return [
        *flips,
        RandAffined(
            both,
            prob=0.3,
            rotate_range=np.pi,
            scale_range=0.3,
            mode=["bilinear", "nearest"],
            padding_mode="border",
        ),
        RandGaussianNoised(image, prob=0.1, std=0.1),
        RandScaleIntensityd(image, prob=0.15, factors=0.25),
        RandShiftIntensityd(image, prob=0.15, offsets=0.2),
        RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5)),
    ]


class Augmentation:
    """MONAI transforms on ``image`` and ``mask``; the image stays in [−1, 1].

    Args:
        level: ``none``; ``flip`` for generative training, where changed colours would be learnt;
            ``full`` for segmentation: flips, rotation and scale, noise, brightness, contrast, gamma.
    """

    def __init__(self, level: Level = "full") -> None:
        self.compose = Compose(_transforms(level))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return an augmented copy of ``sample``; the same generator state, the same result."""
        if not self.compose.transforms:
            return sample
        self.compose.set_random_state(seed=int(rng.integers(2**31)))
        out = self.compose({"image": sample["image"], "mask": sample["mask"].unsqueeze(0)})
        image, mask = (convert_to_tensor(out[key], track_meta=False) for key in ("image", "mask"))
        return {"image": image.clamp(-1, 1).float(), "mask": mask.squeeze(0).long(), "id": sample["id"]}
