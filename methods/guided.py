"""What the rivals that follow the segmenter's gradient have in common."""

import torch
from torch import Tensor

from diffusion.sampler import Sampler
from diffusion.schedule import predict_x0
from methods.method import PROBE, Request


def estimated_image(sampler: Sampler, x_t: Tensor, epsilon: Tensor, t: int | Tensor) -> Tensor:
    """Return the image of x̂_0|t, clipped to [−1, 1], differentiable; t is an int or int64 ``(B,)``."""
    backbone = sampler.backbone
    return backbone.decode(predict_x0(x_t, epsilon, backbone.alpha_bar(t))).clamp(-1, 1)


@torch.no_grad()
def base_latent(request: Request) -> Tensor:
    """Return the latents ``(B, *noise_shape)`` of plain sampling, before the decoder."""
    sampler = request.sampler
    return sampler.run(request.noise.draw(PROBE), request.condition, sampler.pairs)[0]


def pgd_step(x: Tensor, gradient: Tensor, centre: Tensor, step: float, radius: float) -> Tensor:
    """Return x + step · sign(gradient), projected on the ∞-norm ball of that radius around ``centre``."""
    return centre + (x + step * gradient.sign() - centre).clamp(-radius, radius)
