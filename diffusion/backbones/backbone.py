"""What a mask-to-image diffusion model looks like to the miner, the methods and the sampler."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.schedule import Spacing, alphas_cumprod, check_terminal, min_snr_mse
from errors import InputError
from networks.pretrained import Pretrained

Prediction = Literal["epsilon", "v"]


@dataclass(frozen=True)
class TrainingBatch:
    """What a backbone's training loss is computed from.

    Attributes:
        image: ``(B, C, H, W)`` in [−1, 1].
        mask: y, int64 ``(B, H, W)``.
        x_0: latents of the images, from ``backbone.encode``, ``(B, *noise_shape)``.
        epsilon: standard normal noise like ``x_0``.
        t: int64 timesteps ``(B,)``.
        chance: uniform numbers in [0, 1) ``(B,)`` for what the loss leaves to chance.
        progress: share of the training that is done, in [0, 1].
    """

    image: Tensor
    mask: Tensor
    x_0: Tensor
    epsilon: Tensor
    t: Tensor
    chance: Tensor
    progress: float = 0.0


class Backbone(Pretrained, ABC):
    """q_φ(x | y), a diffusion model conditioned on a mask.

    Attributes:
        alphas_cumprod: ᾱ_t of the trained schedule, float32 ``(T,)``.
        spacing: how its DDIM timesteps are spaced.
        steps_offset: offset of its DDIM timesteps under ``leading`` spacing.
        final_alpha: ᾱ that the last DDIM step ends at.
        clip_sample: whether the sampler clips every x̂_0 to [−1, 1].
        prediction: what the network predicts: ε, or v = √ᾱ ε − √(1 − ᾱ) x_0 (Salimans & Ho, ICLR 2022).
        snr_gamma: γ of min-SNR weighting of the training loss; None weights all timesteps alike.
        guidance: w of classifier-free guidance; 1 is none.
        image_channels: channels of the decoded image.
        num_classes: classes of the masks, background included.
    """

    alphas_cumprod: Tensor
    spacing: Spacing = "leading"
    steps_offset: int = 0
    final_alpha: float = 1.0
    clip_sample: bool = False
    prediction: Prediction = "epsilon"
    snr_gamma: float | None = None
    guidance: float = 1.0
    image_channels: int
    num_classes: int

    def _register_schedule(
        self, beta_schedule: str, beta_start: float, beta_end: float, train_steps: int
    ) -> None:
        table = alphas_cumprod(beta_schedule, beta_start, beta_end, train_steps)
        if not table.is_meta:
            check_terminal(table, f"beta_end {beta_end:g} after {train_steps} train_steps")
        self.register_buffer("alphas_cumprod", table, persistent=False)

    def schedule(self) -> dict[str, Any]:
        """Return what the network was trained under, by the names of arguments."""
        names = ("beta_schedule", "beta_start", "beta_end", "train_steps", "prediction")
        return {**{name: self.config[name] for name in names}, "clip_sample": self.clip_sample}

    def _adopted(self, given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments with those of the model to start from in their place.

        Raises:
            InputError: one was given, for it is not the default, and is not the model's.
        """
        usual = inspect.signature(type(self).__init__).parameters
        taken = {key: found[key] for key in given if key in found}
        wrong = [
            f"{key} {value}, not {given[key]}"
            for key, value in taken.items()
            if given[key] not in (value, usual[key].default)
        ]
        if wrong:
            raise InputError(f"start: its model has {'; '.join(wrong)}: set it so, or leave it out")
        return {**given, **taken}

    @property
    def passes(self) -> int:
        """Forward passes of the network in one call of ``epsilon``: 2 under guidance."""
        return 1 if self.guidance == 1 else 2

    def _set_loss(self, prediction: Prediction, snr_gamma: float | None) -> None:
        if snr_gamma is not None and snr_gamma <= 0:
            raise InputError(f"snr_gamma {snr_gamma}: must be positive, such as 5, or null for equal weights")
        self.prediction = prediction
        self.snr_gamma = snr_gamma

    def _as_epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ε of the network's output; of v it is √ᾱ v + √(1 − ᾱ) x_t."""
        if self.prediction == "epsilon":
            return output
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * x_t

    def _guided(self, both: Tensor) -> Tensor:
        """Return unwanted + w·(wanted − unwanted) of outputs ``(2B, …)``, the wanted ones first."""
        wanted, unwanted = both.chunk(2)
        return unwanted + self.guidance * (wanted - unwanted)

    def _target(self, batch: TrainingBatch) -> Tensor:
        """Return what the network's output should be."""
        if self.prediction == "epsilon":
            return batch.epsilon
        alpha_bar = self.alpha_bar(batch.t)
        return alpha_bar.sqrt() * batch.epsilon - (1 - alpha_bar).sqrt() * batch.x_0

    def _error(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared error, weighted by timestep where that is asked for."""
        return min_snr_mse(output, target, self.alpha_bar(t), self.snr_gamma, self.prediction == "v")

    @abstractmethod
    def noise_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one sample's x_T for images of ``size`` (H, W) pixels."""

    @abstractmethod
    def condition(self, mask: Tensor, image: Tensor | None = None) -> Any:
        """Return all that does not depend on t, computed once a batch.

        Args:
            mask: int64 ``(B, H, W)``.
            image: the real images of the masks ``(B, C, H, W)``, for a backbone that reads more of them
                than the mask; None where there are none.

        Returns:
            A tensor, or a dict of tensors, whose first dimension is the batch, or 1 for what all share.

        Raises:
            InputError: the backbone reads real images, and there are none.
        """

    @abstractmethod
    def epsilon(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Return ε_φ(x_t, t | y) float32 like ``x_t``; t int64 ``(B,)``; guidance is inside."""

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Return latents ``(B, *noise_shape)`` of images ``(B, C, H, W)`` in [−1, 1]."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` for final latents; differentiable, not clipped."""

    @abstractmethod
    def training_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the backbone's own training loss, a scalar."""

    def alpha_bar(self, t: Tensor | int) -> Tensor:
        """Return ᾱ_t, broadcastable over ``(B, C, H, W)``; t = −1 is the end of the last step."""
        t = torch.as_tensor(t, device=self.alphas_cumprod.device).reshape(-1)
        values = torch.where(
            t < 0, self.alphas_cumprod.new_tensor(self.final_alpha), self.alphas_cumprod[t.clamp(min=0)]
        )
        return values.reshape(-1, 1, 1, 1)
