"""Augmentation across the images of a batch: CutMix and copy-paste."""

import numpy as np
import torch
from torch import Tensor


def paired_cutmix(
    image: Tensor, mask: Tensor, rng: np.random.Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Swap one rectangle between the two halves of a batch (Yun et al., ICCV 2019, made symmetric).

    Sample i of the first half and sample i of the second exchange the same rectangle, so that every
    pixel of the batch stays in it. With the real stream first and the synthetic one second at 1 : 1,
    each real sample is paired with a synthetic one; on real images alone, with another real one.

    Args:
        image: ``(B, C, H, W)``.
        mask: ``(B, H, W)``.
        rng: source of the randomness.
        probability: chance that the batch is mixed.
    """
    half = len(image) // 2
    if half == 0 or rng.random() >= probability:
        return image, mask
    height, width = mask.shape[-2:]
    side = np.sqrt(1 - rng.random())
    h, w = max(1, round(height * side)), max(1, round(width * side))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    box = (..., slice(top, top + h), slice(left, left + w))
    partner = torch.cat(
        [torch.arange(half, 2 * half), torch.arange(half), torch.arange(2 * half, len(image))]
    )
    image, mask, source_image, source_mask = image.clone(), mask.clone(), image[partner], mask[partner]
    image[box], mask[box] = source_image[box], source_mask[box]
    return image, mask


def copy_paste(
    image: Tensor, mask: Tensor, rng: np.random.Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Paste the objects of another sample of the batch, mirrored at random (Ghiasi et al., CVPR 2021).

    Args:
        image: ``(B, C, H, W)``.
        mask: ``(B, H, W)``; all that is not background is an object.
        rng: source of the randomness.
        probability: chance that a sample is pasted into.
    """
    count = len(image)
    if count < 2 or probability == 0:
        return image, mask
    partner = (np.arange(count) + rng.integers(1, count, count)) % count
    receives, mirrored = rng.random(count) < probability, rng.random(count) < 0.5
    source_image, source_mask = image[partner], mask[partner]
    turned = torch.from_numpy(mirrored).to(mask.device)
    source_image = torch.where(turned[:, None, None, None], source_image.flip(-1), source_image)
    source_mask = torch.where(turned[:, None, None], source_mask.flip(-1), source_mask)
    pasted = (source_mask > 0) & torch.from_numpy(receives).to(mask.device)[:, None, None]
    return torch.where(pasted[:, None], source_image, image), torch.where(pasted, source_mask, mask)
