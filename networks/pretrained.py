"""Networks that live in a folder: config.json + safetensors, loaded strictly, frozen for good."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from errors import InputError
from files import beside, put_in_place


class Pretrained(ModelMixin, ConfigMixin):
    """A diffusers model that can be frozen.

    Subclasses decorate ``__init__`` with ``register_to_config``, so that ``save_pretrained`` writes
    everything needed to build them again.
    """

    frozen = False

    def freeze(self) -> Self:
        """Stop learning for good: no gradients in the parameters, and eval mode whatever is asked."""
        self.frozen = True
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless frozen."""
        return super().train(mode and not self.frozen)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that the network was built with, as JSON would give them back."""
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return json.loads(json.dumps(config, default=str))

    def fingerprint(self) -> str:
        """Return SHA-256 over class, configuration and weights, first 16 hexadecimal digits.

        Arguments at their default are left out, so that a new one changes no fingerprint.
        """
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        usual = json.loads(json.dumps(defaults, default=str))
        chosen = {key: value for key, value in self.settings().items() if value != usual.get(key)}
        description = f"{type(self).__name__} {json.dumps(chosen, sort_keys=True)}"
        digest = hashlib.sha256(description.encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


P = TypeVar("P", bound=Pretrained)


def _subclasses(kind: type[P]) -> dict[str, type[P]]:
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found |= _subclasses(child)
    return found


def load_pretrained(folder: str | Path, kind: type[P]) -> P:
    """Load the network that a folder holds, whichever subclass of ``kind`` it is.

    Args:
        folder: written by ``save_pretrained``.
        kind: base class that the network must belong to.

    Raises:
        InputError: the folder or one of its files is missing or unreadable, it holds another kind of
            network, or its weights do not fit the architecture that its configuration describes.
    """
    folder = Path(folder)
    fix = f"give the folder of a trained {kind.__name__}, as `python cli.py fit` writes it to weights/"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such weights folder; {fix}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: has no config.json; {fix}") from None
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: is not valid JSON ({error}); {fix}") from None
    known = _subclasses(kind)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in known:
        raise InputError(
            f"{folder}: holds a {name}, not a {kind.__name__} ({', '.join(sorted(known))}); {fix}"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: has a config.json but no *.safetensors weights; {fix}")
    try:
        network, info = known[name].from_pretrained(
            str(folder), output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise InputError(f"{folder}: the weights do not fit its config.json ({reason}); {fix}") from error
    problems = {
        key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)
    }
    if problems:
        shown = "; ".join(
            f"{key}: {', '.join(map(str, list(names)[:3]))} …" for key, names in problems.items()
        )
        raise InputError(
            f"{folder}: the weights are of another architecture than its config.json ({shown}); {fix}"
        )
    return network


def frozen(given: str | Path | P, kind: type[P]) -> P:
    """Return a network as it is given, or the one that a folder holds, frozen.

    Raises:
        InputError: see :func:`load_pretrained`.
    """
    return load_pretrained(given, kind).freeze() if isinstance(given, str | Path) else given


def save_pretrained(network: Pretrained, folder: str | Path, facts: dict[str, Any]) -> None:
    """Write a network, and ``training.json`` with facts about it, to a folder that is whole or absent."""
    folder = Path(folder)
    partial = beside(folder)
    partial.mkdir(parents=True)
    network.save_pretrained(str(partial))
    (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    put_in_place(partial, folder)


def training_facts(folder: str | Path) -> dict[str, Any]:
    """Return the facts that :func:`save_pretrained` wrote beside a network; {} where there are none."""
    file = Path(folder) / "training.json"
    return json.loads(file.read_text()) if file.is_file() else {}
