"""What a way of filling a synthetic set looks like. Base, miner and rivals differ here only."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler

PROBE, FRESH = 0, 1
"""Noise streams of a sample: x̂_T, which every method starts from, and the second draw of the miner."""


class Method(nn.Module, ABC):
    """Makes images from masks with a frozen backbone.

    Attributes:
        name: what the method is called in manifests and reports.
    """

    name: str

    @abstractmethod
    def synthesize(
        self, sampler: Sampler, noise: NoiseStream, condition: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return images and what is to be noted of each sample.

        Args:
            sampler: DDIM through the frozen backbone.
            noise: the samples' own noise; stream ``PROBE`` is where plain sampling starts.
            condition: of the masks, from ``backbone.condition``.

        Returns:
            Images ``(B, C, H, W)`` in [−1, 1], and a dict of tensors ``(B,)``.
        """

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each network that the method brings along."""
        return {}
