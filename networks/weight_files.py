"""Checkpoint files of the original repositories: read without running what they hold, and written."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import InputError

Wrapper = Literal["bare", "lightning", "deepspeed"]
PREFIXES = ("_forward_module.", "module.")
"""What training frameworks put before every name."""


class Inert:
    """Stands in for an object in an old checkpoint that says nothing about the weights."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


ALLOWED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.enums.GradClipAlgorithmType",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)
"""What old Lightning files may name beside tensors; each is read as :class:`Inert`, none is imported."""


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, without wrapper and without a framework's prefix.

    Pickles are read with ``weights_only``: what is not a tensor, a plain container or in :data:`ALLOWED`
    is refused before anything of it runs.

    Args:
        file: ``.safetensors``, or ``.ckpt``, ``.pth``, ``.pt`` or ``.bin``: bare weights, those of a
            Lightning checkpoint (``state_dict``), of a DeepSpeed one (``module``) or under ``model``.

    Raises:
        InputError: the file is missing, damaged, refused, or holds no weights.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such checkpoint file")
    content = _tensors(file) if file.suffix == ".safetensors" else _unpickled(file)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{file}: holds no weights by name, but a {type(content).__name__}")
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is damaged or no safetensors file ({error}); fetch it again") from error


def _unpickled(file: Path) -> Any:
    stand_ins: list[Any] = [(Inert, name) for name in ALLOWED]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise InputError(
            f"{file}: was refused: it holds more than weights{what}, and reading it could run "
            "code; ask its author for a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file}: is damaged or no checkpoint ({reason}); fetch it again") from error


def write_weights(weights: Mapping[str, Tensor], file: str | Path, wrapper: Wrapper = "bare") -> None:
    """Write weights under original names, whole or not at all.

    Args:
        weights: by name.
        file: ``.safetensors``, or else a pickle.
        wrapper: ``bare``; ``lightning``, under ``state_dict``; or ``deepspeed``, under ``module`` with
            its prefix.

    Raises:
        InputError: a wrapper is asked of a safetensors file, which has none.
    """
    file = Path(file)
    if file.suffix == ".safetensors" and wrapper != "bare":
        raise InputError(f"{file}: a safetensors file has no wrapper; leave it bare, or write a .ckpt")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    try:
        if file.suffix == ".safetensors":
            save_file(tensors, partial)
        elif wrapper == "lightning":
            torch.save({"epoch": 0, "global_step": 0, "state_dict": tensors}, partial)
        elif wrapper == "deepspeed":
            torch.save({"module": {f"_forward_module.{k}": v for k, v in tensors.items()}}, partial)
        else:
            torch.save(tensors, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
