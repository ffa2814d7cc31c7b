"""Train the VAE of a latent diffusion model, where no trained one is at hand."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.sources import Source
from diffusion.noise import NoiseStream
from errors import InputError
from lightning_modules.checks import check_checkpoint
from lightning_modules.optimisation import cosine
from networks.autoencoder import Autoencoder

_TRAIN, _VALIDATE = 300, 400


class AutoencoderLitModule(L.LightningModule):
    """Minimises |x − x̂| and a little KL divergence (Rombach et al., CVPR 2022, without its discriminator).

    The scale of the latents, 1 over their standard deviation over the validation images, is written to the
    VAE's configuration at every validation.

    Args:
        autoencoder: the VAE to train.
        optimizer: builds the optimiser from its parameters.
        kl_weight: weight of the KL divergence, per value of the image.
        warmup_steps: steps of linear warm-up; cosine decay follows.
        seed: seed of the latents' noise.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        kl_weight: float = 1e-6,
        warmup_steps: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.optimizer = optimizer
        self.kl_weight = kl_weight
        self.warmup_steps = warmup_steps
        self.seed = seed
        self.moments: list[Tensor] = []

    @property
    def trained(self) -> Autoencoder:
        """The network whose weights this stage hands on."""
        return self.autoencoder

    def check_data(self, source: Source) -> None:
        """Raise unless the VAE fits the images."""
        channels, factor = self.autoencoder.channels, self.autoencoder.factor
        if channels not in (source.channels, 3) or any(side % factor for side in source.size):
            raise InputError(
                f"model.autoencoder: reads images of {channels} channels with sides that are multiples of "
                f"{factor}, those of {source.name} have {source.channels} and are {source.size[0]} × "
                f"{source.size[1]}; set channels, or the number of block_out_channels, to match"
            )

    def setup(self, stage: str) -> None:
        """Check the VAE against the data."""
        self.check_data(self.trainer.datamodule.source)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this network; take the scale of its latents."""
        check_checkpoint(self.state_dict(), checkpoint["state_dict"], "autoencoder")
        self.autoencoder.rescale(1 / checkpoint["scaling_factor"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the scale of the latents, which no weight holds."""
        checkpoint["scaling_factor"] = self.autoencoder.config.scaling_factor

    def _loss(self, batch: dict[str, Tensor], stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, its first term, and the means of the latents."""
        image = batch["image"].expand(-1, self.autoencoder.channels, -1, -1)
        posterior = self.autoencoder.vae.encode(image).latent_dist
        noise = NoiseStream(self.seed, batch["index"].tolist(), tuple(posterior.mean.shape[1:]), self.device)
        latent = posterior.mean + posterior.std * noise.draw(stream)
        error = (self.autoencoder.vae.decode(latent, return_dict=False)[0] - image).abs().mean()
        kl = posterior.kl().mean() / math.prod(image.shape[1:])
        return error + self.kl_weight * kl, error, posterior.mean

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the loss of the real stream."""
        loss, error, _ = self._loss(batch["real"], _TRAIN)
        self.log("autoencoder/train_error", error, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the mean absolute error, and keep what tells the spread of the latents."""
        _, error, mean = self._loss(batch, _VALIDATE)
        mean = mean.float()  # half precision ends at 65,504, and so would the count
        self.log("autoencoder/val_error", error, prog_bar=True, batch_size=len(mean), sync_dist=True)
        self.moments.append(torch.stack([mean.square().sum(), mean.sum(), mean.new_tensor(mean.numel())]))

    def on_validation_epoch_end(self) -> None:
        """Write the scale of the latents to the configuration."""
        total = self.trainer.strategy.reduce(torch.stack(self.moments).sum(0), reduce_op="sum")
        self.moments.clear()
        square, mean, count = total.double().tolist()
        deviation = math.sqrt(max(square / count - (mean / count) ** 2, 1e-12))
        self.autoencoder.rescale(deviation)

    @torch.no_grad()
    def preview(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return columns of a picture grid: real beside reconstructed images ``(B, C, H, W)``."""
        image = batch["image"].to(self.device).expand(-1, self.autoencoder.channels, -1, -1)
        latent = self.autoencoder.vae.encode(image).latent_dist.mode()
        return {"real": image, "reconstructed": self.autoencoder.vae.decode(latent, return_dict=False)[0]}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimiser and schedule over the trainer's number of steps."""
        optimizer = self.optimizer(list(self.autoencoder.parameters()))
        return cosine(optimizer, self.warmup_steps, int(self.trainer.estimated_stepping_batches))
