"""Segmentation losses."""

from collections.abc import Sequence

from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn.functional import interpolate

from errors import InputError

Logits = Tensor | Sequence[Tensor]


def deep_supervision_weights(levels: int) -> list[float]:
    """Return nnU-Net's weights, finest first: 1/2^i, the coarsest 0, normalised to sum 1."""
    raw = [0.5**i for i in range(levels)]
    if levels > 1:
        raw[-1] = 0.0
    return [weight / sum(raw) for weight in raw]


class DiceCE:
    """Cross-entropy + soft Dice loss; nnU-Net's by default (Isensee et al., Nature Methods 2021).

    Dice is taken over the whole batch, as the mean over classes. Swin-Unet's (Cao et al., ECCV Workshops
    2022) has ``ce`` 0.4, ``dice`` 0.6, ``background`` and ``squared``.

    Args:
        ce: weight of the cross-entropy.
        dice: weight of the Dice loss.
        background: the background counts as a class of Dice.
        squared: Dice has Σp² + Σg² below, not Σp + Σg.

    Raises:
        InputError: a weight is negative, or both are 0.
    """

    def __init__(
        self, ce: float = 1.0, dice: float = 1.0, background: bool = False, squared: bool = False
    ) -> None:
        if min(ce, dice) < 0 or ce + dice == 0:
            raise InputError(f"loss: the weights ce {ce} and dice {dice} must not be negative, nor both 0")
        self.loss = DiceCELoss(
            include_background=background,
            to_onehot_y=True,
            softmax=True,
            squared_pred=squared,
            batch=True,
            lambda_ce=ce,
            lambda_dice=dice,
        )

    def __call__(self, logits: Logits, mask: Tensor) -> Tensor:
        """Return the loss, a scalar.

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
                total = total + weight * self.loss(level.float(), resized)
            else:  # several processes wait for a gradient of every weight, be it 0
                total = total + 0 * level.float().sum()
        return total


_nnunet = DiceCE()


def dice_ce(logits: Logits, mask: Tensor) -> Tensor:
    """Return nnU-Net's loss, :class:`DiceCE` with its defaults, a scalar."""
    return _nnunet(logits, mask)
