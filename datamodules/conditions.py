"""Masks to synthesise from: q_ω, for mining and for synthesis."""

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.sources import Source
from datamodules.streams import item_generator, stream_sampler
from errors import InputError, require


def vary(
    mask: Tensor, image: Tensor, rng: np.random.Generator, flip: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return a mask and its image, flipped and scaled about the centre at random, the classes kept.

    Args:
        mask: int64 class map ``(H, W)``.
        image: ``(C, H, W)``; what a smaller one leaves empty is filled by reflection, as in its mask.
        rng: source of the randomness.
        flip: mirror left to right with probability ½.
        scale: the factor is drawn log-uniformly from [1/(1 + scale), 1 + scale]; 0 leaves the size.
    """
    if flip and rng.random() < 0.5:
        mask, image = mask.flip(-1), image.flip(-1)
    factor = float((1 + scale) ** rng.uniform(-1, 1))
    theta = torch.tensor([[[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]])
    grid = F.affine_grid(theta, [1, 1, *mask.shape], align_corners=False)

    def resampled(x: Tensor, mode: str) -> Tensor:
        return F.grid_sample(x[None], grid, mode=mode, padding_mode="reflection", align_corners=False)[0]

    scaled = resampled(mask[None].float(), "nearest")[0].long()
    if not torch.equal(scaled.unique(), mask.unique()):
        return mask, image
    return scaled, resampled(image, "bilinear")


class ConditionDataset(Dataset[dict[str, Any]]):
    """Mask i of an endless sequence; it depends on (seed, stream, i) alone.

    The first N masks come from the N real ones, each once, so do the next N, each varied anew.
    """

    def __init__(self, real: Dataset, length: int, seed: int, stream: int, flip: bool, scale: float) -> None:
        self.real = real
        self.stream = stream
        self.size = len(real)  # type: ignore[arg-type]
        self.length = length
        self.seed = seed
        self.flip = flip
        self.scale = scale

    def __len__(self) -> int:
        """Return the number of masks."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``mask`` (H, W), its ``image``, its ``index``, and ``source_mask``, the real one's id."""
        sample = self.real[index % self.size]
        rng = item_generator(self.seed, index, self.stream)
        mask, image = vary(sample["mask"], sample["image"], rng, self.flip, self.scale)
        return {"mask": mask, "image": image, "index": index, "source_mask": sample["id"]}


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
        require(seed >= 0, "data.seed", seed, "must not be negative")
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
        real = self.source.dataset("train")
        available = len(real)  # type: ignore[arg-type]
        self.n_real = min(available, self.max_real or available)
        self.real = torch.utils.data.Subset(real, range(self.n_real))
        if round(self.budget * self.n_real) < 1:
            raise InputError(
                f"budget {self.budget}: asks for no sample from {self.n_real} real ones; raise it"
            )

    def _dataset(self, length: int, stream: int) -> ConditionDataset:
        return ConditionDataset(self.real, length, self.seed, stream, self.flip, self.scale)

    def train_dataloader(self) -> DataLoader:
        """Return masks for mining; they are not the varied masks of synthesis."""
        sampler = stream_sampler(self.trainer, self.batch_size, self.steps_per_epoch)
        dataset = self._dataset(len(sampler), stream=1)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        """Return masks 0 … budget · N − 1."""
        dataset = self._dataset(round(self.budget * self.n_real), stream=0)
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)

    def calibration(self, count: int, device: torch.device) -> list[dict[str, Any]]:
        """Return ``count`` masks and images that are not those of synthesis, in batches."""
        loader = DataLoader(self._dataset(count, stream=2), batch_size=self.batch_size)
        return [move_data_to_device(batch, device) for batch in loader]

    def preview(self, count: int) -> dict[str, Tensor]:
        """Return the first ``count`` masks of synthesis as one batch: ``mask``, ``image`` and ``index``."""
        samples = self._dataset(count, stream=0)
        batch = default_collate([samples[i] for i in range(count)])
        return {key: batch[key] for key in ("mask", "image", "index")}


class GlanceDataModule(ConditionDataModule):
    """Masks to glance at noises for: those of mining to learn from, and others held out.

    Args:
        n_val: masks held out.
        options: those of :class:`ConditionDataModule`.

    Raises:
        InputError: the source cannot be used, or fewer than 8 masks are held out.
    """

    def __init__(self, *args: Any, n_val: int = 256, **options: Any) -> None:
        super().__init__(*args, **options)
        if n_val < 8:
            raise InputError(f"n_val {n_val}: a correlation needs at least 8 masks held out")
        self.n_val = n_val

    def real_mask(self, index: int) -> int:
        """Return which real mask the one of this index varies."""
        return index % self.n_real

    def val_dataloader(self) -> DataLoader:
        """Return the masks held out."""
        dataset = self._dataset(self.n_val, stream=2)
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
