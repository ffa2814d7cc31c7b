"""A network as diffusers writes it: a folder of ``config.json`` and one file of weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from errors import InputError
from networks.weight_files import read_weights

KINDS = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
"""How a file of weights ends; the first kind that there is one of is read."""

BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""What a backbone's schedule can be, by the names of diffusers."""


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


def read_schedule(folder: Path) -> dict[str, Any]:
    """Return what ``scheduler/`` says, by the names of a backbone's arguments; {} where there is none.

    Raises:
        InputError: it cannot be read, lacks a setting, or is a schedule that no backbone has.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    given = read_json(file)
    known: dict[str, Sequence[Any]] = {
        "beta_schedule": BETA_SCHEDULES,
        "prediction_type": tuple(PREDICTIONS),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
    }
    for key, values in known.items():
        if given.get(key, values[0]) not in values:
            raise InputError(
                f"{file}: {key} is {given[key]}, and a backbone's is {' or '.join(map(str, values))}; give a "
                "model that was trained so"
            )
    try:
        found = {
            "beta_schedule": given["beta_schedule"],
            "beta_start": float(given["beta_start"]),
            "beta_end": float(given["beta_end"]),
            "train_steps": int(given["num_train_timesteps"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: lacks a setting, or has no number for one ({error})") from error
    found["prediction"] = PREDICTIONS[given.get("prediction_type", "epsilon")]
    return found | {key: given[key] for key in ("clip_sample",) if key in given}


def described(network: Any) -> dict[str, Any]:
    """Return what ``config.json`` says of a network of diffusers."""
    settings = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {"_class_name": type(network).__name__, "_diffusers_version": diffusers.__version__, **settings}


def with_new_names(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with old names of attention changed as diffusers changes them when it loads them."""
    renamed = dict(weights)
    network._fix_state_dict_keys_on_load(renamed)
    return renamed


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
