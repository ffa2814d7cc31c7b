"""Holistically-nested edge detection: where a network that was taught by people sees edges.

Xie & Tu, ICCV 2015. Layers bear the names of ``network-bsds500.pth``, which ControlNet's annotators and
DiffBoost use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {"One": (64, 2), "Two": (128, 2), "Thr": (256, 3), "Fou": (512, 3), "Fiv": (512, 3)}
"""Features and convolutions of the five blocks of VGG-16."""

MEAN = (104.00698793, 116.66876762, 122.67891434)
"""Of blue, green and red, in 8-bit levels."""


class HED(nn.Module):
    """VGG-16 with an edge map from each of its blocks, and their mixture; 14.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for name, (features, count) in BLOCKS.items():
            layers: list[nn.Module] = [] if name == "One" else [nn.MaxPool2d(2, 2)]
            for _ in range(count):
                layers += [nn.Conv2d(inputs, features, 3, padding=1), nn.ReLU()]
                inputs = features
            self.add_module(f"moduleVgg{name}", nn.Sequential(*layers))
            self.add_module(f"moduleScore{name}", nn.Conv2d(features, 1, 1))
        self.moduleCombine = nn.Sequential(nn.Conv2d(len(BLOCKS), 1, 1), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        """Return edges in [0, 1], ``(B, 1, H, W)``, of images in [−1, 1], ``(B, 1 or 3, H, W)``."""
        levels = (image.expand(-1, 3, -1, -1).flip(1) + 1) * 127.5
        hidden = levels - levels.new_tensor(MEAN).view(1, 3, 1, 1)
        maps = []
        for name in BLOCKS:
            hidden = self.get_submodule(f"moduleVgg{name}")(hidden)
            score = self.get_submodule(f"moduleScore{name}")(hidden)
            maps.append(F.interpolate(score, size=image.shape[2:], mode="bilinear", align_corners=False))
        return self.moduleCombine(torch.cat(maps, dim=1))
