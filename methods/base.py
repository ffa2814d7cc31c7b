"""Plain sampling: the yardstick of every other method."""

from typing import Any

from torch import Tensor

from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from methods.method import PROBE, Method


class Base(Method):
    """x_T ~ N(0, I), then unmodified DDIM."""

    name = "base"

    def synthesize(
        self, sampler: Sampler, noise: NoiseStream, condition: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`."""
        return sampler.sample(noise.draw(PROBE), condition), {}
