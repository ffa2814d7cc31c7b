"""What a way of filling a synthetic set looks like. Base, miner and rivals differ here only."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from errors import InputError
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS

PROBE, FRESH = 0, 1
"""Noise streams of a sample: x̂_T, which every method starts from, and the second draw of the miner."""

OWN = 1_000_000
"""Streams from here on are a method's own, for whatever else it draws."""
_PROPOSALS = 1_000


@dataclass(frozen=True)
class Request:
    """A batch of samples to make, and all that a method may use for it.

    Attributes:
        sampler: DDIM through the frozen backbone.
        noise: the samples' own noise; stream ``PROBE`` is where plain sampling starts.
        mask: y, int64 ``(B, H, W)``: what is to be seen, and the label of the sample.
        condition: of the masks, from ``backbone.condition``.
        anchor: the frozen segmenter f_ϑ.
        image: the real images that the masks came from, varied as the masks were, ``(B, C, H, W)``.
    """

    sampler: Sampler
    noise: NoiseStream
    mask: Tensor
    condition: Any
    anchor: Segmenter
    image: Tensor

    def proposal(self, number: int) -> Tensor:
        """Return initial noise of a sample's proposal ``number``; number 0 is that of plain sampling."""
        return self.noise.draw(PROBE if number == 0 else _PROPOSALS + number)

    def reward(self, image: Tensor, name: str = "ce") -> Tensor:
        """Return how hard the anchor finds images in [−1, 1], ``(B,)``; differentiable in the images."""
        return REWARDS[name](self.anchor(image).float(), self.mask)


@dataclass(frozen=True)
class Preparation:
    """What a method may look at before the first sample is made.

    Attributes:
        anchor: the frozen segmenter f_ϑ.
        real: labelled real training images.
        requests: gives a list of requests for that many samples which are not those of the set.
    """

    anchor: Segmenter
    real: Dataset
    requests: Callable[[int], list[Request]]


class Method(nn.Module, ABC):
    """Makes images from masks with a frozen backbone.

    Attributes:
        name: what the method is called in manifests and reports.
    """

    name: str

    def prepare(self, preparation: Preparation) -> None:
        """Look at the anchor and the real images, once before the first sample."""

    @abstractmethod
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """Return images ``(B, C, H, W)`` in [−1, 1] and what is to be noted: a dict of tensors ``(B,)``.

        A sample depends on its own noise, mask and real image alone, never on the rest of the batch.
        """

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each network that the method brings along."""
        return {}


def gradient_of(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``value(x)`` ``(B,)`` without a graph, and its gradient, like ``x``, each sample by itself.

    Raises:
        InputError: called where PyTorch keeps no gradients whatever is asked.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("this method needs gradients: set --trainer.inference_mode=false")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = value(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient
