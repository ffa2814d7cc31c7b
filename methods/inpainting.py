"""Inpainting: the real object before a new background."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.schedule import add_noise
from errors import require
from methods.method import OWN, PROBE, Method, Request

KNOWN, JUMP = 10 * OWN, 11 * OWN
"""First streams of the known part's noise and of the jumps' noise, one a call of the backbone."""
_MOST_CALLS = 100


def foreground(mask: Tensor, dilate: int) -> Tensor:
    """Return where the mask is not background, grown by ``dilate`` pixels on each side: ``(B, 1, H, W)``."""
    member = (mask > 0).unsqueeze(1)
    if not dilate:
        return member
    return F.max_pool2d(member.float(), 2 * dilate + 1, stride=1, padding=dilate) > 0


class Inpainting(Method):
    """Keep the foreground of the real image and sample the background around it.

    After AugPaint (inpainting of the background around kept lesions), by the sampler of Lugmayr et al.,
    "RePaint: Inpainting using Denoising Diffusion Probabilistic Models", CVPR 2022, Algorithm 1: after
    each step the known part is replaced by the real image, noised to the same timestep with fresh noise,
    x ← m ⊙ (√ᾱ x_0 + √(1 − ᾱ) ε) + (1 − m) ⊙ x; each step may be taken several times, going back by
    x_t = √(ᾱ_t/ᾱ_s) x_s + √(1 − ᾱ_t/ᾱ_s) ε, so that the two parts come to agree. The unknown part moves
    by DDIM where RePaint has ancestral sampling.

    The foreground of the real image is pasted into the decoded result: its pixels are exactly the real
    ones. In pixel space the sampler arrives there by itself; for a latent backbone the mask is resized to
    the latent's size (nearest), and pasting also restores what the decoder changed.

    Args:
        dilate: pixels by which the kept region is grown on each side.
        resample: how often each step of the schedule is taken, RePaint's U at a jump length of one; 1 does
            not go back. The cost grows in proportion.

    Raises:
        InputError: an argument is out of its range.
    """

    name = "inpainting"

    def __init__(self, dilate: int = 0, resample: int = 1) -> None:
        super().__init__()
        require(dilate >= 0, "dilate", dilate, "must be at least 0 pixels")
        require(1 <= resample <= _MOST_CALLS, "resample", resample, f"choose 1 (no jumps) to {_MOST_CALLS}")
        self.dilate = dilate
        self.resample = resample

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`."""
        sampler, noise = request.sampler, request.noise
        backbone = sampler.backbone
        keep = foreground(request.mask, self.dilate)
        real = backbone.encode(request.image)
        held = F.interpolate(keep.float(), size=real.shape[-2:], mode="nearest-exact") > 0
        x, call = noise.draw(PROBE), 0
        for t, t_prev in sampler.pairs:
            alpha_bar = backbone.alpha_bar(t_prev)
            repeats = self.resample if t_prev >= 0 else 1
            for repeat in range(repeats):
                x, _ = sampler.run(x, request.condition, [(t, t_prev)])
                x = torch.where(held, add_noise(real, noise.draw(KNOWN + call), alpha_bar), x)
                if repeat + 1 < repeats:
                    x = add_noise(x, noise.draw(JUMP + call), backbone.alpha_bar(t) / alpha_bar)
                call += 1
        image = torch.where(keep, request.image, backbone.decode(x))
        return image.clamp(-1, 1), {}
