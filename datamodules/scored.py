"""Plain samples for training the seed scorer: a synthetic set made without any method."""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from datamodules.sources import Source
from datamodules.sources.synthetic import SyntheticSet
from datamodules.streams import StreamDataset, stream_sampler
from errors import InputError


class _Plain(Dataset[dict[str, Any]]):
    """Samples of a plain set, with what their noise depends on."""

    def __init__(self, samples: SyntheticSet) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry, sample = self.samples.entries[index], self.samples[index]
        facts = {"sample": entry["index"], "seed": entry["seed"]}
        return {"image": sample["image"], "mask": sample["mask"], "index": index, **facts}


class ScoredDataModule(L.LightningDataModule):
    """A plain synthetic set, its first part to train the scorer on, its last part held out.

    Args:
        source: the labelled images that the masks came from.
        plain: folder of a set that ``cli.py predict`` made with the method Base, with a seed that is
            not the one of the set to be made.
        holdout: share of the samples that is held out, the last ones.
        batch_size: samples a batch, on each device.
        steps_per_epoch: batches an epoch.
        seed: seed of the order.
        num_workers: loader processes.

    Raises:
        InputError: the folder holds no plain set, or too few samples.
    """

    def __init__(
        self,
        source: Source,
        plain: str,
        holdout: float = 0.2,
        batch_size: int = 64,
        steps_per_epoch: int = 50,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < holdout < 1:
            raise InputError(f"holdout {holdout}: must lie between 0 and 1")
        self.source = source
        self.plain = plain
        self.holdout = holdout
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Read the set."""
        samples = SyntheticSet(self.plain)
        made = samples.made
        if made["method"] != "base":
            raise InputError(
                f"{self.plain}: was made by {made['method']}; the scorer learns from plain samples: "
                "make them with --model.method Base"
            )
        held_out = round(self.holdout * len(samples))
        if held_out < 8 or len(samples) - held_out < 8:
            raise InputError(
                f"{self.plain}: {len(samples)} samples are too few to train a scorer on; make more with "
                "--data.budget"
            )
        self.samples = _Plain(samples)
        self.first_held_out = len(samples) - held_out

    @property
    def training_samples(self) -> list[int]:
        """Index of every sample that training sees."""
        return [entry["index"] for entry in self.samples.samples.entries[: self.first_held_out]]

    def real_mask(self, index: int) -> str:
        """Return which real mask the sample of this place in the set was made for."""
        return self.samples.samples.entries[index]["source_mask"]

    def everything(self, device: torch.device) -> list[dict[str, Any]]:
        """Return the whole set in batches."""
        loader = DataLoader(self.samples, batch_size=self.batch_size)
        return [move_data_to_device(batch, device) for batch in loader]

    def train_dataloader(self) -> DataLoader:
        """Return the stream of training samples."""
        head = Subset(self.samples, range(self.first_held_out))
        return DataLoader(
            StreamDataset(head, self.seed),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=stream_sampler(self.trainer, self.batch_size, self.steps_per_epoch),
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the held-out samples."""
        tail = Subset(self.samples, range(self.first_held_out, len(self.samples)))
        return DataLoader(tail, batch_size=self.batch_size, num_workers=self.num_workers)

    def preview(self, count: int) -> dict[str, Tensor]:
        """Return the first held-out samples as one batch."""
        last = min(self.first_held_out + count, len(self.samples))
        return default_collate([self.samples[i] for i in range(self.first_held_out, last)])
