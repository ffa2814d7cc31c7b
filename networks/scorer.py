"""The seed scorer: first response of the backbone in, expected difficulty of the finished sample out."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from errors import InputError
from networks.response import SIGNAL, Reader, Response


def _member(inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for level, features in enumerate((width, 2 * width, 2 * width)):
        layers += [
            nn.Conv2d(inputs, features, 3, stride=1 if level == 0 else 2, padding=1),
            nn.GroupNorm(4, features),
            nn.SiLU(),
        ]
        inputs = features
    return nn.Sequential(*layers)


def _mean_inside(x: Tensor, inside: Tensor) -> Tensor:
    return (x * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1e-6)


class Scorer(Reader):
    """An ensemble of small regressors from (first response, mask) to the difficulty of the sample.

    The prediction is standardised: mean 0 and variance 1 over the plain samples it was trained on;
    ``offset`` and ``scale`` take it back to the units of the target.

    Args:
        channels: channels of the response (those of the noise).
        num_classes: classes of the masks, background included.
        inputs: which response is read: ``glance``, ``estimate``, ``score`` or ``noise``.
        width: features of the first layer, a multiple of 4.
        members: regressors whose predictions are averaged.
        signal: ᾱ at which a glance begins; the stage that trains the network sets it to its own.
    """

    offset: Tensor
    scale: Tensor

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        num_classes: int = 2,
        inputs: Response = "estimate",
        width: int = 24,
        members: int = 3,
        signal: float = SIGNAL,
    ) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise InputError(f"width {width}: must be a multiple of 4")
        if members < 1:
            raise InputError(f"members {members}: must be at least 1")
        self.channels = channels
        self.num_classes = num_classes
        self._reads(inputs, signal)
        read = channels + num_classes
        self.bodies = nn.ModuleList(_member(read, width) for _ in range(members))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(6 * width + 2 * channels, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))
            for _ in range(members)
        )
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, response: Tensor, mask: Tensor) -> Tensor:
        """Return the prediction of every member ``(members, B)``, standardised.

        Args:
            response: ``(B, channels, h, w)``, from ``Sampler.response``.
            mask: int64 ``(B, H, W)``; taken to the size of the response by nearest neighbour.
        """
        labels = F.one_hot(mask, self.num_classes).permute(0, 3, 1, 2).to(response.dtype)
        labels = F.interpolate(labels, size=response.shape[2:], mode="nearest")
        read = torch.cat([response, labels], dim=1)
        # What normalisation takes away: the response's own level, over the image and inside the objects.
        level = [response.mean((2, 3)), _mean_inside(response, 1 - labels[:, :1])]
        predictions = []
        for body, head in zip(self.bodies, self.heads, strict=True):
            features = body(read)
            inside = F.interpolate(1 - labels[:, :1], size=features.shape[2:], mode="area")
            pooled = [*level, features.mean((2, 3)), _mean_inside(features, inside), features.amax((2, 3))]
            predictions.append(head(torch.cat(pooled, dim=1)).squeeze(1))
        return torch.stack(predictions)

    def predict(self, response: Tensor, mask: Tensor) -> Tensor:
        """Return the members' mean prediction in units of the target ``(B,)``."""
        return self(response, mask).mean(0) * self.scale + self.offset
