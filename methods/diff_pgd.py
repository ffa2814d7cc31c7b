"""Diff-PGD: projected gradient ascent on an image that is purified by the diffusion model."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion.schedule import add_noise
from errors import InputError, require
from methods.guided import pgd_step
from methods.method import OWN, PROBE, Method, Request, gradient_of
from objectives.rewards import require_reward


class DiffPGD(Method):
    """Xue et al., "Diffusion-Based Adversarial Sample Generation …", NeurIPS 2023.

    x is the base sample. Each iteration: x_d = SDEdit(x + δ) noises the image to the ``t``-th last
    timestep of the sampler's schedule and takes it back by the remaining ``t`` DDIM steps,
    δ ← clip(δ + α · sign ∇ℓ(f_ϑ(x_d), y), ±ε), and x + δ stays in the image's range. The sample is x_d of
    the last δ. As in the authors' code δ starts at 0 and every SDEdit draws new noise (from the sample's
    own streams); the t = 3 of their code counts from 0 and so means four steps, which here is ``t`` = 4.

    Args:
        epsilon: ε, the largest change of a pixel, for images in [0, 1] (in [−1, 1] it is twice that).
        alpha: α, the size of a step, likewise.
        iterations: steps of the ascent; 0 is SDEdit of the base sample.
        t: steps of SDEdit, of the sampler's (3 of 50 in the comparison of the miner's paper).
        gradient: ``full`` is ∂ℓ/∂δ, through encoder, decoder and ``t`` calls of the backbone, each called
            again in the backward pass; ``approximate`` is ∂ℓ/∂x_d, the authors' faster version, which
            takes SDEdit's Jacobian for the identity.
        reward: ℓ, of each sample by itself.

    Raises:
        InputError: an argument is out of its range, ``t`` is more than the sampler has, or gradients are
            switched off (inference mode).
    """

    name = "diff_pgd"

    def __init__(
        self,
        epsilon: float = 16 / 255,
        alpha: float = 2 / 255,
        iterations: int = 10,
        t: int = 3,
        gradient: Literal["full", "approximate"] = "full",
        reward: str = "ce",
    ) -> None:
        super().__init__()
        require(0 <= epsilon <= 1, "epsilon", epsilon, "choose 0 to 1, for images in [0, 1]")
        require(0 <= alpha < math.inf, "alpha", alpha, "must be a number of at least 0")
        require(iterations >= 0, "iterations", iterations, "must be at least 0")
        require(t >= 1, "t", t, "must be at least 1 step of the sampler")
        require(gradient in ("full", "approximate"), "gradient", gradient, "choose full or approximate")
        require_reward(reward)
        self.epsilon = epsilon
        self.alpha = alpha
        self.iterations = iterations
        self.t = t
        self.gradient = gradient
        self.reward = reward

    @torch.no_grad()
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``delta``, the largest |δ| for images in [0, 1]."""
        steps = len(request.sampler.pairs)
        if self.t > steps:
            raise InputError(f"t {self.t}: the sampler has {steps} steps; choose 1 to {steps}")
        x = request.sampler.sample(request.noise.draw(PROBE), request.condition)
        delta = torch.zeros_like(x)
        for i in range(self.iterations):
            delta = image_delta(x, delta, self._ascent(x, delta, i, request), self.alpha, self.epsilon)
        sample = self._sdedit(x + delta, self.iterations, request)
        return sample, {"delta": delta.abs().flatten(1).amax(1) / 2}

    def _ascent(self, x: Tensor, delta: Tensor, iteration: int, request: Request) -> Tensor:
        """Return the direction of the ascent in δ."""
        if self.gradient == "approximate":
            purified = self._sdedit(x + delta, iteration, request)
            return gradient_of(lambda image: request.reward(image, self.reward), purified)[1]

        def reward(change: Tensor) -> Tensor:
            return request.reward(self._sdedit(x + change, iteration, request), self.reward)

        return gradient_of(reward, delta)[1]

    def _sdedit(self, image: Tensor, iteration: int, request: Request) -> Tensor:
        """Return x_d in [−1, 1]; differentiable, with the backbone's calls checkpointed."""
        sampler, pairs = request.sampler, request.sampler.pairs[-self.t :]
        backbone = sampler.backbone

        def epsilon(x_t: Tensor, t: int, condition: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return sampler.epsilon(x_t, t, condition)
            return checkpoint(sampler.epsilon, x_t, t, condition, use_reentrant=False)

        noise = request.noise.draw(OWN + iteration)
        x_t = add_noise(backbone.encode(image), noise, backbone.alpha_bar(pairs[0][0]))
        latent, _ = sampler.run(x_t, request.condition, pairs, epsilon)
        return backbone.decode(latent).clamp(-1, 1)


def image_delta(x: Tensor, delta: Tensor, gradient: Tensor, alpha: float, epsilon: float) -> Tensor:
    """Return δ after a step of ascent, for images x in [−1, 1].

    Args:
        x: the image that δ is added to.
        delta: δ.
        gradient: its sign is the direction.
        alpha: α, for images in [0, 1].
        epsilon: ε, for images in [0, 1].
    """
    moved = pgd_step(delta, gradient, torch.zeros_like(delta), 2 * alpha, 2 * epsilon)
    return moved.clamp(-1 - x, 1 - x)
