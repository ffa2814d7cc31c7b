"""Randomness that belongs to a sample, not to a batch, a rank or a device."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator that depends on (seed, index, stream) alone."""
    state = np.random.SeedSequence(seed, spawn_key=(index, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)


class NoiseStream:
    """Standard normal noise of a batch of samples: each depends on (seed, its index) alone.

    Args:
        seed: seed of the run.
        indices: index of each sample.
        shape: shape of one sample's noise.
        device: where the noise is moved; it is always drawn on the CPU, in float32.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self.seed = seed
        self.indices = [int(index) for index in indices]
        self.shape = tuple(shape)
        self.device = device

    def draw(self, stream: int = 0) -> Tensor:
        """Return independent noise ``(B, *shape)`` for each ``stream``; the same stream, the same noise."""
        noise = [torch.randn(self.shape, generator=generator(self.seed, i, stream)) for i in self.indices]
        return torch.stack(noise).to(self.device)

    def integers(self, high: int, stream: int = 0) -> Tensor:
        """Return independent uniform integers in [0, ``high``), int64 ``(B,)``."""
        values = [torch.randint(high, (), generator=generator(self.seed, i, stream)) for i in self.indices]
        return torch.stack(values).to(self.device)

    def scalars(self, draw: Callable[[np.random.Generator], float], stream: int = 0) -> Tensor:
        """Return what ``draw`` makes of each sample's own NumPy generator, float32 ``(B,)``."""
        sequences = (np.random.SeedSequence(self.seed, spawn_key=(i, stream)) for i in self.indices)
        values = [float(draw(np.random.default_rng(sequence))) for sequence in sequences]
        return torch.tensor(values, device=self.device)
