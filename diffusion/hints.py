"""What a ControlNet reads: masks and edges as pictures in [0, 1]."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def coloured(mask: Tensor, palette: Sequence[Sequence[float]]) -> Tensor:
    """Return class maps int64 ``(B, H, W)`` as pictures ``(B, 3, H, W)``, a colour in [0, 1] a class."""
    return torch.tensor(palette, dtype=torch.float32, device=mask.device)[mask].permute(0, 3, 1, 2)


def grey_levels(num_classes: int) -> list[list[float]]:
    """Return the palette that goes from black to white in even steps; two classes are black and white."""
    return [[k / (num_classes - 1)] * 3 for k in range(num_classes)]


def _gradient(picture: Tensor, side: float, middle: float) -> Tensor:
    """Return the length of the 3 × 3 gradient of ``(B, 1, H, W)``; the border is repeated."""
    across = picture.new_tensor([[-side, 0, side], [-middle, 0, middle], [-side, 0, side]])
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    return F.conv2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)


def contour(mask: Tensor) -> Tensor:
    """Return 1 where a class map ``(B, H, W)`` changes, else 0, ``(B, 1, H, W)``.

    The Scharr gradient, cut off at 1, as DiffBoost draws the outlines of its labels (Zhang et al.,
    IEEE TMI 2024).
    """
    return _gradient(mask.unsqueeze(1).float(), 3, 10).clamp(max=1)


class Sobel(nn.Module):
    """Edges by the Sobel gradient; the strongest of an image is 1."""

    def forward(self, image: Tensor) -> Tensor:
        """Return the edges of images ``(B, C, H, W)``, ``(B, 1, H, W)``."""
        edges = _gradient(image.mean(1, keepdim=True), 1, 2)
        return edges / edges.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
