"""What keeps a shifted noise native: budgets, norms, and gradients that need no backbone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def next_log_beta(log_beta: Tensor, kl: Tensor, budget: float, rate: float) -> Tensor:
    """Return ln β after a step of the controller that holds KL at a budget.

    ln β moves by ``rate`` · ln(KL / budget), at most ``rate`` either way. For a miner at its optimum
    KL ∝ β⁻ᵏ (k = 2 when the reward is linear in the shift), so that ln KL contracts to the budget by
    1 − k·rate a step; a rate well below 1/k keeps it damped while the miner lags behind.

    Args:
        log_beta: ln β, a scalar.
        kl: mean KL divergence of the batch in nats, a scalar.
        budget: nats to spend, positive.
        rate: gain of the controller.
    """
    return log_beta + rate * (kl.clamp(min=1e-12).log() - math.log(budget)).clamp(-1, 1)


def preserve_norm(x: Tensor, reference: Tensor) -> Tensor:
    """Return ``x`` scaled, sample by sample, to the norm of ``reference``, both ``(B, C, H, W)``.

    A draw from N(0, I) in d dimensions lies in a shell of radius √d and width O(1); sampled noise that
    is rescaled to its own draw's radius cannot leave that shell.
    """
    ratio = reference.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-12)
    return x * ratio[:, None, None, None]


def score_function(log_prob: Tensor, reward: Tensor, antithetic: Tensor) -> Tensor:
    """Return a surrogate ``(B,)`` whose gradient estimates that of E[reward] (Williams 1992).

    The baseline is the reward of the antithetic draw −ε, which has the same distribution.

    Args:
        log_prob: log-density of each draw, with a graph.
        reward: of the draw.
        antithetic: of the antithetic draw.
    """
    return 0.5 * (reward - antithetic).detach() * log_prob


def overlap(mean: Tensor, others: list[Tensor]) -> Tensor:
    """Return the mean squared cosine between a shift and others of the same samples ``(B,)``, in [0, 1].

    Args:
        mean: Δμ ``(B, C, H, W)``.
        others: shifts by other miners, like ``mean``; at least one.
    """
    cosines = [F.cosine_similarity(mean.flatten(1), other.flatten(1), dim=1) for other in others]
    return torch.stack(cosines).square().mean(0)
