"""Train a backbone with its own loss."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.sources import Source
from diffusion.backbones import Backbone, TrainingBatch
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from lightning_modules.checks import check_checkpoint, check_image_set, started
from lightning_modules.latents import LatentCache
from lightning_modules.optimisation import cosine

_TRAIN, _VALIDATE = 100, 200  # noise streams; each uses two


class DiffusionLitModule(L.LightningModule):
    """Minimises the backbone's training loss; AdamW, linear warm-up, cosine decay.

    Timesteps and noise of item n depend on (seed, n) alone. The average of the weights is kept by
    Lightning's ``EMAWeightAveraging`` callback.

    Args:
        backbone: the network to train.
        optimizer: builds the optimiser from the parameters that learn.
        warmup_steps: steps of linear warm-up.
        sampling_steps: DDIM steps of the preview pictures.
        weights: folder of a trained backbone to start from, of the same architecture as ``backbone``; a
            network that knows no size can so be trained on small images first, and then on large ones.
        cache: latents to keep in memory, so that an image that comes again is not encoded again; 0 keeps
            none. Of use where encoding costs something and images come unchanged: ``augmentation: none``
            or ``flip``.
        seed: seed of timesteps and noise.

    Raises:
        InputError: ``weights`` cannot be read, or are of another architecture.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        warmup_steps: int = 500,
        sampling_steps: int = 50,
        weights: str | None = None,
        cache: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        backbone = started(backbone, weights, "model.backbone")
        self.backbone = backbone.to(memory_format=torch.channels_last)  # a quarter faster on the CPU
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.sampling_steps = sampling_steps
        self.seed = seed
        self.total_steps = 1
        self.latents = LatentCache(cache)

    @property
    def trained(self) -> Backbone:
        """The network whose weights this stage hands on."""
        return self.backbone

    def check_data(self, source: Source) -> None:
        """Raise unless the backbone fits the images."""
        check_image_set(source, self.backbone, "model.backbone")

    def setup(self, stage: str) -> None:
        """Check the backbone against the data."""
        self.check_data(self.trainer.datamodule.source)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise unless the checkpoint holds exactly this network."""
        check_checkpoint(self.state_dict(), checkpoint["state_dict"], "backbone")

    def _loss(self, batch: dict[str, Tensor], stream: int) -> Tensor:
        image, mask = batch["image"], batch["mask"]
        shape = self.backbone.noise_shape((image.shape[-2], image.shape[-1]))
        noise = NoiseStream(self.seed, batch["index"].tolist(), shape, self.device)
        t = noise.integers(len(self.backbone.alphas_cumprod), stream + 1)
        chance = noise.scalars(lambda rng: rng.random(), stream + 1)
        x_0 = self.latents.encode(self.backbone, image)
        done = min(1.0, self.global_step / self.total_steps)
        return self.backbone.training_loss(
            TrainingBatch(image, mask, x_0, noise.draw(stream), t, chance, done)
        )

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the loss of the real stream."""
        loss = self._loss(batch["real"], _TRAIN)
        self.log("diffusion/train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss at timesteps and noise that stay the same over training."""
        loss = self._loss(batch, _VALIDATE)
        self.log("diffusion/val_loss", loss, prog_bar=True, batch_size=len(batch["image"]), sync_dist=True)

    @torch.no_grad()
    def preview(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return columns of a picture grid: real beside sampled images ``(B, C, H, W)`` in [−1, 1]."""
        mask = batch["mask"].to(self.device)
        shape = self.backbone.noise_shape((mask.shape[-2], mask.shape[-1]))
        noise = NoiseStream(self.seed, batch["index"].tolist(), shape, self.device)
        was_training = self.backbone.training
        self.backbone.eval()
        sampler = Sampler(self.backbone, self.sampling_steps)
        sampled = sampler.sample(noise.draw(), self.backbone.condition(mask, batch["image"].to(self.device)))
        self.backbone.train(was_training)
        return {"real": batch["image"], "sampled": sampled}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build optimiser and schedule over the trainer's number of steps."""
        optimizer = self.optimizer([p for p in self.backbone.parameters() if p.requires_grad])
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        return cosine(optimizer, self.warmup_steps, self.total_steps)
