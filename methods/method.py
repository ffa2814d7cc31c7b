"""What a way of filling a synthetic set looks like. Base, miner and rivals differ here only."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
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
_RESEED = 2**34
"""Added to the seed for each further attempt: beyond every seed of synthesis and of calibration."""


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

    def take(self, rows: Tensor) -> "Request":
        """Return the request for some of its samples.

        Args:
            rows: which of them, int64 ``(R,)``.

        Raises:
            ValueError: a tensor of the condition has neither the batch's length, nor length 1, nor length
                0 dimensions, so that it is not known which part of it belongs to a sample.
        """
        batch = len(self.mask)

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) == 1 != batch:
                return leaf
            if len(leaf) == batch:
                return leaf[rows.to(leaf.device)]
            raise ValueError(
                f"a tensor of the condition has shape {tuple(leaf.shape)}: its first dimension must be the "
                f"batch ({batch}), or 1 for what all samples share"
            )

        indices = [self.noise.indices[row] for row in rows.tolist()]
        return replace(
            self,
            noise=NoiseStream(self.noise.seed, indices, self.noise.shape, self.noise.device),
            mask=self.mask[rows],
            condition=tree_map(part, self.condition),
            image=self.image[rows],
        )

    def reseeded(self, attempt: int) -> "Request":
        """Return the same request with other noise in every stream; attempt 0 is the request itself."""
        noise = self.noise
        other = NoiseStream(noise.seed + _RESEED * attempt, noise.indices, noise.shape, noise.device)
        return replace(self, noise=other)


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

        A method that samples from initial noise also notes that, ``x_T`` ``(B, *noise_shape)``.

        A sample depends on its own noise, mask and real image alone, never on the rest of the batch.
        """

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each network that the method brings along."""
        return {}


def together(parts: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Return one tensor of parts that were made by themselves, row ``rows[i][j]`` being ``parts[i][j]``."""
    return torch.cat(parts)[torch.argsort(torch.cat(rows))]


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
