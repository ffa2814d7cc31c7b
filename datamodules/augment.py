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
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    RandZoomd,
    Transform,
)
from monai.utils import convert_to_tensor

from datamodules.sources import Sample

Level = Literal["none", "flip", "full", "nnunet"]
SegLevel = Literal[Level, "nnunetv2"]
"""Those of segmentation: nnU-Net's own transforms on normalised patches, too (nnunet_augment.py)."""

GREY_SPREAD = 0.4
"""Standard deviation of a typical image in [−1, 1]."""

# Nothing here reads MONAI's metadata, and carrying it costs more than half as much again as augmenting.
set_track_meta(False)


def _transforms(level: Level) -> list[Transform]:
    both, image = ["image", "mask"], ["image"]
    flips: list[Transform] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in (0, 1)]
    if level == "none":
        return []
    if level == "flip":
        return flips
    if level == "nnunet":
        # Each with a probability of its own, as nnU-Net v2 has them; its noise is of images with variance 1.
        return [
            RandAffined(
                both, prob=0.2, rotate_range=np.pi, mode=["bilinear", "nearest"], padding_mode="border"
            ),
            RandZoomd(
                both, prob=0.2, min_zoom=0.7, max_zoom=1.4, mode=["bilinear", "nearest"], padding_mode="edge"
            ),
            RandGaussianNoised(image, prob=0.1, std=0.1 * GREY_SPREAD),
            RandGaussianSmoothd(image, prob=0.2, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0)),
            RandScaleIntensityd(image, prob=0.15, factors=0.25),
            RandScaleIntensityFixedMeand(image, prob=0.15, factors=0.25, preserve_range=True),
            RandSimulateLowResolutiond(image, prob=0.25, zoom_range=(0.5, 1.0), upsample_mode="bicubic"),
            RandAdjustContrastd(image, prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
            RandAdjustContrastd(image, prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
            *flips,
        ]
    return [
        *flips,
        RandAffined(
            both,
            prob=0.3,
            rotate_range=np.pi,
            scale_range=0.3,  # of one number MONAI scales the first axis alone
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
            ``full`` for segmentation: flips, rotation, height times 0.7 to 1.3, noise, brightness, contrast,
            gamma; ``nnunet`` for segmentation: nnU-Net v2's list with its probabilities and ranges.
    """

    def __init__(self, level: Level = "full") -> None:
        self.compose = Compose(_transforms(level))
        self.state = np.random.RandomState()
        # All draw from one state: seeding it is cheap, a state for each costs twice what the augmenting does.
        for transform in self.compose.transforms:
            transform.set_random_state(state=self.state)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return an augmented copy of ``sample``; the same generator state, the same result."""
        if not self.compose.transforms:
            return sample
        self.state.seed(int(rng.integers(2**31)))
        out = self.compose({"image": sample["image"], "mask": sample["mask"].unsqueeze(0)})
        image, mask = (convert_to_tensor(out[key], track_meta=False) for key in ("image", "mask"))
        return {"image": image.clamp(-1, 1).float(), "mask": mask.squeeze(0).long(), "id": sample["id"]}
