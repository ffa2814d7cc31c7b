"""Read single files of a run."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from errors import InputError

CURVE_POINTS = 150
"""Most points drawn of a training curve, spread evenly over it; first and last always."""


def read_mapping(folder: Path, name: str, parse: Callable[[str], Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return the mapping in a file of the run.

    Args:
        folder: of the run.
        name: of the file, relative to the folder.
        parse: its text to its content.
        keys: what it must have; "a.b" is key b of the mapping a.

    Raises:
        InputError: the file is missing, cannot be parsed, or lacks a key.
    """
    path = folder / name
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make it with: {_command(folder)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(
            f"{path} cannot be read ({problem}); delete it and run: {_command(folder)}"
        ) from None
    missing = [key for key in keys if not _has(content, key.split("."))]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}; delete it and run: {_command(folder)}")
    return content


def read_features(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of real (R, D) and synthetic (N, D) images in an npz file of the run.

    Raises:
        InputError: the file cannot be read, lacks an array, or they are not finite or do not fit.
    """
    path = folder / name
    try:
        with np.load(path) as arrays:
            real, synthetic = arrays["real"], arrays["synthetic"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run: {_command(folder)}") from None
    if real.ndim != 2 or synthetic.ndim != 2 or real.shape[1] != synthetic.shape[1]:
        raise InputError(f"{path}: features {real.shape} and {synthetic.shape} must be (R, D) and (N, D)")
    if not (np.isfinite(real).all() and np.isfinite(synthetic).all()):
        raise InputError(f"{path}: some features are not finite; look for a damaged image")
    return real, synthetic


def read_scalars(logs: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return tag, steps and values of every curve in a folder of TensorBoard files, not of single points."""
    if not logs.is_dir():
        return []
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    series = []
    for tag in events.Tags()["scalars"]:
        logged = events.Scalars(tag)
        if tag not in ("epoch", "hp_metric") and len(logged) > 1:
            points = evenly(logged, CURVE_POINTS)
            series.append((tag, np.array([p.step for p in points]), np.array([p.value for p in points])))
    return series


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` items, spread evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def _has(content: Any, path: Sequence[str]) -> bool:
    """Return whether nested mappings have a key at the end of a path."""
    for key in path:
        if not isinstance(content, dict) or key not in content:
            return False
        content = content[key]
    return True


def _command(folder: Path) -> str:
    return f"make experiment NAME={folder.resolve().name}"
