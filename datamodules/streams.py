"""Training data as a stream in which item n depends on (seed, n) alone.

An epoch is a fixed number of steps, not a pass over the data: runs with more data train for exactly as
long as runs with less. Item n picks its sample and its augmentation from a generator of (seed, n), so
that a resumed run, or one on another number of devices, sees the same stream.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from datamodules.sources import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]


def item_generator(seed: int, n: int, stream: int = 0) -> np.random.Generator:
    """Return numpy's generator of item n of a stream; it depends on (seed, n, stream) alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n, stream)))


class StreamDataset(Dataset[dict[str, Any]]):
    """A finite dataset, drawn from without end.

    Each pass takes every sample once, in an order of its own.

    Args:
        dataset: labelled samples.
        seed: seed of the order and of the augmentation.
        transform: augmentation, called with the sample and the generator of its item.
        stream: tells apart streams of one seed.
    """

    def __init__(
        self, dataset: Dataset[Sample], seed: int, transform: Transform | None = None, stream: int = 0
    ) -> None:
        self.dataset = dataset
        self.size = len(dataset)  # type: ignore[arg-type]
        self.seed = seed
        self.transform = transform
        self.stream = stream

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Return item n: the sample's tensors and numbers, and ``index`` = n."""
        turn, place = divmod(n, self.size)
        order = item_generator(self.seed, turn, 2 * self.stream + 1).permutation(self.size)
        sample = self.dataset[int(order[place])]
        if self.transform is not None:
            sample = self.transform(sample, item_generator(self.seed, n, 2 * self.stream))
        return {key: value for key, value in sample.items() if key not in ("id", "mode")} | {"index": n}


class StreamSampler(DistributedSampler[int]):
    """Numbers of one device's items of one epoch, from where the training stands.

    Device r of W takes the items r, r + W, …, so that W devices together see what one device with W
    times the batch sees. The start is asked for at the beginning of every epoch and counted in steps,
    not in epochs, which Lightning numbers differently after a resumption. As a ``DistributedSampler`` it
    is used by Lightning as it is.

    Args:
        length: items of an epoch, over all devices.
        start: returns the number of the first item, from the trainer's state.
        rank: this device, from 0.
        world: number of devices.
    """

    def __init__(self, length: int, start: Callable[[], int], rank: int = 0, world: int = 1) -> None:
        self.length = length
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[int]:
        """Yield this device's item numbers in order."""
        start = self.start()
        return iter(range(start + self.rank, start + self.length, self.world))

    def __len__(self) -> int:
        """Return this device's items of an epoch."""
        return self.length // self.world


def optimiser_steps(trainer: Any, batches: int) -> int:
    """Return the steps of the optimiser in an epoch of ``batches``; its last one may gather fewer of them."""
    return math.ceil(batches / trainer.accumulate_grad_batches)


def stream_sampler(trainer: Any, batch_size: int, steps: int) -> StreamSampler:
    """Return the sampler of a stream that gives every device ``batch_size`` items a step.

    Args:
        trainer: Lightning's trainer, or None outside of one.
        batch_size: items of this stream a batch and device.
        steps: batches an epoch and device.
    """
    if trainer is None:
        return StreamSampler(batch_size * steps, lambda: 0)
    items = batch_size * trainer.world_size

    def start() -> int:
        epochs, rest = divmod(trainer.global_step, optimiser_steps(trainer, steps))
        return items * (epochs * steps + rest * trainer.accumulate_grad_batches)

    return StreamSampler(items * steps, start, trainer.global_rank, trainer.world_size)
