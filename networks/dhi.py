"""Dense Hint Input: the mask encoder of Siamese-Diffusion's ControlNet.

Qiu et al., "Noise-Consistent Siamese-Diffusion for Medical Image Synthesis and Segmentation", CVPR 2025.
Layers bear the names of the authors' checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """conv3-SiLU-conv3 plus the skip, then SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        return F.silu(self.conv2(F.silu(self.conv1(x))) + x)


class PatchMerging(nn.Module):
    """Gather 2 × 2 pixels, normalise, project 4C to 2C channels (Liu et al., ICCV 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, 2C, H/2, W/2)``."""
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged = self.reduction(self.norm(torch.cat(corners, dim=1).permute(0, 2, 3, 1)))
        return merged.permute(0, 3, 1, 2)


class DenseHintInput(nn.Module):
    """Features of a hint at 2^−merges of its size.

    Args:
        channels: channels of the hint.
        width: features of the first layer; the published 16 gives 256 features at the end.
        merges: how often the size is halved; the published 3 fits the VAE of Stable Diffusion.

    Attributes:
        features: channels of what comes out, ``width · 2^(merges + 1)``.
    """

    def __init__(self, channels: int = 3, width: int = 16, merges: int = 3) -> None:
        super().__init__()
        self.merges = merges
        self.features = width * 2 ** (merges + 1)
        self.initial_conv = nn.Conv2d(channels, width, 3, padding=1)
        self.layer1 = ResidualBlock(width)
        wide = 2 * width
        for level in range(2, merges + 3):
            self.add_module(
                f"conv_before_res{level}", nn.Conv2d(width if level == 2 else wide, wide, 3, padding=1)
            )
            self.add_module(f"layer{level}", ResidualBlock(wide))
            if level < merges + 2:
                self.add_module(f"patch_merge{level - 1}", PatchMerging(wide))
                wide *= 2

    def forward(self, x: Tensor) -> Tensor:
        """Map hints ``(B, channels, H, W)`` to features ``(B, features, H/2^merges, W/2^merges)``."""
        x = self.layer1(self.initial_conv(x))
        for level in range(2, self.merges + 3):
            x = self.get_submodule(f"layer{level}")(self.get_submodule(f"conv_before_res{level}")(x))
            if level < self.merges + 2:
                x = self.get_submodule(f"patch_merge{level - 1}")(x)
        return x


def siamese_hint(outputs: int, width: int = 16, merges: int = 3) -> nn.Sequential:
    """Return the hint encoder of Siamese-Diffusion: dense features, then a convolution that starts at zero.

    Args:
        outputs: features of the U-Net's first layer.
        width: features of the first layer.
        merges: how often the size is halved.
    """
    dense = DenseHintInput(3, width, merges)
    last = nn.Conv2d(dense.features, outputs, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(dense, last)
