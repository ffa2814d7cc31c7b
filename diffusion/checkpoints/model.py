"""A latent diffusion model as weights: read from an original file or a folder of diffusers, and written.

A diffusers folder holds ``unet/``, ``controlnet/`` and ``vae/``, ``text_encoder/`` where there is one, and
``scheduler/``. The hint encoder of Siamese-Diffusion is none of diffusers': it lies in ``hint/``. Weights are
copied, never computed with, so that there and back changes no bit of them.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.checkpoints import layout
from diffusion.checkpoints.parts import (
    BETA_SCHEDULES,
    built,
    check_weights,
    read_json,
    read_part,
    read_schedule,
    with_new_names,
)
from errors import InputError
from networks.dhi import siamese_hint
from networks.weight_files import read_weights

FOLDERS = ("unet", "controlnet", "hint", "vae", "text_encoder")
EXTRAS = "original.safetensors"
"""What an original checkpoint holds beside the networks, kept for the way back."""

RULE = ("beta_schedule", "beta_start", "beta_end", "train_steps")
SCHEDULE: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "train_steps": 1000,
    "prediction": "epsilon",
    "clip_sample": False,
}
"""The schedule of Stable Diffusion, for what a model does not say."""

_POSITIONS = "text_model.embeddings.position_ids"
_EXPLAINED = re.compile(
    "(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    "log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    "posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|scale_factor|"
    rf"model_ema\..*|{re.escape(layout.TEXT + _POSITIONS)})$"
)
"""Weights of an original checkpoint that belong to no network: tables of the schedule, the numbers of
positions, and averages that are kept beside the weights themselves."""


@dataclass
class Model:
    """The networks of a latent diffusion model, by their folders' names.

    Attributes:
        configs: ``config.json`` of each network; none for ``hint``.
        weights: of each network, diffusers' names.
        schedule: what is known of its schedule, by the names of a backbone's arguments.
        extras: what an original checkpoint holds beside the networks, original names.
    """

    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rule(self) -> tuple[Any, ...]:
        """Kind, first and last β, and length of its schedule; Stable Diffusion's where that is not known."""
        schedule = SCHEDULE | self.schedule
        return tuple(schedule[key] for key in RULE)

    def __str__(self) -> str:
        """Return what there is, a line each; a network that lacks a weight is none."""
        lines = [f"all {len(weights):5d} weights of {name}" for name, weights in self.weights.items()]
        if self.extras:
            shown = ", ".join(list(self.extras)[:3])
            lines.append(f"and {len(self.extras):5d} that no network uses: {shown}, …")
        return "\n".join(lines)


def _names(model: Model, folder: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the prefix of a network's original names, and the pairs of modules."""
    if folder == "text_encoder":
        return layout.TEXT, [("text_model", "text_model")]
    if folder == "hint":
        return layout.CONTROL, list(layout.dhi_names())
    config = model.configs[folder]
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    if folder == "vae":
        return layout.VAE, list(layout.vae_names(layout.Shape(levels, layers)))
    shape = layout.Shape(levels, layers, tuple("CrossAttn" in kind for kind in config["down_block_types"]))
    if folder == "unet":
        return layout.UNET, list(layout.unet_names(shape))
    hints = len(config["conditioning_embedding_out_channels"])
    hint_names = [(a, f"controlnet_cond_embedding.{b}") for a, b in layout.hint_names(hints)]
    return layout.CONTROL, [*layout.control_names(shape), *([] if "hint" in model.weights else hint_names)]


def read_original(file: str | Path, heads: int | None = None) -> Model:
    """Return the model of an original checkpoint.

    Args:
        file: as :func:`networks.weight_files.read_weights` reads it.
        heads: attention heads of the U-Net, if they are not Stable Diffusion's.

    Raises:
        InputError: the checkpoint cannot be read, lacks a weight, or holds one that nothing explains.
    """
    given = read_weights(file)
    extras = {key: value for key, value in given.items() if _EXPLAINED.match(key)}
    left = given.keys() - extras.keys()
    prefixes = {
        "unet": layout.UNET,
        "controlnet": layout.CONTROL,
        "vae": layout.VAE,
        "text_encoder": layout.TEXT,
    }
    own = {
        folder: {
            key.removeprefix(prefix): given[key] for key in given if key in left and key.startswith(prefix)
        }
        for folder, prefix in prefixes.items()
    }
    for folder, what in (("unet", "input_blocks.0.0.weight"), ("vae", "encoder.conv_in.weight")):
        if what not in own[folder]:
            raise InputError(
                f"{file}: has no {prefixes[folder]}{what}: it is no whole model of latent diffusion; its "
                f"weights are {', '.join(sorted(given)[:3])}, …"
            )
    if any(key.startswith("input_hint_block.0.") and key.count(".") > 2 for key in own["controlnet"]):
        own["hint"] = own["controlnet"]
    model = Model(extras=extras)
    try:
        _describe(model, own, heads)
    except KeyError as error:
        raise InputError(f"{file}: lacks the weight {error}, which its other weights ask for") from error
    except (IndexError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{file}: has a weight of another name or shape than latent diffusion's ({error})"
        ) from error
    for folder in [name for name in FOLDERS if own.get(name)]:
        prefix, names = _names(model, folder)
        found = layout.renamed(own[folder], names)
        model.weights[folder] = {new: _flat(new, own[folder][old]) for old, new in found.items()}
        left -= {prefix + old for old in found}
    if left:
        raise InputError(
            f"{file}: {len(left)} weights belong to nothing that is known "
            f"({', '.join(sorted(left)[:3])}, …): it is of another architecture"
        )
    if "betas" in extras:
        model.schedule = _rule(extras["betas"].double(), str(file))
    _check(model, str(file))
    return model


def _rule(betas: Tensor, where: str) -> dict[str, Any]:
    """Return the schedule that a table of β follows.

    Raises:
        InputError: there is none.
    """
    if betas.ndim == 1 and len(betas) > 1 and 0 < betas[0] <= betas[-1] < 1:
        first, last = (float(f"{value:.3g}") for value in betas[[0, -1]].tolist())
        for kind in BETA_SCHEDULES:
            if torch.allclose(
                schedule_tables(kind, first, last, len(betas))["betas"].double(), betas, rtol=2e-3
            ):
                return {
                    "beta_schedule": kind,
                    "beta_start": first,
                    "beta_end": last,
                    "train_steps": len(betas),
                }
    raise InputError(
        f"{where}: its betas {tuple(betas.shape)} follow another rule than {' and '.join(BETA_SCHEDULES)}, "
        "which models of latent diffusion have"
    )


def _describe(model: Model, own: Mapping[str, dict[str, Tensor]], heads: int | None) -> None:
    """Write the configurations, read off the shapes of original weights."""
    version = {"_diffusers_version": diffusers.__version__}
    unet = layout.unet_settings(own["unet"], layout.unet_shape(own["unet"]), heads)
    model.configs["unet"] = {"_class_name": "UNet2DConditionModel", **version, **unet}
    if own["controlnet"]:
        control = own["controlnet"]
        settings = {
            key: value
            for key, value in unet.items()
            if key not in ("sample_size", "out_channels", "up_block_types")
        }
        settings["conditioning_embedding_out_channels"] = [16, 32, 96, 256]
        if "hint" in own:
            model.weights["hint"] = {}
        else:
            blocks = sorted({int(k.split(".")[1]) for k in control if k.startswith("input_hint_block.")})
            settings["conditioning_channels"] = control["input_hint_block.0.weight"].shape[1]
            settings["conditioning_embedding_out_channels"] = [
                len(control[f"input_hint_block.{number}.weight"]) for number in blocks[:-1] if number % 4 == 0
            ]
        model.configs["controlnet"] = {"_class_name": "ControlNetModel", **version, **settings}
    vae = layout.vae_settings(own["vae"], layout.vae_shape(own["vae"]))
    if "scale_factor" in model.extras:
        scale = float(f"{model.extras['scale_factor'].item():.7g}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale_factor {scale}")
        vae["scaling_factor"] = scale
    model.configs["vae"] = {"_class_name": "AutoencoderKL", **version, **vae}
    if own["text_encoder"]:
        model.configs["text_encoder"] = layout.text_settings(own["text_encoder"])


def _flat(name: str, value: Tensor) -> Tensor:
    """Return a weight as diffusers has it: the VAE's attention is linear, originally 1 × 1 convolutions."""
    return value[:, :, 0, 0] if _is_vae_attention(name) and value.ndim == 4 else value


def _is_vae_attention(name: str) -> bool:
    return bool(re.match(r"(en|de)coder\.mid_block\.attentions\.0\.to_.*weight$", name))


def _check(model: Model, where: str) -> None:
    """Raise unless every network has exactly the weights that its configuration asks for."""
    for folder, weights in model.weights.items():
        what = f"{where}: the {folder}"
        expected = built(partial(_network, model, folder), what).state_dict()
        if folder == "text_encoder":  # transformers has named them without the prefix since version 5
            expected = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in expected.items()}
        if folder == "controlnet" and "hint" in model.weights:
            expected = {k: v for k, v in expected.items() if "controlnet_cond_embedding" not in k}
        check_weights({key: v for key, v in weights.items() if key != _POSITIONS}, expected, what)


def _network(model: Model, folder: str) -> nn.Module:
    """Return a new network of the kind and size that a folder holds."""
    if folder == "hint":
        weights = model.weights[folder]
        merges = sum(key.endswith("reduction.weight") for key in weights)
        first = weights.get("0.initial_conv.weight", torch.empty(16))
        return siamese_hint(model.configs["unet"]["block_out_channels"][0], len(first), merges)
    config = model.configs[folder]
    if folder == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    kinds = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel, "vae": AutoencoderKL}
    return kinds[folder].from_config(config)


def read_folder(folder: str | Path) -> Model:
    """Return the model of a diffusers folder.

    Args:
        folder: of a Stable Diffusion pipeline with or without a ControlNet, or its id on the hub.

    Raises:
        InputError: there is no such folder, or a network in it is missing, damaged or not whole.
    """
    path = local(folder)
    model = Model()
    for name in FOLDERS:
        part = path / name
        if not part.is_dir():
            continue
        model.weights[name] = read_part(part)
        if name != "hint":
            model.configs[name] = read_json(part / "config.json")
    for name in ("unet", "vae"):
        if name not in model.weights:
            raise InputError(f"{path}: has no {name}/; give the folder of a Stable Diffusion pipeline")
    model.schedule = read_schedule(path)
    if (path / EXTRAS).is_file():
        model.extras = read_weights(path / EXTRAS)
    vae = built(partial(_network, model, "vae"), f"{path}: the vae")
    named = with_new_names(vae, model.weights["vae"])
    model.weights["vae"] = {name: _flat(name, value) for name, value in named.items()}
    _check(model, str(path))
    return model


def local(folder: str | Path) -> Path:
    """Return a folder, or the local copy of a model on the hub.

    Raises:
        InputError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if Path(folder).is_dir():
        return Path(folder)
    if Path(folder).is_file():
        raise InputError(f"{folder}: is a file; give the folder of a model in the layout of diffusers")
    name = str(folder)
    wanted = [f"{folder}/*" for folder in (*FOLDERS, "tokenizer", "scheduler")]
    other = ["*.msgpack", "*.non_ema.*"]
    try:
        path = Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=[*other, "*.bin", "*.fp16.*"])
        )
        if any(not [*file.parent.glob("*.safetensors")] for file in path.glob("*/config.json")):
            path = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=other))
        return path
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: is neither here nor to be had from the hub ({reason})") from error


def read_model(start: str | Path, heads: int | None = None) -> Model:
    """Return the model of an original checkpoint file, a diffusers folder, or an id on the hub."""
    return read_original(start, heads) if Path(start).is_file() else read_folder(start)


def write_folder(model: Model, folder: str | Path, tokenizer: Path | None = None) -> None:
    """Write a diffusers folder, whole or not at all.

    Args:
        model: what to write.
        folder: where to; must not exist.
        tokenizer: folder of the tokenizer to put beside it; a pipeline of diffusers needs one.

    Raises:
        InputError: the folder exists, or there is no such tokenizer.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder}: exists; remove it, or give another folder")
    if tokenizer is not None and not tokenizer.is_dir():
        raise InputError(
            f"tokenizer {tokenizer}: is no folder; give that of CLIP's vocab.json and merges.txt"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, weights in model.weights.items():
            (partial / name).mkdir(parents=True)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            tensors = {key: value.contiguous() for key, value in weights.items()}
            save_file(tensors, partial / name / f"{stem}.safetensors", metadata={"format": "pt"})
            if name != "hint":
                _write_json(partial / name / "config.json", model.configs[name])
        (partial / "scheduler").mkdir()
        _write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config(model))
        if "vae" in model.weights:
            _write_json(partial / "model_index.json", _index(model, tokenizer is not None))
        if tokenizer is not None:
            shutil.copytree(tokenizer, partial / "tokenizer")
        if model.extras:
            save_file({key: value.contiguous() for key, value in model.extras.items()}, partial / EXTRAS)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def scheduler_config(model: Model) -> dict[str, Any]:
    """Return the configuration of diffusers' DDIM that takes the steps of the original code."""
    schedule, latent = SCHEDULE | model.schedule, "vae" in model.weights
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": diffusers.__version__,
        "num_train_timesteps": schedule["train_steps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": schedule["beta_schedule"],
        "clip_sample": schedule["clip_sample"],
        "set_alpha_to_one": not latent,
        "steps_offset": int(latent),
        "timestep_spacing": "leading",
        "prediction_type": {"v": "v_prediction"}.get(schedule["prediction"], schedule["prediction"]),
    }


def _index(model: Model, tokenizer: bool) -> dict[str, Any]:
    """Return ``model_index.json``, by which diffusers finds the parts of a pipeline.

    A ControlNet without a hint encoder of diffusers is no part of one: it would be used with a random one.
    """
    apart = {"text_encoder"} | ({"controlnet"} if "hint" in model.weights else set())
    pipeline = (
        "StableDiffusionControlNetPipeline" if "controlnet" in model.weights else "StableDiffusionPipeline"
    )
    parts = {
        name: ["diffusers", config["_class_name"]]
        for name, config in model.configs.items()
        if name not in apart
    }
    return {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        **parts,
        "text_encoder": ["transformers", "CLIPTextModel"]
        if "text_encoder" in model.configs
        else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"] if tokenizer else [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def original_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights of a model under original names, with the tables that the original code asks for."""
    weights = dict(model.extras) or schedule_tables(*model.rule)
    if not model.extras and "text_encoder" in model.configs:
        weights[layout.TEXT + _POSITIONS] = torch.arange(
            model.configs["text_encoder"]["max_position_embeddings"]
        )[None]
    for folder, own in model.weights.items():
        prefix, names = _names(model, folder)
        for new, old in layout.renamed(own, names, back=True).items():
            value = own[new]
            weights[prefix + old] = (
                value[..., None, None] if _is_vae_attention(new) and value.ndim == 2 else value
            )
    return weights


def schedule_tables(
    beta_schedule: str, beta_start: float, beta_end: float, train_steps: int
) -> dict[str, Tensor]:
    """Return the tables of the schedule that an original checkpoint carries, float32 ``(T,)`` each."""
    root = 0.5 if beta_schedule == "scaled_linear" else 1.0
    betas = np.linspace(beta_start**root, beta_end**root, train_steps, dtype=np.float64) ** (1 / root)
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    variance = betas * (1 - before) / (1 - bars)
    tables = {
        "betas": betas,
        "alphas_cumprod": bars,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bars),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bars),
        "log_one_minus_alphas_cumprod": np.log(1 - bars),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bars),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bars - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bars),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bars),
        "logvar": np.zeros(train_steps),
    }
    return {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}
