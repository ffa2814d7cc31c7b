"""Masks to synthesise from: q_ω, for mining and for synthesis."""

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.sources import Source
from datamodules.streams import item_generator, stream_sampler
from errors import InputError


def vary_mask(mask: Tensor, rng: np.random.Generator, flip: bool, scale: float) -> Tensor:
    """Return a mask flipped and scaled about its centre at random, with its classes kept.

    Args:
        mask: int64 class map ``(H, W)``.
        rng: source of the randomness.
        flip: mirror left to right with probability ½.
        scale: the factor is drawn log-uniformly from [1/(1 + scale), 1 + scale]; 0 leaves the size.
    """
    if flip and rng.random() < 0.5:
        mask = mask.flip(-1)
    factor = float((1 + scale) ** rng.uniform(-1, 1))
    theta = torch.tensor([[[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]])
    grid = F.affine_grid(theta, [1, 1, *mask.shape], align_corners=False)
    scaled = F.grid_sample(mask[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].long()
    return scaled if torch.equal(scaled.unique(), mask.unique()) else mask


class ConditionDataset(Dataset[dict[str, Any]]):
    """Mask i of an endless sequence; it depends on (seed, stream, i) alone.

    The first N masks come from the N real ones, each once, so do the next N, each varied anew.
    """

    def __init__(self, masks: Dataset, length: int, seed: int, stream: int, flip: bool, scale: float) -> None:
        self.masks = masks
        self.stream = stream
        self.size = len(masks)  # type: ignore[arg-type]
        self.length = length
        self.seed = seed
        self.flip = flip
        self.scale = scale

    def __len__(self) -> int:
        """Return the number of masks."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``mask`` int64 (H, W), its ``index``, and ``source_mask``, the id of the real one."""
        sample = self.masks[index % self.size]
        mask = vary_mask(sample["mask"], item_generator(self.seed, index, self.stream), self.flip, self.scale)
        return {"mask": mask, "index": index, "source_mask": sample["id"]}


class ConditionDataModule(L.LightningDataModule):
    """Masks for mining (fit) and for synthesis (predict), from the real training masks.

    Args:
        source: where the real masks come from; only its training split is read.
        budget: synthetic samples to make, as a multiple of the number of real ones.
        seed: seed of the masks' variation; synthesis takes the same seed for its noise.
        flip: mirror masks left to right with probability ½.
        scale: masks are scaled by a factor in [1/(1 + scale), 1 + scale].
        max_real: use only the first real training masks; None uses all.
        batch_size: masks a batch, on each device.
        steps_per_epoch: batches an epoch of mining; resume points lie between epochs.
        num_workers: loader processes.

    Raises:
        InputError: the source cannot be used, or the budget asks for no sample.
    """

    def __init__(
        self,
        source: Source,
        budget: float = 1.0,
        seed: int = 0,
        flip: bool = True,
        scale: float = 0.1,
        max_real: int | None = None,
        batch_size: int = 8,
        steps_per_epoch: int = 100,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if scale < 0:
            raise InputError(f"scale {scale}: must be at least 0")
        if max_real is not None and max_real < 1:
            raise InputError(f"max_real {max_real}: must be at least 1, or null for all")
        self.source = source
        self.budget = budget
        self.seed = seed
        self.flip = flip
        self.scale = scale
        self.max_real = max_real
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Read the training masks."""
        masks = self.source.dataset("train")
        available = len(masks)  # type: ignore[arg-type]
        self.n_real = min(available, self.max_real or available)
        self.masks = torch.utils.data.Subset(masks, range(self.n_real))
        if round(self.budget * self.n_real) < 1:
            raise InputError(
                f"budget {self.budget}: asks for no sample from {self.n_real} real ones; raise it"
            )

    def _dataset(self, length: int, stream: int) -> ConditionDataset:
        return ConditionDataset(self.masks, length, self.seed, stream, self.flip, self.scale)

    def train_dataloader(self) -> DataLoader:
        """Return masks for mining; they are not the varied masks of synthesis."""
        sampler = stream_sampler(self.trainer, self.batch_size, self.steps_per_epoch)
        dataset = self._dataset(len(sampler), stream=1)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """Return masks 0 … budget · N − 1."""
        dataset = self._dataset(round(self.budget * self.n_real), stream=0)
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)

    def preview(self, count: int) -> dict[str, Tensor]:
        """Return the first ``count`` masks of synthesis as one batch: ``mask`` and ``index``."""
        samples = self._dataset(count, stream=0)
        return {
            "mask": torch.stack([samples[i]["mask"] for i in range(count)]),
            "index": torch.arange(count),
        }
