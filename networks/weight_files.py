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
PREFIXES = ("_forward_module.", "module.", "model.")
"""What training frameworks put before every name, one before another."""


class Inert:
    """Stands in for an object in an old checkpoint that says nothing about the weights."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Plain:
    """Stands in for a dictionary of another class: a plain one."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        """Return an empty dictionary, which the unpickler fills."""
        return {}


INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.enums.GradClipAlgorithmType",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Union")),
    *("typing.Any", "typing.Union"),
    *(f"builtins.{kind}" for kind in ("list", "dict", "tuple", "int", "float", "bool", "str")),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
)
PLAIN = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
"""What Lightning files may name beside tensors: settings, and numbers of callbacks. In place of each name
:class:`Inert` or :class:`Plain` is called; nothing is imported, and none of it is looked at."""


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, without wrapper and without a framework's prefix.

    Pickles are read with ``weights_only``: what is not a tensor, a plain container, in :data:`INERT`
    or in :data:`PLAIN` is refused before anything of it runs.

    Args:
        file: ``.safetensors``, or ``.ckpt``, ``.pth``, ``.pt`` or ``.bin``: bare weights, those of a
            Lightning checkpoint (``state_dict``), of a DeepSpeed one (``module``) or under ``model``.

    Raises:
        InputError: the file is missing, damaged, refused, or holds no weights.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: {'is a folder, no' if file.is_dir() else 'no such'} checkpoint file")
    content = _content(file)
    for wrapper in ("state_dict", "module", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    named = content.items() if isinstance(content, Mapping) else ()
    weights = {key: v for key, v in named if isinstance(key, str) and isinstance(v, Tensor)}
    if not weights:
        raise InputError(f"{file}: holds no weights by name, but a {type(content).__name__}")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _content(file: Path) -> Any:
    """Return what a file holds, by its first bytes: people rename files."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":
        return _tensors(file)
    if start.startswith((b"PK", b"\x80")):
        return _unpickled(file)
    raise InputError(f"{file}: is damaged or no checkpoint (it begins with {start!r}); fetch it again")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: is damaged or no safetensors file ({error}); fetch it again") from error


def _unpickled(file: Path) -> Any:
    stand_ins: list[Any] = [
        (kind, name) for kind, names in ((Inert, INERT), (Plain, PLAIN)) for name in names
    ]
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
