"""Names of weights: the latent-diffusion code base beside diffusers, in pairs that are read either way.

Every generator yields pairs of (original, diffusers) modules; what stands below a module is named alike on
both sides. The original names are those of ControlNet's repository (``cldm``), which FairDiff, DiffBoost and
Siamese-Diffusion share. How many levels and layers there are is read off the weights themselves.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

UNET, CONTROL, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer."
"""Where each network stands in an original checkpoint."""

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_VAE_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)


@dataclass(frozen=True)
class Shape:
    """How deep a network is.

    Attributes:
        levels: levels of different size.
        layers: residual blocks a level, in the encoder.
        attention: of each level, whether it has attention blocks.
    """

    levels: int
    layers: int
    attention: tuple[bool, ...] = ()


def _below(original: str, diffusers: str, inner: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for a, b in inner:
        yield f"{original}.{a}", f"{diffusers}.{b}"


def encoder_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """Yield the names of time embedding, first convolution, encoder and middle: U-Net and ControlNet."""
    yield from _below("time_embed", "time_embedding", (("0", "linear_1"), ("2", "linear_2")))
    yield "input_blocks.0.0", "conv_in"
    number = 0
    for level in range(shape.levels):
        for layer in range(shape.layers):
            number += 1
            down = f"down_blocks.{level}"
            yield from _below(f"input_blocks.{number}.0", f"{down}.resnets.{layer}", _RESNET)
            if shape.attention[level]:
                yield f"input_blocks.{number}.1", f"{down}.attentions.{layer}"
        if level < shape.levels - 1:
            number += 1
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    yield from _below("middle_block.0", "mid_block.resnets.0", _RESNET)
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _below("middle_block.2", "mid_block.resnets.1", _RESNET)


def unet_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """Yield the names of a U-Net's modules."""
    yield from encoder_names(shape)
    number = 0
    for block, level in enumerate(reversed(range(shape.levels))):
        for layer in range(shape.layers + 1):
            up, at = f"up_blocks.{block}", f"output_blocks.{number}"
            yield from _below(f"{at}.0", f"{up}.resnets.{layer}", _RESNET)
            if shape.attention[level]:
                yield f"{at}.1", f"{up}.attentions.{layer}"
            if level and layer == shape.layers:
                yield f"{at}.{1 + shape.attention[level]}.conv", f"{up}.upsamplers.0.conv"
            number += 1
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def control_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """Yield the names of a ControlNet's modules, without its hint encoder."""
    yield from encoder_names(shape)
    for number in range(shape.levels * (shape.layers + 1)):
        yield f"zero_convs.{number}.0", f"controlnet_down_blocks.{number}"
    yield "middle_block_out.0", "controlnet_mid_block"


def hint_names(levels: int) -> Iterator[tuple[str, str]]:
    """Yield the names of a ControlNet's own hint encoder with that many levels; a SiLU stands between."""
    block, count = "input_hint_block", 2 * (levels - 1)
    yield f"{block}.0", "conv_in"
    for number in range(count):
        yield f"{block}.{2 * number + 2}", f"blocks.{number}"
    yield f"{block}.{2 * count + 2}", "conv_out"


def dhi_names() -> Iterator[tuple[str, str]]:
    """Yield the names of Siamese-Diffusion's hint encoder: they differ in the prefix alone."""
    yield "input_hint_block.0", "0"
    yield "input_hint_block.1", "1"


def vae_names(shape: Shape) -> Iterator[tuple[str, str]]:
    """Yield the names of a VAE's modules."""
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield from _below(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _VAE_RESNET)
        yield from _below(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
        yield from _below(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _VAE_RESNET)
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
    for level in range(shape.levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{shape.levels - 1 - level}"
        for layer in range(shape.layers):
            yield from _below(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _VAE_RESNET)
        for layer in range(shape.layers + 1):
            yield from _below(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", _VAE_RESNET)
        yield f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"
        yield f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"


def renamed(keys: Iterable[str], names: Iterable[tuple[str, str]], back: bool = False) -> dict[str, str]:
    """Return the new name of each key that the pairs explain.

    Args:
        keys: names of weights.
        names: pairs of (original, diffusers) modules.
        back: from diffusers' names to the original ones.
    """
    table = {b: a for a, b in names} if back else dict(names)
    found = {}
    for key in keys:
        parts = key.split(".")
        for length in range(len(parts) - 1, 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in table:
                found[key] = ".".join([table[prefix], *parts[length:]])
                break
    return found


def unet_shape(weights: Mapping[str, Any]) -> Shape:
    """Return how deep the U-Net or ControlNet of original names is."""
    numbers = sorted({int(key.split(".")[1]) for key in weights if key.startswith("input_blocks.")})
    downs = [n for n in numbers if f"input_blocks.{n}.0.op.weight" in weights]
    layers = (downs[0] if downs else len(numbers)) - 1
    levels = len(downs) + 1
    attention = tuple(
        f"input_blocks.{1 + level * (layers + 1)}.1.norm.weight" in weights for level in range(levels)
    )
    return Shape(levels, layers, attention)


def unet_settings(weights: Mapping[str, Tensor], shape: Shape, heads: int | None) -> dict[str, Any]:
    """Return the arguments of ``UNet2DConditionModel`` for original weights.

    Args:
        weights: of the U-Net, original names.
        shape: how deep it is.
        heads: attention heads, which the weights do not show; None is Stable Diffusion's: 8 for prompt
            embeddings of 768 features, one for each 64 features otherwise.
    """
    first = [1 + level * (shape.layers + 1) for level in range(shape.levels)]
    widths = [len(weights[f"input_blocks.{n}.0.in_layers.2.weight"]) for n in first]
    block = "middle_block.1.transformer_blocks"
    depth = len({key.split(".")[3] for key in weights if key.startswith(f"{block}.")})
    context = weights[f"{block}.0.attn2.to_k.weight"].shape[1]
    downs = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in shape.attention]
    ups = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(shape.attention)]
    return {
        "sample_size": 64,
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(weights["out.2.weight"]),
        "block_out_channels": widths,
        "layers_per_block": shape.layers,
        "down_block_types": downs,
        "up_block_types": ups,
        "transformer_layers_per_block": depth,
        "cross_attention_dim": context,
        "attention_head_dim": heads or (8 if context == 768 else [max(1, width // 64) for width in widths]),
        "use_linear_projection": weights["middle_block.1.proj_in.weight"].ndim == 2,
    }


def vae_shape(weights: Mapping[str, Any]) -> Shape:
    """Return how deep the VAE of original names is."""
    levels = {key.split(".")[2] for key in weights if key.startswith("encoder.down.")}
    layers = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    return Shape(len(levels), len(layers))


def vae_settings(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
    """Return the arguments of ``AutoencoderKL`` for original weights."""
    widths = [len(weights[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(shape.levels)]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "latent_channels": weights["post_quant_conv.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": shape.layers,
        "down_block_types": ["DownEncoderBlock2D"] * shape.levels,
        "up_block_types": ["UpDecoderBlock2D"] * shape.levels,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def text_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``config.json`` of CLIP's text encoder for its weights, 64 features a head."""
    tokens = weights["text_model.embeddings.token_embedding.weight"]
    layers = {key.split(".")[3] for key in weights if key.startswith("text_model.encoder.layers.")}
    last = len(tokens) - 1
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "hidden_size": tokens.shape[1],
        "projection_dim": tokens.shape[1],
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_attention_heads": max(1, tokens.shape[1] // 64),
        "num_hidden_layers": len(layers),
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "vocab_size": len(tokens),
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "pad_token_id": last,
    }
