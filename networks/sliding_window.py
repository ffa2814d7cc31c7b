"""Inference on overlapping windows with Gaussian weights, and mirrored, as nnU-Net predicts.

MONAI's windows keep their distance and push the last one back to the border, and its Gaussian is not cut off;
nnU-Net spreads its windows evenly. Source: Isensee et al., Nature Methods 2021; nnunetv2 2.8.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import pad

SIGMA = 1 / 8
"""Standard deviation of the weights, as a share of the window's edge."""


@lru_cache(maxsize=4)
def gaussian(window: tuple[int, ...]) -> Tensor:
    """Return the weights of a window's pixels, float32, 1 in the middle and nowhere 0."""
    impulse = np.zeros(window)
    impulse[tuple(edge // 2 for edge in window)] = 1
    weights = gaussian_filter(impulse, [edge * SIGMA for edge in window], mode="constant")
    weights /= weights.max()
    weights[weights == 0] = weights[weights > 0].min()
    return torch.from_numpy(weights).float()


def window_starts(size: int, window: int, step: float = 0.5) -> list[int]:
    """Return where windows start along an edge, evenly and at most ``step`` windows apart.

    Args:
        size: of the image in pixels, at least ``window``.
        window: of the window in pixels.
        step: largest distance, as a share of the window, in (0, 1].
    """
    count = math.ceil((size - window) / (window * step)) + 1
    distance = (size - window) / max(count - 1, 1)
    return [int(np.round(distance * k)) for k in range(count)]


def mirrored(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Return the mean of the predictions for an image and its mirror images along both edges, turned back."""
    total = predict(image)
    flips = [axes for count in (1, 2) for axes in combinations((-2, -1), count)]
    for axes in flips:
        total = total + predict(image.flip(axes)).flip(axes)
    return total / (len(flips) + 1)


def sliding_window(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    step: float = 0.5,
    mirror: bool = True,
) -> Tensor:
    """Return the logits of images of any size, the weighted mean over all windows.

    Smaller images are padded with 0 on all sides and the logits cut back.

    Args:
        predict: logits ``(B, K, h, w)`` of windows ``(B, C, h, w)``.
        image: ``(B, C, H, W)``, normalised: 0 is what lies beyond the border.
        window: height and width of the windows.
        step: largest distance of windows, as a share of their edges.
        mirror: average over mirror images of each window.
    """
    height, width = image.shape[-2:]
    missing = [max(edge - size, 0) for edge, size in zip(window, (height, width), strict=True)]
    top, left = (gap // 2 for gap in missing)
    image = pad(image, (left, missing[1] - left, top, missing[0] - top))
    starts = [window_starts(*pair, step) for pair in zip(image.shape[-2:], window, strict=True)]
    weights = gaussian((window[0], window[1])).to(image.device)
    total, weight = torch.zeros((), device=image.device), image.new_zeros(image.shape[-2:])
    for row, column in product(*starts):
        place = (..., slice(row, row + window[0]), slice(column, column + window[1]))
        logits = (mirrored(predict, image[place]) if mirror else predict(image[place])).float()
        if not total.ndim:
            total = logits.new_zeros((*logits.shape[:2], *image.shape[-2:]))
        total[place] += logits * weights
        weight[place] += weights
    return (total / weight)[..., top : top + height, left : left + width]
