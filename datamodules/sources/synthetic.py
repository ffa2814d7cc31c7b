"""A synthesised set as it lies on disk: images/, masks/, manifest.jsonl, dataset.json."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datamodules.sources.source import Sample
from errors import InputError


class SyntheticSet(Dataset[Sample]):
    """The first samples of a synthesised set, held in memory as 8-bit images.

    Args:
        folder: written by ``cli.py predict``.
        count: how many samples to take, in the order of their index; None takes all. Sample i does not
            depend on how many were made, so a small budget is the head of a large one.

    Raises:
        InputError: the folder is no complete synthesised set, or holds fewer than ``count`` samples.
    """

    def __init__(self, folder: str | Path, count: int | None = None) -> None:
        self.folder = Path(folder)
        manifest = self.folder / "manifest.jsonl"
        if not (self.folder / "dataset.json").is_file() or not manifest.is_file():
            raise InputError(
                f"{folder}: is no complete synthesised set (dataset.json and manifest.jsonl); "
                "make it with `python cli.py predict`"
            )
        try:
            self.entries = [json.loads(line) for line in manifest.read_text().splitlines()]
            self.files = [
                (self.folder / entry["image"], self.folder / entry["mask"]) for entry in self.entries
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{manifest}: is no manifest ({error!r}); synthesise the set again") from None
        if count is not None:
            if count > len(self.entries):
                raise InputError(
                    f"{folder}: holds {len(self.entries)} samples, {count} were asked for; synthesise more"
                )
            self.entries = self.entries[:count]
        self._cache = [self._read(*files) for files in self.files[: len(self.entries)]]

    def _read(self, *files: Path) -> tuple[np.ndarray, np.ndarray]:
        arrays = []
        for file in files:
            try:
                with Image.open(file) as image:
                    arrays.append(np.asarray(image))
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error}); synthesise the set again") from None
        return arrays[0], arrays[1]

    @cached_property
    def made(self) -> dict[str, Any]:
        """How the set was made: the content of its ``dataset.json``."""
        try:
            made: dict[str, Any] = json.loads((self.folder / "dataset.json").read_text())
        except ValueError as error:
            file = self.folder / "dataset.json"
            raise InputError(f"{file}: cannot be read ({error}); synthesise the set again") from None
        return made

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """Every shape (C, H, W) that an image has."""
        return {(1, *image.shape) if image.ndim == 2 else (3, *image.shape[:2]) for image, _ in self._cache}

    @property
    def highest_class(self) -> int:
        """The highest class in any mask."""
        return max(int(mask.max()) for _, mask in self._cache)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Return a sample; the image in [−1, 1], the mask a class map."""
        image, mask = self._cache[index]
        pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
        labels = torch.from_numpy(mask.astype(np.int64))
        return {"image": pixels, "mask": labels, "id": f"{self.entries[index]['index']:06d}"}
