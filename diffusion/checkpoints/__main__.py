"""Convert models between the original repositories, diffusers and this application.

``python -m diffusion.checkpoints to-diffusers CHECKPOINT FOLDER [--tokenizer FOLDER]``
``python -m diffusion.checkpoints to-original FOLDER CHECKPOINT``
``python -m diffusion.checkpoints import START WEIGHTS --config configs/backbones/siamesediff.yaml``
``python -m diffusion.checkpoints export WEIGHTS FOLDER [--base START] [--size PIXELS]``
"""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffusion.backbones import Backbone, ControlLDM, SegDiff, SiameseDiff
from diffusion.checkpoints.model import (
    Model,
    local,
    original_weights,
    read_folder,
    read_model,
    read_original,
    write_folder,
)
from errors import InputError
from networks.pretrained import load_pretrained, save_pretrained
from networks.weight_files import write_weights

KINDS = {kind.__name__: kind for kind in (ControlLDM, SegDiff, SiameseDiff)}


def to_diffusers(options: argparse.Namespace) -> Model:
    """Write an original checkpoint as a diffusers folder."""
    model = read_original(options.source, options.heads)
    write_folder(model, options.target, options.tokenizer)
    return model


def to_original(options: argparse.Namespace) -> Model:
    """Write a diffusers folder as an original checkpoint."""
    model = read_folder(options.source)
    write_weights(original_weights(model), options.target, options.wrapper)
    return model


def take_in(options: argparse.Namespace) -> Model:
    """Write weights that this application mines and synthesises with."""
    backbone = configured(options.config, str(options.source), options.heads)
    save_pretrained(backbone, options.target, {"start": str(options.source)})
    return backbone.model()


def give_out(options: argparse.Namespace) -> Model:
    """Write a trained backbone as a folder; what is none of its networks is that of ``base``."""
    kind: Any = Backbone
    backbone = load_pretrained(options.source, kind)
    model = backbone.model()
    if isinstance(backbone, SegDiff):
        model.configs["unet"]["sample_size"] = options.size
        write_folder(model, options.target)
        return model
    if options.base is None:
        raise InputError(f"--base: give what {options.source} was started from, for its text encoder")
    base = read_model(options.base)
    if "text_encoder" not in base.weights:
        raise InputError(f"--base {options.base}: has no text encoder; give a model that has")
    for part in ("weights", "configs"):
        getattr(model, part)["text_encoder"] = getattr(base, part)["text_encoder"]
    scales = {m.configs["vae"].get("scaling_factor") for m in (model, base)}
    if base.rule == model.rule and len(scales) == 1:  # averaged weights are those of another training
        model.extras = {k: v for k, v in base.extras.items() if not k.startswith("model_ema.")}
    beside = None if options.base.is_file() else local(options.base) / "tokenizer"
    tokenizer = options.tokenizer or (beside if beside and beside.is_dir() else None)
    write_folder(model, options.target, tokenizer)
    return model


def configured(config: Path, start: str, heads: int | None) -> ControlLDM | SegDiff:
    """Return the backbone that a file of ``configs/backbones`` describes, from ``start``.

    Raises:
        InputError: the file cannot be read or describes no backbone, or ``start`` does not fit it.
    """
    try:
        given = yaml.safe_load(config.read_text())["model"]["init_args"]["backbone"]
        kind: Any = KINDS[given["class_path"].split(".")[-1]]
        arguments = dict(given.get("init_args", {})) | {"start": start}
        arguments |= {} if heads is None else {"heads": heads}
        inspect.signature(kind).bind(**arguments)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--config {config}: describes no backbone ({error}); give a file such as "
            "configs/backbones/siamesediff.yaml"
        ) from error
    return kind(**arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and print what went where."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, source: str, target: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.add_argument("source", type=Path, metavar=source)
        added.add_argument("target", type=Path, metavar=target)
        added.set_defaults(run=run)
        return added

    heads: dict[str, Any] = {
        "type": int,
        "help": "attention heads of the U-Net; Stable Diffusion's by default",
    }
    tokenizer: dict[str, Any] = {"type": Path, "help": "folder of CLIP's tokenizer to put beside"}
    one = command("to-diffusers", to_diffusers, "CHECKPOINT", "FOLDER")
    one.add_argument("--heads", **heads)
    one.add_argument("--tokenizer", **tokenizer)
    one = command("to-original", to_original, "FOLDER", "CHECKPOINT")
    one.add_argument("--wrapper", choices=("bare", "lightning", "deepspeed"), default="bare")
    one = command("import", take_in, "START", "WEIGHTS")
    one.add_argument("--config", type=Path, required=True, help="a file of configs/backbones")
    one.add_argument("--heads", **heads)
    one = command("export", give_out, "WEIGHTS", "FOLDER")
    one.add_argument("--base", type=Path, help="what the backbone was started from; a SegDiff needs none")
    one.add_argument("--size", type=int, default=256, help="sides of a SegDiff's images, in pixels")
    one.add_argument("--tokenizer", **tokenizer)
    options = parser.parse_args(arguments)
    if options.target.exists():
        raise InputError(f"{options.target}: exists; remove it, or give another name")
    print(options.run(options))
    print(options.target)


if __name__ == "__main__":
    main()
