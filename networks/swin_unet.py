"""Swin-Unet on timm's Swin Transformer blocks.

Cao et al., "Swin-Unet: Unet-like Pure Transformer for Medical Image Segmentation", ECCV Workshops 2022.
"""

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from diffusers.configuration_utils import register_to_config
from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformer, SwinTransformerStage, checkpoint_filter_fn
from torch import Tensor, nn

from errors import InputError
from networks.segmenter import Segmenter
from networks.weight_files import read_weights

HUB = "swin_tiny_patch4_window7_224.ms_in1k"
"""timm's name of the weights that the authors start from: ImageNet-1k."""


class PatchExpand(nn.Module):
    """A linear layer whose features become pixels of an image ``scale`` times as large; then LayerNorm."""

    def __init__(self, inputs: int, outputs: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(inputs, outputs * scale**2, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, inputs)`` to ``(B, scale·H, scale·W, outputs)``."""
        batch, height, width, _ = x.shape
        s = self.scale
        x = self.expand(x).reshape(batch, height, width, s, s, -1)
        return self.norm(x.transpose(2, 3).reshape(batch, s * height, s * width, -1))


class SwinUnet(Segmenter):
    """Swin encoder, its mirror image as decoder, and skips between them.

    A skip is what enters the blocks of a level. It is concatenated to the expanded features of the level
    below and projected; the decoder's blocks have the depths and heads of the encoder's. The defaults are the
    authors' values: 27.17 million parameters for nine classes.

    Args:
        in_channels: image channels; grey images are repeated.
        num_classes: classes, background included.
        size: edge of the images in pixels.
        patch_size: pixels a token's edge.
        embed_dim: features of the first level; they double with each level.
        depths: blocks of each level.
        num_heads: attention heads of each level.
        window_size: tokens a window's edge.
        drop_path: stochastic depth of the last block; it grows from 0.
        pretrained: where the encoder's weights come from, which each level of the decoder starts with too: a
            file of the Swin authors or of timm, or ``hub``, timm's weights of ImageNet; None starts anew. Of
            levels with more blocks than here the first are taken.

    Raises:
        InputError: the size is none that the levels can divide, or ``pretrained`` cannot be used.
    """

    ignore_for_config = ["pretrained"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        size: int = 224,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path: float = 0.2,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        levels = len(depths)
        if size % (patch_size * 2 ** (levels - 1)):
            raise InputError(
                f"size {size}: must be a multiple of {patch_size * 2 ** (levels - 1)} for patches of "
                f"{patch_size} pixels and {levels} levels"
            )
        self.image_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = self.image_size = (size, size)
        self.encoder = SwinTransformer(
            img_size=size,
            patch_size=patch_size,
            in_chans=3,
            num_classes=0,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            drop_path_rate=drop_path,
        )
        rates = [drop_path * k / max(sum(depths) - 1, 1) for k in range(sum(depths))]
        self.expand = nn.ModuleList()
        self.merge = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for level in reversed(range(levels - 1)):
            width = embed_dim * 2**level
            edge = size // patch_size // 2**level
            self.expand.append(PatchExpand(2 * width, width, 2))
            self.merge.append(nn.Linear(2 * width, width))
            self.decoder.append(
                SwinTransformerStage(
                    width,
                    width,
                    (edge, edge),
                    depths[level],
                    downsample=False,
                    num_heads=num_heads[level],
                    window_size=window_size,
                    drop_path=rates[sum(depths[:level]) : sum(depths[: level + 1])],
                )
            )
        self.norm = nn.LayerNorm(embed_dim)
        self.last = PatchExpand(embed_dim, embed_dim, patch_size)
        self.head = nn.Conv2d(embed_dim, num_classes, 1, bias=False)
        for part in (self.expand, self.merge, self.decoder, self.last):
            part.apply(_initialise)
        if pretrained is not None:
            self._take(pretrained)

    def _take(self, pretrained: str) -> None:
        """Load weights of ImageNet into the encoder, and those of each of its levels into the decoder."""
        try:
            given = _fetched() if pretrained == "hub" else read_weights(pretrained)
            weights = checkpoint_filter_fn(self._of_own_blocks(given), self.encoder)
        except (RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"pretrained {pretrained}: cannot be used ({reason}); give a file of Swin-T's weights, or hub"
            ) from error
        own = self.encoder.state_dict()
        fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
        missing = [k for k in own if k not in fitting and "relative_position_index" not in k]
        if missing:
            raise InputError(
                f"pretrained {pretrained}: {len(missing)} of the encoder's weights are missing or of another "
                f"shape ({', '.join(missing[:2])}, …); give those of a Swin of the same size"
            )
        self.encoder.load_state_dict(own | fitting)
        for stage, level in zip(self.decoder, reversed(range(len(self.decoder))), strict=True):
            stage.blocks.load_state_dict(self.encoder.layers[level].blocks.state_dict())  # type: ignore[union-attr]

    def _of_own_blocks(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out blocks that the levels do not have: Swin-T's third has six, the authors take two."""
        stages: list[Any] = list(self.encoder.layers)
        depths = [len(stage.blocks) for stage in stages]
        kept = {}
        for name, value in weights.items():
            block = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name)
            level = int(block[1]) if block else 0
            if not block or level >= len(depths) or int(block[2]) < depths[level]:
                kept[name] = value
        return kept

    def normalise(self, image: Tensor) -> Tensor:
        """Return images of three channels in [0, 1]."""
        return (image.expand(-1, 3, -1, -1) + 1) / 2

    def _encode(self, normalised: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normalised deepest features ``(B, h, w, D)``, and what enters each level's blocks."""
        if wrong := self.misfit(normalised.shape[-2:]):
            raise ValueError(wrong)
        x = self.encoder.patch_embed(normalised)
        skips = []
        stages: list[Any] = list(self.encoder.layers)
        for stage in stages:
            x = stage.downsample(x)
            skips.append(x)
            x = stage.blocks(x)
        return self.encoder.norm(x), skips

    def segment(self, normalised: Tensor) -> Tensor:
        """Return logits ``(B, K, H, W)``.

        Raises:
            ValueError: an image is of another size.
        """
        x, skips = self._encode(normalised)
        skips.pop()
        for expand, merge, stage in zip(self.expand, self.merge, self.decoder, strict=True):
            x = stage(merge(torch.cat([expand(x), skips.pop()], dim=-1)))
        return self.head(self.last(self.norm(x)).permute(0, 3, 1, 2))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of images in [−1, 1]; the network sees them in [0, 1]."""
        return self.segment(self.normalise(image))

    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
        return self._encode(self.normalise(image))[0].permute(0, 3, 1, 2)


def _fetched() -> dict[str, Tensor]:
    """Return timm's weights of ImageNet, from its hub or the cache of it."""
    try:
        return timm.create_model(HUB, pretrained=True).state_dict()
    except Exception as error:  # those of whatever library carries the request
        raise InputError(
            f"pretrained hub: timm/{HUB} cannot be fetched ({type(error).__name__}); check the network, or "
            "fetch its model.safetensors elsewhere and give that file"
        ) from error


def _initialise(module: nn.Module) -> None:
    """Set the weights of a linear layer as the authors do."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
