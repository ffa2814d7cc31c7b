"""Cases as memory-mapped slices of the size that is asked for, made once and kept on disk."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.sources.volume_files import ONE_READER, Spacing
from errors import InputError

VERSION = 2
"""Raised whenever the same files would make other slices."""

LEVELS = 65535
LOOK_SIZE = 16
MIN_LEVELS = 16
"""Slices with fewer different grey values are not compared: empty ones are all alike."""


@dataclass(frozen=True)
class Slices:
    """A case of which every slice has been resized.

    Attributes:
        image: uint16 ``(D, H, W)``, 0 to 65535 for [0, 1].
        mask: uint8 classes ``(D, H, W)``.
        spacing: size of a resized voxel in mm along (D, H, W), or None.
        prints: fingerprint of each slice's image; empty slices have none.
        looks: float32 ``(N, LOOK_SIZE, LOOK_SIZE)``, the same slices small, each of mean 0 and norm 1.
        entry: folder that it was loaded from; a copy for another process loads it anew.
    """

    image: NDArray[np.uint16]
    mask: NDArray[np.uint8]
    spacing: Spacing | None
    prints: tuple[str, ...]
    looks: NDArray[np.float32]
    entry: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.entry is None:
            return Slices, (self.image, self.mask, self.spacing, self.prints, self.looks)
        return _load, (self.entry,)


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/native-adversarial-synthesis``, or the same below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "native-adversarial-synthesis"


def resize(
    image: NDArray[np.float32], classes: NDArray[np.uint8], spacing: Spacing | None, size: tuple[int, int]
) -> Slices:
    """Resize every slice, images linearly with antialiasing and classes to the nearest neighbour.

    Args:
        image: ``(D, H, W)`` in [0, 1].
        classes: ``(D, H, W)``.
        spacing: of these voxels in mm; it grows as pixels do.
        size: height and width of the slices that are returned.
    """
    depth, *old = image.shape
    pixels = np.empty((depth, *size), np.uint16)
    mask = np.empty((depth, *size), np.uint8)
    for k in range(depth):
        grey = _resized(image[k], size, Image.Resampling.BILINEAR)
        pixels[k] = np.rint(np.clip(grey, 0, 1) * LEVELS)
        mask[k] = _resized(classes[k], size, Image.Resampling.NEAREST)
    if spacing is not None:
        spacing = (spacing[0], spacing[1] * old[0] / size[0], spacing[2] * old[1] / size[1])
    full = [each for each in pixels if np.unique(each).size >= MIN_LEVELS]
    prints = tuple(hashlib.sha256(each.tobytes()).hexdigest()[:32] for each in full)
    return Slices(pixels, mask, spacing, prints, np.array([_look(each) for each in full], np.float32))


def _look(plane: NDArray[np.uint16]) -> NDArray[np.float32]:
    small = _resized(plane.astype(np.float32), (LOOK_SIZE, LOOK_SIZE), Image.Resampling.BILINEAR)
    small = small - small.mean()
    return small / max(float(np.linalg.norm(small)), 1.0)


def _resized(plane: NDArray[Any], size: tuple[int, int], method: Image.Resampling) -> NDArray[Any]:
    if plane.shape == size:
        return plane
    return np.asarray(Image.fromarray(plane).resize(size[::-1], method))


def cached(folder: Path, files: Sequence[Path], options: str, make: Callable[[], Slices]) -> Slices:
    """Return a case from the cache, making it first if it is not there.

    An entry is a folder that is named by the fingerprint of the options and of every file's path, size and
    time of change. It is written elsewhere and renamed, so that it is whole or absent, also when
    several processes make it at once. One that is damaged is made anew.

    Args:
        folder: of the cache.
        files: that the case is made of.
        options: everything else that it depends on.
        make: makes the case.

    Raises:
        InputError: the case cannot be made, or the cache cannot be written.
    """
    entry = folder / _fingerprint(files, options)
    if entry.is_dir():
        try:
            return _load(entry)
        except (OSError, EOFError, ValueError, KeyError):
            shutil.rmtree(entry, ignore_errors=True)
    slices = make()
    try:
        _write(entry, slices)
    except OSError as error:
        raise InputError(f"{folder}: the cache cannot be written ({error}): set cache to a folder") from error
    return _load(entry)


def _load(entry: Path) -> Slices:
    facts = json.loads((entry / "facts.json").read_text())
    with ONE_READER:
        return Slices(
            np.load(entry / "image.npy", mmap_mode="r"),
            np.load(entry / "mask.npy", mmap_mode="r"),
            None if facts["spacing"] is None else tuple(facts["spacing"]),
            tuple(facts["prints"]),
            np.load(entry / "looks.npy"),
            entry,
        )


def _fingerprint(files: Sequence[Path], options: str) -> str:
    state = []
    for file in files:
        facts = file.stat()
        state.append((str(file.resolve()), facts.st_size, facts.st_mtime_ns))
    return hashlib.sha256(repr((VERSION, options, state)).encode()).hexdigest()[:32]


def _write(entry: Path, slices: Slices) -> None:
    partial = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        np.save(partial / "image.npy", slices.image)
        np.save(partial / "mask.npy", slices.mask)
        np.save(partial / "looks.npy", slices.looks)
        facts = {"spacing": slices.spacing, "prints": slices.prints}
        (partial / "facts.json").write_text(json.dumps(facts))
        os.rename(partial, entry)
    except OSError:
        if not entry.is_dir():  # otherwise another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
