"""Native adversarial synthesis: the miner shifts the initial noise, DDIM stays as it is."""

from typing import Literal

import torch
from torch import Tensor

from methods.method import FRESH, PROBE, Method, Request
from networks.gaussian import ShiftedGaussian
from networks.miner import Miner
from networks.pretrained import frozen
from objectives.nativeness import preserve_norm

NoiseMode = Literal["fresh", "paired"]


def propose(miner: Miner, request: Request, probe: Tensor) -> ShiftedGaussian:
    """Return the distribution that the miner proposes for a probe x̂_T: response → (Δμ, ΔΣ)."""
    with torch.no_grad():
        response = request.sampler.response(probe, request.condition, miner)
    return miner(response, request.mask)


def draw(shifted: ShiftedGaussian, eps: Tensor, keep_norm: bool) -> Tensor:
    """Return x_T^r = Δμ + √(1 + ΔΣ) ⊙ ε, on request rescaled to the norm of ε."""
    x_T = shifted.rsample(eps)
    return preserve_norm(x_T, eps) if keep_norm else x_T


class Mined(Method):
    """Resample the initial noise from N^r(Δμ, I + ΔΣ), then unmodified DDIM.

    Args:
        miner: folder of a trained miner, or the miner itself.
        noise: ``fresh`` resamples with a new ε, as the paper does; ``paired`` uses the probe again.
        keep_norm: rescale the shifted noise to the norm of its draw.
    """

    name = "miner"

    def __init__(self, miner: str | Miner, noise: NoiseMode = "fresh", keep_norm: bool = False) -> None:
        super().__init__()
        self.miner = frozen(miner, Miner)
        self.noise: NoiseMode = noise
        self.keep_norm = keep_norm

    def shift(self, request: Request) -> tuple[Tensor, Tensor, ShiftedGaussian]:
        """Return x_T^r, the ε that it came from, and its distribution; differentiable in the miner."""
        probe = request.noise.draw(PROBE)
        shifted = propose(self.miner, request, probe)
        eps = probe if self.noise == "paired" else request.noise.draw(FRESH)
        return draw(shifted, eps, self.keep_norm), eps, shifted

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``kl`` of N^r from N(0, I) in nats.

        With paired noise, on which the shift itself depends, that is how large the shift is, ½‖Δμ‖² and
        what the variance adds; not how far the shifted noises, taken together, are from N(0, I).
        """
        x_T, _, shifted = self.shift(request)
        return request.sampler.sample(x_T, request.condition), {"kl": shifted.kl(), "x_T": x_T}

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`."""
        return {"miner": self.miner.fingerprint()}
