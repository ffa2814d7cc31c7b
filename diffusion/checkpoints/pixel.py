"""Pixel-space models as the code of Konz et al. writes them: a folder with ``unet/`` and ``scheduler/``."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from diffusion.checkpoints.parts import (
    built,
    check_weights,
    read_json,
    read_part,
    read_schedule,
    with_new_names,
)
from errors import InputError

READ = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"),
    *("down_block_types", "up_block_types"),
)
FREE = ("sample_size", "dropout")
"""Settings of a U-Net that ``SegDiff`` has too, and those that change no ε; others are at their default."""


def read_pixel_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of ``SegDiff`` for its network and its schedule, and the weights of its U-Net.

    Args:
        folder: ``unet/config.json`` with its weights, and ``scheduler/scheduler_config.json``
            (the published one where it is missing).

    Raises:
        InputError: a file is missing or damaged, or the network is none that ``SegDiff`` can be.
    """
    folder = Path(folder)
    given = read_json(folder / "unet" / "config.json")
    network: Any = built(partial(UNet2DModel.from_config, given), f"{folder / 'unet' / 'config.json'}")
    usual = {name: p.default for name, p in inspect.signature(UNet2DModel.__init__).parameters.items()}
    unet = dict(network.config)
    blocks = unet["down_block_types"]
    mirrored = [kind.replace("Down", "Up") for kind in reversed(blocks)]
    other = [
        f"{key} {value}"
        for key, value in (unet | given).items()
        if not key.startswith("_") and key not in (*READ, *FREE) and value != usual.get(key)
    ]
    other += sorted({*blocks} - {"DownBlock2D", "AttnDownBlock2D"})
    if list(unet["up_block_types"]) != mirrored:
        other.append(f"up_block_types {', '.join(unet['up_block_types'])}")
    mask_channels = unet["in_channels"] - unet["out_channels"]
    if other or mask_channels != 1:
        raise InputError(
            f"{folder}: is no network of segmentation-guided diffusion: it has "
            f"{', '.join(other) or f'{mask_channels} channels for the mask, not 1'}"
        )
    weights = with_new_names(network, read_part(folder / "unet"))
    check_weights(weights, network.state_dict(), f"{folder}: the unet")
    settings = {
        "image_channels": unet["out_channels"],
        "block_out_channels": tuple(unet["block_out_channels"]),
        "layers_per_block": unet["layers_per_block"],
        "attention_levels": tuple(level for level, kind in enumerate(blocks) if kind.startswith("Attn")),
        "norm_num_groups": unet["norm_num_groups"],
    }
    return settings, read_schedule(folder), weights
