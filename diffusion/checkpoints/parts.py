"""A network as diffusers writes it: a folder of ``config.json`` and one file of weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import InputError
from networks.weight_files import read_weights

KINDS = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
"""How a file of weights ends; the first kind that there is one of is read."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the settings that a file holds.

    Raises:
        InputError: there is no such file, it is no JSON, or it holds no settings by name.
    """
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file}: holds no settings by name, but a {type(settings).__name__}")
    return settings


def read_part(part: Path) -> dict[str, Tensor]:
    """Return the weights in a network's folder.

    Raises:
        InputError: there is no file of weights or more than one of a kind, or it cannot be read.
    """
    for kind in KINDS:
        stored = [file for file in part.glob(f"*.{kind}") if f"{file.name.split('.')[0]}.{kind}" == file.name]
        if len(stored) == 1:
            return read_weights(stored[0])
        if stored:
            raise InputError(f"{part}: holds {len(stored)} {kind} files; there should be one, of all weights")
    raise InputError(f"{part}: holds no weights ({', '.join(f'*.{kind}' for kind in KINDS)})")


def built(build: Callable[[], nn.Module], where: str) -> nn.Module:
    """Return a network without memory for its weights, to compare names and shapes with.

    Raises:
        InputError: its configuration describes none.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} describes no network ({type(error).__name__}: {reason})") from error


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raise unless weights are exactly those of a network, and numbers.

    Args:
        weights: what was read.
        expected: the state of the network that its configuration describes; only shapes are looked at.
        where: the file, and the network in it.

    Raises:
        InputError: a weight is missing, is not known, has another shape, or is not finite.
    """
    wrong = [f"{key} is missing" for key in expected.keys() - weights.keys()]
    wrong += [f"{key} is unexpected" for key in weights.keys() - expected.keys()]
    for key in weights.keys() & expected.keys():
        value, shape = weights[key], tuple(expected[key].shape)
        if tuple(value.shape) != shape:
            wrong.append(f"{key} is {tuple(value.shape)}, not {shape}")
        elif not value.is_floating_point():
            wrong.append(f"{key} is {value.dtype}, not of floating point")
        elif not value.isfinite().all():
            wrong.append(f"{key} holds NaN or infinity")
    if wrong:
        raise InputError(
            f"{where} is not whole: {len(wrong)} weights differ from what its shape asks "
            f"for ({'; '.join(sorted(wrong)[:3])})"
        )
