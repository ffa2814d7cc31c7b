"""Residual-in-residual dense blocks: the encoder that SegDiff adds to its U-Net's first layer.

Wang et al., "ESRGAN", ECCV Workshops 2018, as Amit et al. use it ("SegDiff", 2021); layers bear the names of
their code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseBlock(nn.Module):
    """Five convolutions, each reading all before it; a fifth of the last is added to the input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for k in range(1, 6):
            outputs = width if k == 5 else growth
            self.add_module(f"conv{k}", nn.Conv2d(width + (k - 1) * growth, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, H, W)`` to the same shape."""
        seen = [x]
        for k in range(1, 5):
            seen.append(F.leaky_relu(self.get_submodule(f"conv{k}")(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.get_submodule("conv5")(torch.cat(seen, 1))


class RRDB(nn.Module):
    """Three dense blocks, a fifth of which is added to the input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = DenseBlock(width, growth)
        self.RDB2 = DenseBlock(width, growth)
        self.RDB3 = DenseBlock(width, growth)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, H, W)`` to the same shape."""
        return x + 0.2 * self.RDB3(self.RDB2(self.RDB1(x)))


class RRDBNet(nn.Module):
    """Features of a picture at its own size.

    Args:
        inputs: channels of the picture.
        outputs: features.
        width: features inside.
        blocks: residual-in-residual dense blocks.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(inputs, width, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(RRDB(width, max(1, width // 2)) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(width, width, 3, padding=1)
        self.HRconv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        first = self.conv_first(x)
        deep = first + self.trunk_conv(self.RRDB_trunk(first))
        return self.conv_last(F.leaky_relu(self.HRconv(deep), 0.2))
