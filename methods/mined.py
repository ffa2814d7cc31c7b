"""Native adversarial synthesis: the miner shifts the initial noise, DDIM stays as it is."""

from typing import Any, Literal

from torch import Tensor

from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from methods.method import FRESH, PROBE, Method, Request
from networks.gaussian import ShiftedGaussian
from networks.miner import Miner
from networks.pretrained import load_pretrained

NoiseMode = Literal["fresh", "paired"]


def shift_noise(
    miner: Miner, sampler: Sampler, noise: NoiseStream, condition: Any, mode: NoiseMode
) -> tuple[Tensor, ShiftedGaussian]:
    """Return x_T^r and its distribution: probe x̂_T → S → (Δμ, ΔΣ) → x_T^r.

    Args:
        miner: M_ξ.
        sampler: DDIM through the frozen backbone; gives the initial score S.
        noise: the samples' own noise.
        condition: of the masks.
        mode: ``fresh`` resamples with a new ε, as the paper does; ``paired`` uses the probe again.
    """
    probe = noise.draw(PROBE)
    shifted = miner(sampler.initial_score(probe, condition))
    eps = probe if mode == "paired" else noise.draw(FRESH)
    return shifted.rsample(eps), shifted


class Mined(Method):
    """Resample the initial noise from N^r(Δμ, I + ΔΣ), then unmodified DDIM.

    Args:
        miner: folder of a trained miner, or the miner itself.
        noise: ``fresh`` or ``paired``, as the miner was trained.
    """

    name = "miner"

    def __init__(self, miner: str | Miner, noise: NoiseMode = "fresh") -> None:
        super().__init__()
        self.miner = miner if isinstance(miner, Miner) else load_pretrained(miner, Miner).freeze()
        self.noise: NoiseMode = noise

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``kl`` in nats."""
        x_T, shifted = shift_noise(self.miner, request.sampler, request.noise, request.condition, self.noise)
        return request.sampler.sample(x_T, request.condition), {"kl": shifted.kl()}

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`."""
        return {"miner": self.miner.fingerprint()}
