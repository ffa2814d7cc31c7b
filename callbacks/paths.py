"""Where a run's files lie."""

from pathlib import Path

import lightning as L


def in_run(trainer: L.Trainer, path: str) -> Path:
    """Return a path; a relative one is taken from ``trainer.default_root_dir``, the folder of the run."""
    return Path(trainer.default_root_dir) / path
