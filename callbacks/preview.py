"""Pictures in TensorBoard: the same masks and the same noise all through training."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid

from evaluation.colours import palette


def colour_mask(mask: Tensor, num_classes: int) -> Tensor:
    """Return class maps ``(B, H, W)`` as images in [−1, 1] ``(B, 3, H, W)``, a colour a class."""
    colours = torch.from_numpy(palette(num_classes)).float() / 127.5 - 1
    return colours[mask.cpu()].permute(0, 3, 1, 2)


def picture_grid(columns: dict[str, Tensor]) -> Tensor:
    """Return one picture ``(3, H', W')`` in [0, 1]: a row a sample, a column an entry.

    Args:
        columns: images ``(B, C, H, W)`` in [−1, 1], C of 1 or 3; all are brought to the size of the first.
    """
    images = [image.detach().cpu().float().expand(-1, 3, -1, -1) for image in columns.values()]
    images = [F.interpolate(image, images[0].shape[-2:]) for image in images]  # nearest: noise stays noise
    rows = torch.stack(images, dim=1).flatten(0, 1)
    return make_grid((rows.clamp(-1, 1) + 1) / 2, nrow=len(images), padding=2)


class PreviewGrid(Callback):
    """Log ``module.preview(batch)`` beside the masks, with the columns' names as the picture's tag.

    A column is images ``(B, C, H, W)`` in [−1, 1] or class maps ``(B, H, W)``.

    Args:
        every_n_steps: optimiser steps between pictures; one more is drawn when training ends.
        count: samples in the picture.
    """

    def __init__(self, every_n_steps: int = 200, count: int = 6) -> None:
        self.every_n_steps = every_n_steps
        self.count = count
        self.drawn = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every few hundred steps, once where several batches make a step."""
        if trainer.global_step != self.drawn and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the final state."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.drawn = trainer.global_step
        logger = trainer.logger
        if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = datamodule.preview(self.count)
        columns = {
            name: colour_mask(value, datamodule.source.num_classes) if value.ndim == 3 else value
            for name, value in {"mask": batch["mask"], **pl_module.preview(batch)}.items()
        }
        logger.experiment.add_image("/".join(columns), picture_grid(columns), trainer.global_step)
