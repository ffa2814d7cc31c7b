"""Pixel-space models as the code of Konz et al. writes them: a folder with ``unet/`` and ``scheduler/``."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import InputError
from networks.weight_files import read_weights

EXPECTED = {"center_input_sample": False, "time_embedding_type": "positional", "act_fn": "silu"}
"""What a U-Net must have where its configuration says anything about it."""


def read_pixel_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of ``SegDiff`` and the weights of its U-Net.

    Args:
        folder: ``unet/config.json`` with ``diffusion_pytorch_model.safetensors`` or ``.bin``, and
            ``scheduler/scheduler_config.json`` (diffusers' defaults where it is missing).

    Raises:
        InputError: a file is missing or damaged, or the network is none that ``SegDiff`` can be.
    """
    folder = Path(folder)
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'unet' / 'config.json'}: cannot be read ({error})") from error
    blocks = unet["down_block_types"]
    unknown = sorted({*blocks} - {"DownBlock2D", "AttnDownBlock2D"})
    other = [f"{key} {unet[key]}" for key, value in EXPECTED.items() if unet.get(key, value) != value]
    mask_channels = unet["in_channels"] - unet["out_channels"]
    if unknown or other or mask_channels != 1:
        raise InputError(
            f"{folder}: is no network of segmentation-guided diffusion: it has "
            f"{', '.join([*unknown, *other]) or f'{mask_channels} channels for the mask, not 1'}"
        )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(scheduler.read_text()) if scheduler.is_file() else {}
    settings = {
        "image_channels": unet["out_channels"],
        "block_out_channels": tuple(unet["block_out_channels"]),
        "layers_per_block": unet["layers_per_block"],
        "attention_levels": tuple(level for level, kind in enumerate(blocks) if kind.startswith("Attn")),
        "norm_num_groups": unet.get("norm_num_groups", 32),
        "beta_schedule": schedule.get("beta_schedule", "linear"),
        "beta_start": schedule.get("beta_start", 1e-4),
        "beta_end": schedule.get("beta_end", 0.02),
        "train_steps": schedule.get("num_train_timesteps", 1000),
        "clip_sample": schedule.get("clip_sample", True),
    }
    stem = folder / "unet" / "diffusion_pytorch_model"
    file = next((f for f in (stem.with_suffix(s) for s in (".safetensors", ".bin")) if f.is_file()), None)
    if file is None:
        raise InputError(f"{stem}.safetensors: no such file; give the folder that training has written")
    return settings, read_weights(file)
