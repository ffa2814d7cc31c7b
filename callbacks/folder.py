"""Folders of predictions that are whole or absent."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image

from callbacks.paths import in_run
from errors import InputError
from files import put_in_place


def save_png(image: np.ndarray | Image.Image, path: Path) -> None:
    """Write a PNG that is whole or absent."""
    partial = path.with_suffix(".partial")
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(partial, format="PNG")
    os.replace(partial, path)


class FolderWriter(BasePredictionWriter, ABC):
    """Write predictions beside their folder, and move them there when the last one is done.

    Args:
        folder: where they go, relative to ``trainer.default_root_dir``. A folder of the same kind that is
            already there is replaced; anything else is refused.

    Attributes:
        title: what such a folder is.
        marker: the file in it by which it is known.

    Raises:
        InputError: ``folder`` exists and holds something else.
    """

    title: str
    marker: str

    def __init__(self, folder: str) -> None:
        super().__init__(write_interval="batch")
        self.argument = folder

    def check_folder(self, trainer: L.Trainer) -> Path:
        """Return where the predictions go; refuse a folder that holds something else."""
        folder = in_run(trainer, self.argument)
        if folder.exists() and not (folder / self.marker).is_file():
            raise InputError(f"{folder}: exists and is no {self.title}; move it away or name another folder")
        return folder

    @abstractmethod
    def parts(self, trainer: L.Trainer) -> Sequence[str]:
        """Return the names of the folders within."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Prepare an empty folder beside the one that the predictions go to."""
        if stage != "predict":
            return
        self.folder = self.check_folder(trainer)
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        if trainer.is_global_zero:
            shutil.rmtree(self.partial, ignore_errors=True)
            for name in self.parts(trainer):
                (self.partial / name).mkdir(parents=True)
        trainer.strategy.barrier()

    def publish(self) -> None:
        """Move what was written to its place."""
        put_in_place(self.partial, self.folder)
