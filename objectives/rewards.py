"""Adversariality: how hard a segmenter finds each image, given the mask that made it. Larger is harder."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import require

Reward = Callable[[Tensor, Tensor], Tensor]
Transform = Literal["none", "log"]

FLOOR = 1e-3
"""Added to a loss before its logarithm: what lies below is learnt, and its ratios are noise."""


def ce(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy over the pixels of each sample ``(B,)``, in [0, ∞) nats.

    Args:
        logits: ``(B, K, H, W)``.
        mask: int64 ``(B, H, W)``.
    """
    return F.cross_entropy(logits, mask, reduction="none").flatten(1).mean(1)


def bounded_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − exp(−mean cross-entropy) of each sample ``(B,)``, in [0, 1): the authors' "lce"."""
    return 1 - torch.exp(-ce(logits, mask))


def balanced_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """Return cross-entropy averaged in each class that the mask has, then over those classes ``(B,)``."""
    pixels = F.cross_entropy(logits, mask, reduction="none").flatten(1)
    member = F.one_hot(mask, logits.shape[1]).flatten(1, 2).to(pixels.dtype)
    count = member.sum(1)
    # No einsum: mixed precision would take the sums over all pixels in half.
    per_class = (pixels.unsqueeze(2) * member).sum(1) / count.clamp(min=1)
    return per_class.sum(1) / (count > 0).sum(1)


def bounded_balanced_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − exp(−class-balanced cross-entropy) of each sample ``(B,)``, in [0, 1)."""
    return 1 - torch.exp(-balanced_ce(logits, mask))


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − soft Dice, averaged over the foreground classes that the mask has ``(B,)``, in [0, 1].

    A mask without foreground, for which Dice is not defined, gives 0.
    """
    probability = logits.softmax(1)[:, 1:].flatten(2)
    target = F.one_hot(mask, logits.shape[1])[..., 1:].flatten(1, 2).transpose(1, 2).to(probability.dtype)
    overlap = 2 * (probability * target).sum(2) / (probability.sum(2) + target.sum(2)).clamp(min=1e-8)
    present = target.sum(2) > 0
    return ((1 - overlap) * present).sum(1) / present.sum(1).clamp(min=1)


def focal(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the mean focal loss of each sample ``(B,)`` (Lin et al., ICCV 2017), in [0, ∞)."""
    log_p = F.log_softmax(logits, dim=1).gather(1, mask.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** gamma * log_p).flatten(1).mean(1)


REWARDS: dict[str, Reward] = {
    reward.__name__: reward for reward in (ce, bounded_ce, balanced_ce, bounded_balanced_ce, dice, focal)
}


def require_reward(name: str, argument: str = "reward") -> None:
    """Raise :class:`InputError` unless a reward is known."""
    require(name in REWARDS, argument, name, f"is unknown; choose {', '.join(REWARDS)}")


def reducible(reward: Tensor, reference: Tensor, weight: float, transform: Transform = "none") -> Tensor:
    """Return φ(ℓ_anchor) − λ·φ(ℓ_reference) ``(B,)``: what is hard, but not for one who has learnt it.

    A sample that a stronger segmenter finds as hard is ambiguous or wrongly labelled: nothing in it can be
    learnt. As in the reducible holdout loss of Mindermann et al., ICML 2022.

    Args:
        reward: ℓ_anchor ``(B,)``, never negative.
        reference: ℓ_reference, likewise.
        weight: λ.
        transform: φ; ``log`` compares by ratio, ``none`` takes the losses as they are.
    """
    if transform == "none":
        return reward - weight * reference
    return (reward + FLOOR).log() - weight * (reference + FLOOR).log()


def clipped(reward: Tensor, kappa_up: float) -> Tensor:
    """Return ℓ_adv = min(κ_up, reward) ``(B,)``: no gradient above the cap."""
    return reward.clamp(max=kappa_up)
