"""nnU-Net's normalisation of images, channel by channel."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, stack

from errors import InputError

Channel = Mapping[str, Any]
"""How a channel is normalised: ``scheme``, and for ``ct`` the grey values of the foreground."""

CT_KEYS = ("mean", "std", "lower", "upper")
_SMALLEST = 1e-8
_NAMES = {"ct": "ct", "zscore": "zscore"}
_OTHERS = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")


def scheme_of(name: str) -> str:
    """Return the scheme of a channel by nnU-Net's rule: ``ct`` for CT, ``zscore`` for all that has no other.

    Raises:
        InputError: the name stands for a scheme of nnU-Net that there is not here.
    """
    if name.casefold() in _OTHERS:
        raise InputError(f"channel {name}: of nnU-Net's schemes there are ct and zscore; name it otherwise")
    return _NAMES.get(name.casefold(), "zscore")


def check_channels(channels: Sequence[Channel], count: int, argument: str) -> None:
    """Raise unless ``channels`` says how each of ``count`` channels is normalised.

    Raises:
        InputError: a channel is missing or too many, or its scheme or one of its numbers is.
    """
    if len(channels) != count:
        raise InputError(f"{argument}: tells of {len(channels)} channels, the images have {count}")
    for number, channel in enumerate(channels):
        scheme = channel.get("scheme")
        if scheme not in _NAMES:
            raise InputError(f"{argument}: channel {number} has the scheme {scheme}; there are ct and zscore")
        missing = [key for key in CT_KEYS if channel.get(key) is None]
        if scheme == "ct" and missing:
            raise InputError(
                f"{argument}: channel {number} is ct and lacks {', '.join(missing)}; "
                "`python -m datamodules.plan` measures them"
            )


def normalise(image: Tensor, channels: Sequence[Channel]) -> Tensor:
    """Return normalised images, differentiably.

    ``zscore`` subtracts the mean of the channel and divides by its standard deviation; ``ct`` clips to the
    0.5 and 99.5 percentiles of the foreground of the training set (``lower``, ``upper``), then subtracts its
    ``mean`` and divides by its ``std``. Source: Isensee et al., Nature Methods 2021.

    Args:
        image: ``(B, C, H, W)`` or ``(C, H, W)``.
        channels: one entry a channel.
    """
    return stack(
        [_channel(image.select(-3, k), channel) for k, channel in enumerate(channels)],
        dim=-3,
    )


def _channel(image: Tensor, channel: Channel) -> Tensor:
    if channel["scheme"] == "ct":
        clipped = image.clamp(channel["lower"], channel["upper"])
        return (clipped - channel["mean"]) / max(channel["std"], _SMALLEST)
    mean = image.mean(dim=(-2, -1), keepdim=True)
    std = image.std(dim=(-2, -1), keepdim=True, correction=0)
    return (image - mean) / std.clamp(min=_SMALLEST)
