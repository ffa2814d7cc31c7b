"""Adversarial guidance: the segmenter's gradient is added to the score at every step."""

import math

import torch
from torch import Tensor

from diffusion.schedule import add_noise, predict_x0
from errors import require
from methods.guided import estimated_image
from methods.method import PROBE, Method, Request, gradient_of
from objectives.rewards import require_reward


class AdversarialGuidance(Method):
    """Follow s_φ(x_t, t | y) + λ ∇_{x_t} ℓ(f_ϑ(x̂_0|t), y) in place of the score, by plain DDIM (AG).

    The form is that of classifier guidance (Dhariwal & Nichol, "Diffusion Models Beat GANs on Image
    Synthesis", NeurIPS 2021, algorithm 2): with s = −ε/√(1 − ᾱ_t) it reads
    ε̂ = ε_φ − √(1 − ᾱ_t) · λ ∇_{x_t} ℓ. Their log p(y | x_t) becomes the segmenter's loss, which is to
    rise, and their classifier of noisy images becomes the frozen segmenter on x̂_0|t. The gradient goes
    through the decoder and the backbone, a step at a time, and vanishes where x̂_0|t is saturated.

    Where the sampler clips x̂_0, it clips that of the model and the guidance is added to it, as in their
    code. Clipped afterwards, x̂_0 would lose what guidance adds to it, and what ε̂ takes away would remain:
    the sample would go down the gradient.

    Args:
        scale: λ, to be swept; the default is ours, and 0 is plain sampling. ℓ is a mean over pixels, so
            that its gradient shrinks as images grow: a λ holds for one image size and one reward.
        reward: ℓ, of each sample by itself.

    Raises:
        InputError: an argument is out of its range, or gradients are switched off (inference mode).
    """

    name = "ag"

    def __init__(self, scale: float = 10.0, reward: str = "ce") -> None:
        super().__init__()
        require(math.isfinite(scale), "scale", scale, "must be a finite number; 0 is plain sampling")
        require_reward(reward)
        self.scale = scale
        self.reward = reward

    @torch.no_grad()
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`."""
        sampler, backbone = request.sampler, request.sampler.backbone
        x = request.noise.draw(PROBE)
        for t, t_prev in sampler.pairs:
            alpha_bar = backbone.alpha_bar(t)
            epsilon, gradient = self._gradient(x, t, request)
            guided = guided_epsilon(epsilon, gradient, alpha_bar, self.scale)
            x_0 = sampler.clip(predict_x0(x, epsilon, alpha_bar))
            x_0 = x_0 + (1 / alpha_bar - 1).sqrt() * (epsilon - guided)
            x = add_noise(x_0, guided, backbone.alpha_bar(t_prev))
        return backbone.decode(x).clamp(-1, 1), {}

    def _gradient(self, x_t: Tensor, t: int, request: Request) -> tuple[Tensor, Tensor]:
        """Return ε_φ(x_t, t | y) and ∇_{x_t} ℓ, by one call of the backbone."""
        called: list[Tensor] = []

        def reward(x: Tensor) -> Tensor:
            epsilon = request.sampler.epsilon(x, t, request.condition)
            called.append(epsilon.detach())
            return request.reward(estimated_image(request.sampler, x, epsilon, t), self.reward)

        _, gradient = gradient_of(reward, x_t)
        return called[0], gradient


def guided_epsilon(epsilon: Tensor, gradient: Tensor, alpha_bar: Tensor, scale: float) -> Tensor:
    """Return ε̂ = ε − √(1 − ᾱ_t) · λ ∇ℓ, the score s + λ ∇ℓ written as ε."""
    return epsilon - (1 - alpha_bar).sqrt() * scale * gradient
