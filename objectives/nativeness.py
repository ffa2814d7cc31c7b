"""What keeps a shifted noise native: budgets, norms, and gradients that need no backbone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def controlled_beta(log_beta: Tensor, kl: Tensor, budget: float) -> Tensor:
    """Return β of a step under a KL budget: exp(ln β) · KL / budget, without a graph.

    The proportional part of the controller: it answers at once when the miner leaves the budget behind,
    long before the slow integral part, ln β, has moved.

    Args:
        log_beta: ln β, a scalar.
        kl: mean KL divergence of the batch in nats, a scalar.
        budget: nats to spend, positive.
    """
    return log_beta.exp() * kl.detach() / budget


def next_log_beta(log_beta: Tensor, kl: Tensor, budget: float, rate: float) -> Tensor:
    """Return ln β after a step of the controller that holds KL at a budget.

    ln β moves by ``rate`` · ln(KL / budget), and at most by ``rate`` upwards and half of that downwards:
    a miner that starts at the prior, and so at KL 0, is still to be braked when it gets going.

    Args:
        log_beta: ln β, a scalar.
        kl: mean KL divergence of the batch in nats, a scalar.
        budget: nats to spend, positive.
        rate: gain of the integral part; well below 1, so that it lags behind the miner.
    """
    return log_beta + rate * (kl.clamp(min=1e-12).log() - math.log(budget)).clamp(-0.5, 1)


def preserve_norm(x: Tensor, reference: Tensor) -> Tensor:
    """Return ``x`` scaled, sample by sample, to the norm of ``reference``, both ``(B, C, H, W)``.

    A draw from N(0, I) in d dimensions lies in a shell of radius √d and width O(1); sampled noise that
    is rescaled to its own draw's radius cannot leave that shell.
    """
    ratio = reference.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-12)
    return x * ratio[:, None, None, None]


def score_function(log_prob: Tensor, reward: Tensor) -> Tensor:
    """Return a surrogate ``(B,)`` whose gradient estimates that of E[reward] (Williams 1992).

    From each ε and its antithetic −ε; the baseline of a sample is the mean reward of the others in the
    batch, 0 where there are none. In the gradient for the mean the baseline cancels within a pair, in that
    for the variance it does not.

    Args:
        log_prob: log-density of each draw ``(2, B)``, with a graph: first of all ε, then of all −ε.
        reward: of each draw ``(2, B)``.
    """
    pair = reward.detach().mean(0)
    baseline = (pair.sum() - pair) / max(len(pair) - 1, 1)
    return ((reward.detach() - baseline) * log_prob).mean(0)


def overlap(mean: Tensor, others: list[Tensor]) -> Tensor:
    """Return the mean squared cosine between a shift and others of the same samples ``(B,)``, in [0, 1].

    Args:
        mean: Δμ ``(B, C, H, W)``.
        others: shifts by other miners, like ``mean``; at least one.
    """
    cosines = [F.cosine_similarity(mean.flatten(1), other.flatten(1), dim=1) for other in others]
    return torch.stack(cosines).square().mean(0)


def best_of_n_kl(n: int) -> float:
    """Return ln N − (N − 1)/N nats, the divergence of the best of N draws from one draw."""
    return math.log(n) - (n - 1) / n
