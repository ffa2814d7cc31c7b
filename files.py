"""Files and folders that are either whole or absent."""

import os
import shutil
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def beside(folder: Path) -> Path:
    """Return where a folder is written until it is whole: hidden beside it, and not there yet."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def put_in_place(partial: Path, folder: Path) -> None:
    """Move a folder that is whole now to its place, over what stood there."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, folder)
