"""The Adversariality Miner: initial score in, shift of the initial noise out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from errors import InputError
from networks.gaussian import ShiftedGaussian
from networks.response import SIGNAL, Reader, Response

# Width of the two heads by noise channels, as the authors publish it (Supplementary Table B.1); with
# these the miner has 8,387,422 / 8,387,822 / 8,386,964 parameters at C = 4 / 3 / 1.
HEAD_WIDTH = {4: 98, 3: 100, 1: 103}


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


class ResBlock(nn.Module):
    """conv3-GN-SiLU-conv3-GN plus the skip, then SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            _group_norm(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            _group_norm(outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        return F.silu(self.body(x) + self.skip(x))


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        attended, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + attended.transpose(1, 2).reshape(x.shape)


def _head(width: int, hidden: int, channels: int) -> nn.Sequential:
    last = nn.Conv2d(hidden, channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.SiLU(), last)


class Miner(Reader):
    """M_ξ, the Res-UNet that shifts the initial noise of a frozen diffusion model.

    The last convolution of both heads starts at zero, so that an untrained miner returns exactly the
    prior N(0, I). The defaults are the authors' values.

    Args:
        channels: noise channels C (1 or 3 in pixel space, 4 in the latent space of Stable Diffusion).
        base_width: features of the first level.
        multipliers: features of each level, in units of ``base_width``.
        pooled_levels: how many of the first levels end with an average pool.
        heads: attention heads at the bottleneck.
        head_width: hidden features of the two output heads; by default the authors' value for C.
        variance_bound: ΔΣ lies in ±``variance_bound``, below 1 so that the variance stays positive; 0
            keeps the variance at 1.
        inputs: what the network reads of the probe noise: ``score`` as the paper does, ``estimate``,
            ``glance`` or ``noise``.
        num_classes: classes of the mask that is read beside it; 0 reads none, as the paper does.
        signal: ᾱ at which a glance begins; the stage that trains the network sets it to its own.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 4,
        base_width: int = 79,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        pooled_levels: int = 2,
        heads: int = 4,
        head_width: int | None = None,
        variance_bound: float = 0.95,
        inputs: Response = "score",
        num_classes: int = 0,
        signal: float = SIGNAL,
    ) -> None:
        super().__init__()
        if not 0 <= variance_bound < 1:
            raise InputError(f"variance_bound {variance_bound}: must be at least 0 and below 1")
        self.channels = channels
        self._reads(inputs, signal)
        self.num_classes = num_classes
        self.pooled_levels = pooled_levels
        self.variance_bound = variance_bound
        widths = [base_width * multiplier for multiplier in multipliers]
        self.encoder = nn.ModuleList(
            ResBlock(inputs, outputs)
            for inputs, outputs in zip([channels + num_classes, *widths[:-1]], widths, strict=True)
        )
        self.bottleneck = SelfAttention(widths[-1], heads)
        self.decoder = nn.ModuleList(
            ResBlock(widths[level + 1] + widths[level], widths[level])
            for level in reversed(range(len(widths) - 1))
        )
        self.refine = ResBlock(widths[0], widths[0])
        hidden = head_width or HEAD_WIDTH.get(channels, 100)
        self.mean_head = _head(widths[0], hidden, channels)
        self.variance_head = _head(widths[0], hidden, channels)

    def forward(self, response: Tensor, mask: Tensor | None = None) -> ShiftedGaussian:
        """Return N^r(Δμ, I + ΔΣ), with ΔΣ = bound · tanh(raw).

        Args:
            response: the initial score S, or what else ``inputs`` names, ``(B, C, H, W)``.
            mask: int64 ``(B, H', W')``; needed where ``num_classes`` is not 0.
        """
        skips = []
        hidden = response
        if self.num_classes:
            assert mask is not None
            labels = F.one_hot(mask, self.num_classes).permute(0, 3, 1, 2).to(response.dtype)
            labels = F.interpolate(labels, size=response.shape[2:], mode="nearest")
            hidden = torch.cat([response, labels], dim=1)
        for level, block in enumerate(self.encoder):
            hidden = block(hidden)
            skips.append(hidden)
            if level < self.pooled_levels:
                hidden = F.avg_pool2d(hidden, 2)
        hidden = self.bottleneck(hidden)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            hidden = F.interpolate(hidden, size=skip.shape[2:], mode="bilinear", align_corners=False)
            hidden = block(torch.cat([hidden, skip], dim=1))
        hidden = self.refine(hidden)
        # In float32 under mixed precision too: near 1 half precision cannot tell a variance from 1.
        mean, raw = self.mean_head(hidden).float(), self.variance_head(hidden).float()
        return ShiftedGaussian(mean, 1 + self.variance_bound * torch.tanh(raw))
