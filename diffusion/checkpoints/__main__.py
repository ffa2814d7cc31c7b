"""Convert models between the original repositories, diffusers and this application.

``python -m diffusion.checkpoints to-diffusers CHECKPOINT FOLDER [--tokenizer FOLDER]``
``python -m diffusion.checkpoints to-original FOLDER CHECKPOINT``
``python -m diffusion.checkpoints import START WEIGHTS --config configs/backbones/siamesediff.yaml``
``python -m diffusion.checkpoints export WEIGHTS FOLDER --base START``
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import diffusion.backbones as backbones
from diffusion.backbones import Backbone, ControlLDM
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


def take_in(options: argparse.Namespace) -> Model | None:
    """Write weights that this application mines and synthesises with."""
    backbone = configured(options.config, str(options.source), options.heads)
    save_pretrained(backbone, options.target, {"start": str(options.source)})
    return read_model(options.source, options.heads) if isinstance(backbone, ControlLDM) else None


def give_out(options: argparse.Namespace) -> Model:
    """Write a trained backbone as a diffusers folder; text encoder and tokenizer are those of ``base``."""
    backbone = load_pretrained(options.source, ControlLDM)
    base = read_model(options.base)
    model = backbone.model()
    model.extras = base.extras
    for part in ("weights", "configs"):
        getattr(model, part)["text_encoder"] = getattr(base, part)["text_encoder"]
    tokenizer = options.tokenizer or (local(options.base) / "tokenizer")
    write_folder(model, options.target, tokenizer if tokenizer.is_dir() else None)
    return model


def configured(config: Path, start: str, heads: int | None) -> Backbone:
    """Return the backbone that a file of ``configs/backbones`` describes, from ``start``.

    Raises:
        InputError: the file cannot be read or describes no backbone, or ``start`` does not fit it.
    """
    try:
        given = yaml.safe_load(config.read_text())["model"]["init_args"]["backbone"]
        name, arguments = given["class_path"].split(".")[-1], dict(given.get("init_args", {}))
        kind: Any = getattr(backbones, name)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--config {config}: describes no backbone ({error}); give a file such as "
            "configs/backbones/siamesediff.yaml"
        ) from error
    if heads is not None:
        arguments["heads"] = heads
    return kind(**arguments | {"start": start})


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
    one.add_argument("--base", type=Path, required=True, help="what the backbone was started from")
    one.add_argument("--tokenizer", **tokenizer)
    options = parser.parse_args(arguments)
    model = options.run(options)
    if model is not None:
        print(model)
        print("    0 weights missing, 0 unexplained")
    print(options.target)


if __name__ == "__main__":
    main()
