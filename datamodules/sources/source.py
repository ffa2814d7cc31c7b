"""What every image set looks like to the rest of the application."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from errors import InputError


class Sample(TypedDict):
    """One labelled image.

    Attributes:
        image: float32 ``(C, H, W)`` in [−1, 1].
        mask: int64 class map ``(H, W)``, 0 is the background.
        id: name of the sample, unique within its split.
        mode: appearance mode, where the source knows one (phantoms do).
    """

    image: Tensor
    mask: Tensor
    id: str
    mode: NotRequired[int]


@dataclass(frozen=True)
class Volume:
    """Where a sample lies in a 3-D case.

    Attributes:
        case: name of the case.
        slice: position of the sample among the slices of the case, from 0.
        slices: number of slices of the case.
        spacing: size of a voxel in mm, in the order of the axes (D, H, W); None where it is not known.
    """

    case: str
    slice: int
    slices: int
    spacing: tuple[float, float, float] | None


class Source(ABC):
    """A labelled image set with named splits.

    ``train`` and ``val`` always exist; every other split is a test set, reported as one row under
    its name.

    Attributes:
        name: what the set is called in reports.
        version: of the images, where they are made and not measured; None elsewhere.
        class_names: names of the classes, the background first.
        channels: image channels C.
        size: height and width (H, W) of every sample, in pixels.
        splits: names of the splits, ``train`` and ``val`` first.
        mode_names: of the appearance modes, by number, where samples have a ``mode``.
    """

    name: str
    version: int | None = None
    class_names: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    splits: tuple[str, ...]
    mode_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.class_names)

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test sets: all splits but ``train`` and ``val``."""
        return tuple(name for name in self.splits if name not in ("train", "val"))

    def dataset(self, split: str) -> Dataset[Sample]:
        """Return a split as a sized, map-style dataset of :class:`Sample`.

        Raises:
            InputError: the split does not exist, or its data cannot be used; every problem that a
                look at the files can show is raised here, not while training.
        """
        if split not in self.splits:
            raise InputError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        return self._dataset(split)

    @abstractmethod
    def _dataset(self, split: str) -> Dataset[Sample]:
        """Return a split that is known to exist."""

    def files(self) -> Mapping[str, Sequence[Path]]:
        """Return the files that samples are read from, by split; nothing where images are generated."""
        return {}

    def volume(self, split: str, index: int) -> Volume | None:
        """Return where sample ``index`` of a split lies in a 3-D case; None where samples are no slices."""
        return None
