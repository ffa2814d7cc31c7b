"""CIG: initial noise on the circle through two noised versions of a real image."""

import math

import torch
from torch import Tensor

from diffusion.schedule import add_noise
from methods.method import OWN, PROBE, Method, Request

SECOND, TURN = OWN + 2_000, OWN + 2_001
"""Streams of the second noise and of the position on the circle."""


def angle(z1: Tensor, z2: Tensor) -> Tensor:
    """Return θ = ∠(z1, z2) of each sample, radians in [0, π], float64 ``(B,)``."""
    a, b = z1.flatten(1).double(), z2.flatten(1).double()
    return torch.acos(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1))


def circle_interpolation(z1: Tensor, z2: Tensor, a: Tensor) -> Tensor:
    """Return z = [sin((1 + a)θ) z1 − sin(aθ) z2] / sin θ, like ``z1``, with θ = ∠(z1, z2).

    z starts at z1 for a = 0, leaves it away from z2, and is back at a = 2π/θ, having passed z2 at
    2π/θ − 1. For z1 and z2 of one norm all z have it. Not defined for z1 and z2 on one line.

    Args:
        z1: ``(B, C, H, W)``.
        z2: like ``z1``.
        a: ``(B,)``.
    """
    theta = angle(z1, z2)
    first = torch.sin((1 + a.double()) * theta) / torch.sin(theta)
    second = -torch.sin(a.double() * theta) / torch.sin(theta)
    mixed = first.view(-1, 1, 1, 1) * z1.double() + second.view(-1, 1, 1, 1) * z2.double()
    return mixed.to(z1.dtype)


class CIG(Method):
    """Start DDIM at z = [sin((1 + a)θ) z1 − sin(aθ) z2] / sin θ, with a ~ U(0, 2π/θ).

    Circle interpolation of Wang et al., "Inversion Circle Interpolation: Diffusion-based Image
    Augmentation for Data-scarce Classification" (Diff-II), CVPR 2025, where z1 and z2 are DDIM
    inversions of two images of a class, with concepts learnt for it. As the authors of native
    adversarial synthesis compare with it, nothing is inverted or learnt: z1 and z2 are the real image,
    noised forward to T. To a mask belongs one real image, so that z2 is a second, independent noising of
    the same one.
    """

    name = "cig"

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``turn`` = aθ, the way along the circle in radians."""
        sampler = request.sampler
        real = sampler.backbone.encode(request.image)
        alpha_bar = sampler.backbone.alpha_bar(sampler.pairs[0][0])
        z1, z2 = (add_noise(real, request.noise.draw(stream), alpha_bar) for stream in (PROBE, SECOND))
        turn = 2 * math.pi * request.noise.scalars(lambda rng: rng.random(), TURN)
        x_T = circle_interpolation(z1, z2, turn / angle(z1, z2))
        return sampler.sample(x_T, request.condition), {"turn": turn, "x_T": x_T}
