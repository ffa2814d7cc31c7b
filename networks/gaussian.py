"""The shifted Gaussian N^r(Δμ, I + ΔΣ) that takes the place of the diffusion prior."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ShiftedGaussian:
    """Diagonal normal distribution of a batch of initial noises.

    Attributes:
        mean: Δμ ``(B, C, H, W)``.
        variance: 1 + ΔΣ ``(B, C, H, W)``, positive.
    """

    mean: Tensor
    variance: Tensor

    def rsample(self, eps: Tensor) -> Tensor:
        """Return x_T^r = Δμ + √(1 + ΔΣ) ⊙ ε for standard normal ε, both ``(B, C, H, W)``."""
        return self.mean + self.variance.sqrt() * eps

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of noises ``x``, like the mean, each ``(B,)`` in nats."""
        squares = (x - self.mean).square() / self.variance
        return -0.5 * (squares + self.variance.log() + math.log(2 * math.pi)).flatten(1).sum(1)

    def kl(self) -> Tensor:
        """Return KL(N^r ‖ N(0, I)) = ½ Σ (Δμ² + σ² − ln σ² − 1) of each sample ``(B,)``, in nats."""
        terms = self.mean.square() + self.variance - self.variance.log() - 1
        return 0.5 * terms.flatten(1).sum(1)
