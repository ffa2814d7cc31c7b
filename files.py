"""Files and folders that are either whole or absent."""

import math
import os
import shutil
from pathlib import Path
from typing import Any


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


def finite(value: Any) -> Any:
    """Return None for a number that JSON has not, NaN or infinite, also inside lists and mappings."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
