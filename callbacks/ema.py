"""Exponential moving average of the weights that is right for short runs too."""

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Average the weights with decay min(``decay``, (1 + n) / (10 + n)) after n updates.

    The warm-up of the decay (as in TensorFlow's ``ExponentialMovingAverage`` and diffusers'
    ``EMAModel``) forgets the untrained weights whatever the length of the run. Validation and the
    exported weights use the average.

    Args:
        decay: decay that the average settles at, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            n = int(updates)
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average where the model is: when it is copied the model is still on the CPU."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in place where a finished run is resumed: ``on_train_end`` is left out then."""
        self._copy_average_to_current(pl_module)
