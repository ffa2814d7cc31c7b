"""InitNO: optimise the distribution of each initial noise through one call of the backbone."""

import math

import torch
from torch import Tensor

from errors import require
from methods.guided import estimated_image
from methods.method import Method, Request, gradient_of
from networks.gaussian import ShiftedGaussian
from objectives.nativeness import best_of_n_kl
from objectives.rewards import require_reward


class InitNO(Method):
    """Guo et al., "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise …", CVPR 2024.

    x_T = μ + σ ⊙ ε with μ and log σ² of each sample, both 0 at first, moved by Adam for ``steps`` steps.
    The authors lower attention scores of the first call of the backbone; here the segmenter's reward of
    x̂_0 at that call is raised. A sample stops as soon as its reward reaches ``target``, which stands for
    the authors' thresholds on their scores. One that does not starts anew from another ε, up to
    ``rounds`` times; of rounds without success the one with the highest final reward counts (the authors
    then add 50 more steps from its ε, which is left out). Then plain DDIM.

    KL(N(μ, σ²) ‖ N(0, I)) is kept to ``kl_bound`` as in the authors' code, as a constraint and not as
    a penalty: whenever a step leaves the bound the KL is brought back to it before the next step. They
    minimise the KL alone for that, by further steps of the same Adam; here (μ, log σ²) is shortened to
    the bound, the same end without a loop that need not end and that spoils Adam's averages.

    Args:
        steps: Adam steps a round. With 0 the rounds are best-of-N by the reward of x̂_0 at T.
        rounds: most rounds; the first starts from the noise of plain sampling.
        lr: Adam's learning rate.
        kl_bound: bound of the KL, in nats per dimension of the noise.
        target: reward at which a sample stops; null never stops, since x̂_0 at T is a blur, on which no
            value of a loss means what it means on a sample.
        reward: the reward, of each sample by itself.

    Raises:
        InputError: an argument is out of its range, or gradients are switched off (inference mode).
    """

    name = "initno"

    def __init__(
        self,
        steps: int = 10,
        rounds: int = 5,
        lr: float = 1e-2,
        kl_bound: float = 1e-3,
        target: float | None = None,
        reward: str = "ce",
    ) -> None:
        super().__init__()
        require(steps >= 0, "steps", steps, "must be at least 0")
        require(1 <= rounds <= 1000, "rounds", rounds, "choose 1 to 1000")
        require(0 < lr < math.inf, "lr", lr, "must be a positive number")
        require(0 <= kl_bound < math.inf, "kl_bound", kl_bound, "must be a number of at least 0")
        require(target is None or not math.isnan(target), "target", target, "must be a number, or null")
        require_reward(reward)
        self.steps = steps
        self.rounds = rounds
        self.lr = lr
        self.kl_bound = kl_bound
        self.target = math.inf if target is None else target
        self.reward = reward

    @torch.no_grad()
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``rounds`` R, and ``kl`` in nats.

        The latter is that of the round kept and what choosing among R can add, ln R − (R − 1)/R.
        """
        x_T, value, kl = self._round(request, 0)
        rounds = torch.ones_like(value)
        for number in range(1, self.rounds):
            again = value < self.target
            if not again.any():
                break
            rounds = rounds + again
            new_x_T, new_value, new_kl = self._round(request, number)
            better = again & (new_value > value)
            x_T = torch.where(better.view(-1, 1, 1, 1), new_x_T, x_T)
            value, kl = torch.where(better, new_value, value), torch.where(better, new_kl, kl)
        kl = kl + kl.new_tensor([best_of_n_kl(number) for number in rounds.int().tolist()])
        return request.sampler.sample(x_T, request.condition), {"kl": kl, "rounds": rounds, "x_T": x_T}

    def _round(self, request: Request, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_T, its reward and its KL after one round of optimisation."""
        noise = request.proposal(number)

        def reward(parameters: Tensor) -> Tensor:
            return self._reward(request, distribution(parameters).rsample(noise))

        parameters = torch.zeros(len(noise), 2, *noise.shape[1:], device=noise.device)
        optimizer = torch.optim.Adam([parameters], lr=self.lr, maximize=True)
        kept = parameters.clone()
        value = noise.new_full((len(noise),), -math.inf)
        for _ in range(self.steps):
            current, gradient = gradient_of(reward, parameters)
            kept, value = _advance(kept, value, parameters, current, self.target)
            if (value >= self.target).all():
                break
            parameters.grad = gradient
            optimizer.step()
            parameters.copy_(within_kl(parameters, self.kl_bound))
        else:
            kept, value = _advance(kept, value, parameters, reward(parameters), self.target)
        shifted = distribution(kept)
        return shifted.rsample(noise), value, shifted.kl()

    def _reward(self, request: Request, x_T: Tensor) -> Tensor:
        t = request.sampler.pairs[0][0]
        epsilon = request.sampler.epsilon(x_T, t, request.condition)
        return request.reward(estimated_image(request.sampler, x_T, epsilon, t), self.reward)


def _advance(
    kept: Tensor, value: Tensor, parameters: Tensor, current: Tensor, target: float
) -> tuple[Tensor, Tensor]:
    """Move every sample that has not reached the target to its newest parameters and their reward."""
    moving = value < target
    return (
        torch.where(moving.view(-1, 1, 1, 1, 1), parameters, kept),
        torch.where(moving, current, value),
    )


def distribution(parameters: Tensor) -> ShiftedGaussian:
    """Return N(μ, σ²) of (μ, log σ²) ``(B, 2, C, H, W)``."""
    mean, log_variance = parameters.unbind(1)
    return ShiftedGaussian(mean, log_variance.exp())


def within_kl(parameters: Tensor, bound: float) -> Tensor:
    """Return c · (μ, log σ²), ``(B, 2, C, H, W)``, with the largest c ≤ 1 that keeps the KL to the bound.

    The KL rises with c, so that c is found by bisection, each sample by itself; the bound is never passed.

    Args:
        parameters: μ and log σ².
        bound: of the KL in nats per dimension.
    """
    dimensions = parameters[0, 0].numel()

    def fits(c: Tensor) -> Tensor:
        return distribution(c.view(-1, 1, 1, 1, 1) * parameters).kl() <= bound * dimensions

    low, high = parameters.new_zeros(len(parameters)), parameters.new_ones(len(parameters))
    low = torch.where(fits(high), high, low)
    for _ in range(24):
        middle = (low + high) / 2
        fine = fits(middle)
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    return low.view(-1, 1, 1, 1, 1) * parameters
