"""Rules that take the grey values of a volume to [0, 1]."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from errors import InputError

Array = NDArray[np.float32]


class Intensity(ABC):
    """A rule for one whole volume; equal rules have equal ``repr``."""

    @abstractmethod
    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]; an InputError names the file ``path``."""


@dataclass(frozen=True)
class PercentileMinMax(Intensity):
    """Clip above a percentile of the volume, then scale from its minimum to that value.

    Attributes:
        upper: percentile above which values are clipped.
    """

    upper: float = 99.0

    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]."""
        low, high = float(image.min()), float(np.percentile(image, self.upper))
        if high <= low:
            raise InputError(
                f"{path}: {self.upper:g} % of the voxels are {low:g}: the image is nearly empty, replace the "
                "file"
            )
        return _scale(image, low, high)


@dataclass(frozen=True)
class Window(Intensity):
    """Clip to fixed values and scale from the one to the other, in the units of the file."""

    low: float
    high: float

    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]."""
        return _scale(image, self.low, self.high)


@dataclass(frozen=True)
class StandardisedWindow(Window):
    """A window for a file that is standardised already; one that lies mostly outside it is an error."""

    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]."""
        if np.mean((image < self.low) | (image > self.high)) > 0.5:
            raise InputError(
                f"{path} has values from {image.min():g} to {image.max():g}, most of them outside "
                f"{self.low:g} to {self.high:g}; files of this form are standardised: prepare them again, or "
                "set rescale to true if they hold the scanner's values"
            )
        return super().apply(image, path)


@dataclass(frozen=True)
class StandardWindow(Intensity):
    """Standardise the volume to mean 0 and standard deviation 1, then apply a window in these units."""

    low: float
    high: float

    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]."""
        mean, spread = image.mean(dtype=np.float64), image.std(dtype=np.float64)
        return _scale(((image - mean) / spread).astype(np.float32), self.low, self.high)


@dataclass(frozen=True)
class Prepared(Intensity):
    """The file has values in [0, 1] already; all others are an error."""

    def apply(self, image: Array, path: Path) -> Array:
        """Return the volume ``(D, H, W)`` in [0, 1]."""
        low, high = float(image.min()), float(image.max())
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputError(
                f"{path} has values from {low:g} to {high:g}; files of this form are prepared to 0 to 1: "
                "prepare them again, or set rescale to true if they hold the scanner's values"
            )
        return _scale(image, 0.0, 1.0)


def _scale(image: Array, low: float, high: float) -> Array:
    return (np.clip(image, low, high) - np.float32(low)) / np.float32(high - low)
