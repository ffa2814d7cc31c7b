"""Whether initial noise is what a diffusion model expects: a sample of N(0, I), in its typical set."""

import math
from typing import TypedDict

import torch
from torch import Tensor

from errors import InputError


class Check(TypedDict):
    """A statistic of noise beside what N(0, I) gives.

    Attributes:
        value: the statistic, one number for each channel or band.
        expected: its mean under N(0, I).
        sd: its standard deviation under N(0, I).
        z: (value − expected) / sd; beyond ±4 it is no chance.
    """

    value: list[float]
    expected: list[float]
    sd: list[float]
    z: list[float]


def typical_set(x_T: Tensor) -> dict[str, Check]:
    """Compare a set of initial noise with N(0, I), in which all entries are independent.

    Args:
        x_T: noise ``(N, C, H, W)``, of any device and float type; statistics are float64.

    Returns:
        ``norm_ratio``: mean over the samples of ‖x‖ / √d, d = C·H·W; below 1 smooth, above 1 speckled.
        ``channel_mean`` and ``channel_variance``: one number a channel, over samples and pixels.
        ``spectrum``: power of each band of frequency, white is 1 in all (:func:`power_spectrum`).
        ``kurtosis``: excess kurtosis of all entries; above 0 where some samples or places are inflated.

    Raises:
        InputError: the noise is not (N, C, H, W), has fewer than two entries a channel, or is not finite.
    """
    if x_T.ndim != 4 or x_T.numel() < 2 * x_T.shape[1] or x_T.numel() == 0:
        raise InputError(f"noise of shape {tuple(x_T.shape)}: give (N, C, H, W), not empty")
    if not bool(x_T.isfinite().all()):
        raise InputError("noise: some entries are not finite; look for a miner that diverged")
    x = x_T.detach().double()
    n, channels, height, width = x.shape
    d, per_channel = channels * height * width, n * height * width
    spectrum, count = power_spectrum(x)
    return {
        # E χ_d / √d = 1 − 1/4d + O(d⁻²), and its variance is 1/2d + O(d⁻²)
        "norm_ratio": _check(
            (x.flatten(1).norm(dim=1) / d**0.5).mean(), 1 - 1 / (4 * d), (2 * d * n) ** -0.5
        ),
        "channel_mean": _check(x.mean((0, 2, 3)), 0.0, per_channel**-0.5),
        "channel_variance": _check(x.var((0, 2, 3)), 1.0, math.sqrt(2 / (per_channel - 1))),
        # the powers of a band add up to χ² with as many degrees of freedom as it has frequencies, since
        # those at f and −f are equal and each is χ²₂ / 2
        "spectrum": _check(spectrum, 1.0, (2 / (count * n * channels)).sqrt()),
        "kurtosis": _check(excess_kurtosis(x), 0.0, math.sqrt(24 / x.numel())),
    }


def power_spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the radially averaged power spectrum of noise, and how many frequencies each band has.

    The power at a frequency is |Σ x e^(−2πi f·p)|² / HW, averaged over samples and channels; band r holds
    the frequencies that round to r cycles an image, along the shorter edge, up to the corners.

    Args:
        x: noise ``(N, C, H, W)``.

    Returns:
        Power ``(R,)``, 1 in every band for white noise of unit variance, and the counts ``(R,)``.
    """
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))
    rows, columns = torch.fft.fftfreq(height, device=x.device), torch.fft.fftfreq(width, device=x.device)
    radius = torch.hypot(rows[:, None], columns[None]) * min(height, width)
    band = radius.round().long().flatten()
    count = torch.bincount(band)
    total = torch.zeros(len(count), dtype=power.dtype, device=x.device).index_add(0, band, power.flatten())
    filled = count > 0
    return total[filled] / count[filled], count[filled]


def excess_kurtosis(x: Tensor) -> Tensor:
    """Return the excess kurtosis m₄ / m₂² − 3 of all entries, a scalar; 0 for a normal distribution."""
    square = (x - x.mean()).square()
    return square.square().mean() / square.mean().square() - 3


def _check(value: Tensor, expected: float, sd: float | Tensor) -> Check:
    value = value.reshape(-1).cpu()
    expectation = torch.full_like(value, expected)
    deviation = torch.as_tensor(sd, dtype=value.dtype).cpu().expand_as(value)
    return {
        "value": value.tolist(),
        "expected": expectation.tolist(),
        "sd": deviation.tolist(),
        "z": ((value - expectation) / deviation).tolist(),
    }
