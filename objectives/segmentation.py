"""Segmentation losses."""

from collections.abc import Sequence

from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn.functional import interpolate

_dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)


def deep_supervision_weights(levels: int) -> list[float]:
    """Return nnU-Net's weights, finest first: 1/2^i, the coarsest 0, normalised to sum 1."""
    raw = [0.5**i for i in range(levels)]
    if levels > 1:
        raw[-1] = 0.0
    return [weight / sum(raw) for weight in raw]


def dice_ce(logits: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return cross-entropy + soft Dice loss, a scalar (Isensee et al., Nature Methods 2021).

    Dice is taken over the whole batch and leaves the background out.

    Args:
        logits: ``(B, K, H, W)``, or a list of them, finest first (deep supervision).
        mask: int64 ``(B, H, W)``; coarser levels see it by nearest neighbour.
    """
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    target = mask.unsqueeze(1)
    total = logits[0].new_zeros(())
    for level, weight in zip(levels, deep_supervision_weights(len(levels)), strict=True):
        if weight:
            resized = interpolate(target.float(), size=level.shape[2:], mode="nearest-exact")
            total = total + weight * _dice_ce(level.float(), resized)
    return total
