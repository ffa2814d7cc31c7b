"""AdvDiffuser: attack every step of the sampler, and keep the object."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.schedule import add_noise, predict_x0
from errors import InputError, require
from methods.guided import base_latent, pgd_step
from methods.method import OWN, PROBE, Method, Request, gradient_of
from networks.segmenter import Segmenter
from objectives.rewards import require_reward


class AdvDiffuser(Method):
    """Chen et al., "AdvDiffuser: Natural Adversarial Example Synthesis with Diffusion Models", ICCV 2023.

    Each step of the schedule: an ancestral step gives x_{t−1}; ``pgd_steps`` steps of projected gradient
    ascent on ℓ(f_ϑ(x_{t−1}), y) move it within a ball; then the object region of the base sample is put
    back, x_{t−1} ← m ⊙ (base sample noised to t−1) + (1 − m) ⊙ x_{t−1}, "adversarial inpainting".
    What is chosen here where the paper leaves room:

    - The base sample is plain sampling from the same initial noise, and that noise also takes it to t−1.
    - f_ϑ sees the noisy x_{t−1}, decoded, neither clipped nor denoised: no gradient through the backbone.
    - The ball is that of the ∞-norm, so that it means the same at every image size. Its radius is σ·β_t
      with β_t = 1 − ᾱ_t / ᾱ_{t−1} of the schedule that is walked (50 steps, not 1000): it shrinks as the
      image emerges. A step is radius · min(1, 2.5 / ``pgd_steps``) along the gradient's sign.
    - m is :func:`grad_cam` of the base sample, at the size of the noise.

    Args:
        eta: η of the ancestral step, 0 (DDIM) to 1 (DDPM); 0.1 in the comparison of the paper that
            describes the miner.
        sigma: σ, strength of the attack, to be swept; the default is ours.
        pgd_steps: ascent steps on each x_{t−1}; 0 is no attack.
        region: what is kept of the base sample: ``grad_cam``, or ``none`` (m = 0).
        reward: ℓ, of each sample by itself.

    Raises:
        InputError: an argument is out of its range, or gradients are switched off (inference mode).
    """

    name = "advdiffuser"

    def __init__(
        self,
        eta: float = 0.1,
        sigma: float = 0.5,
        pgd_steps: int = 1,
        region: Literal["grad_cam", "none"] = "grad_cam",
        reward: str = "ce",
    ) -> None:
        super().__init__()
        require(0 <= eta <= 1, "eta", eta, "choose 0 (DDIM) to 1 (DDPM)")
        require(0 <= sigma < math.inf, "sigma", sigma, "must be a number of at least 0")
        require(pgd_steps >= 0, "pgd_steps", pgd_steps, "must be at least 0; 0 is no attack")
        require(region in ("grad_cam", "none"), "region", region, "choose grad_cam or none")
        require_reward(reward)
        self.eta = eta
        self.sigma = sigma
        self.pgd_steps = pgd_steps
        self.region = region
        self.reward = reward

    @torch.no_grad()
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``kept``, the mean of m."""
        sampler, backbone = request.sampler, request.sampler.backbone
        probe = request.noise.draw(PROBE)
        base, kept = probe, probe.new_zeros(len(probe), 1, 1, 1)
        if self.region == "grad_cam":
            base = base_latent(request)
            kept = grad_cam(request.anchor, backbone.decode(base).clamp(-1, 1), request.mask)
            kept = F.interpolate(kept, base.shape[-2:], mode="bilinear", align_corners=False)
        x = probe
        for i, (t, t_prev) in enumerate(sampler.pairs):
            alpha_bar, previous = backbone.alpha_bar(t), backbone.alpha_bar(t_prev)
            epsilon = sampler.epsilon(x, t, request.condition)
            x_0 = sampler.clip(predict_x0(x, epsilon, alpha_bar))
            noise = request.noise.draw(OWN + i) if self.eta else torch.zeros_like(x)
            x = ancestral_step(x_0, epsilon, noise, alpha_bar, previous, self.eta)
            x = self._attack(x, self.sigma * float(1 - alpha_bar / previous), request)
            if self.region != "none":
                x = kept * add_noise(base, probe, previous) + (1 - kept) * x
        return backbone.decode(x).clamp(-1, 1), {"kept": kept.mean((1, 2, 3))}

    def _attack(self, x: Tensor, radius: float, request: Request) -> Tensor:
        """Return x_{t−1} after the ascent."""
        centre = x
        for _ in range(self.pgd_steps):
            _, gradient = gradient_of(
                lambda z: request.reward(request.sampler.backbone.decode(z), self.reward), x
            )
            x = pgd_step(x, gradient, centre, radius * min(1, 2.5 / self.pgd_steps), radius)
        return x


def ancestral_step(
    x_0: Tensor, epsilon: Tensor, noise: Tensor, alpha_bar: Tensor, previous: Tensor, eta: float
) -> Tensor:
    """Return x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1 − ᾱ_{t−1} − σ_t²) ε + σ_t z.

    Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equations 12 and 16:
    σ_t = η √((1 − ᾱ_{t−1}) / (1 − ᾱ_t)) √(1 − ᾱ_t / ᾱ_{t−1}).

    Args:
        x_0: x̂_0.
        epsilon: ε_φ(x_t, t | y).
        noise: standard normal z.
        alpha_bar: ᾱ_t.
        previous: ᾱ_{t−1}, of the next timestep of the schedule.
        eta: η.
    """
    variance = eta**2 * (1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)
    return previous.sqrt() * x_0 + (1 - previous - variance).sqrt() * epsilon + variance.sqrt() * noise


def grad_cam(anchor: Segmenter, image: Tensor, mask: Tensor) -> Tensor:
    """Return where the anchor looks for the object, in [0, 1], ``(B, 1, h, w)`` like its features.

    Grad-CAM (Selvaraju et al., ICCV 2017) of a segmenter, as Vinogradova et al. (Seg-Grad-CAM, AAAI 2020)
    have it. A = ``anchor.features(image)``, the deepest feature map; S = the sum, over the pixels that y
    gives to a foreground class, of the logit of that class; α_k = the mean over positions of ∂S/∂A_k;
    m = ReLU(Σ_k α_k A_k), divided by its maximum in each image. A mask without foreground gives 0.

    Raises:
        InputError: no module of the anchor puts out what ``features`` returns, or gradients are switched
            off (inference mode).
    """
    layer, features = _layer_of_features(anchor, image)
    object_mask = (mask > 0).float()

    def score(offset: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda module, inputs, output: output + offset)
        try:
            logits = anchor(image).float()
        finally:
            handle.remove()
        own = logits.gather(1, mask.unsqueeze(1)).squeeze(1)
        return (own * object_mask).flatten(1).sum(1)

    _, slope = gradient_of(score, torch.zeros_like(features))
    alpha = slope.mean((2, 3), keepdim=True)
    cam = (alpha * features).sum(1, keepdim=True).relu()
    return cam / cam.amax((2, 3), keepdim=True).clamp(min=torch.finfo(cam.dtype).tiny)


@torch.no_grad()
def _layer_of_features(anchor: Segmenter, image: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the module whose output ``anchor.features`` returns, the outermost of them, and that output."""
    outputs: list[tuple[nn.Module, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append((module, output)))
        for module in anchor.modules()
    ]
    try:
        features = anchor.features(image)
    finally:
        for handle in handles:
            handle.remove()
    layers = [module for module, output in outputs if output is features]
    if not layers:
        raise InputError(
            f"region 'grad_cam': no module of {type(anchor).__name__} puts out its features; choose none"
        )
    return layers[-1], features
