"""Files that are either whole or absent."""

import os
from pathlib import Path

import lightning as L


def in_run(trainer: L.Trainer, path: str) -> Path:
    """Return a path; a relative one is taken from ``trainer.default_root_dir``, the folder of the run."""
    return Path(trainer.default_root_dir) / path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)
