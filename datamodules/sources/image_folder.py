"""Images without masks, to be segmented."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.sources.folder import Format, expand, files_by_stem, open_image, to_levels


class ImageFolder(Dataset[dict[str, Any]]):
    """The images of a folder, at one size: ``image`` float32 ``(C, H, W)`` in [−1, 1], and ``index``.

    Args:
        folder: holds PNG, JPEG, TIFF or BMP files; other files and sub-folders are passed over.
        size: height and width (H, W) of the samples.
        channels: 1 for grey or 3 for RGB.

    Raises:
        InputError: the folder is absent or empty, two files share a stem, or a file cannot be decoded.
    """

    def __init__(self, folder: str, size: tuple[int, int], channels: int) -> None:
        self.files = sorted(files_by_stem(expand(folder), "data.images").items())
        self.format = Format(size, channels, None, ())
        with ThreadPoolExecutor() as pool:
            self.shapes = list(pool.map(self._check, (path for _, path in self.files)))

    def _check(self, path: Path) -> tuple[int, int]:
        image = open_image(path)
        to_levels(path, image, self.format)
        return image.height, image.width

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files[index][1]
        levels = to_levels(path, open_image(path), self.format)
        return {"image": torch.from_numpy(levels).float() / 127.5 - 1, "index": index}

    def name(self, index: int) -> str:
        """Return the file's name without its ending."""
        return self.files[index][0]

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width of the file."""
        return self.shapes[index]
