"""Noise schedules, explicit timestep lists and the deterministic DDIM step."""

from typing import Literal

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from errors import InputError

Spacing = Literal["leading", "trailing", "linspace"]


def alphas_cumprod(beta_schedule: str, beta_start: float, beta_end: float, train_steps: int) -> Tensor:
    """Return ᾱ_t for t = 0 … T−1, float32 ``(T,)``.

    Args:
        beta_schedule: ``linear`` or ``scaled_linear`` as diffusers names them (the "linear" of the
            latent-diffusion code base *is* ``scaled_linear``).
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        train_steps: T.
    """
    return DDPMScheduler(train_steps, beta_start, beta_end, beta_schedule).alphas_cumprod


def check_terminal(alphas_cumprod: Tensor, where: str) -> None:
    """Raise where a schedule leaves no signal at its end: neither x̂_0 nor √(1/ᾱ_T) is defined there.

    Args:
        alphas_cumprod: ᾱ_t ``(T,)``.
        where: what made the schedule.

    Raises:
        InputError: ᾱ_T is 0.
    """
    if not float(alphas_cumprod[-1]) > 1e-8:
        raise InputError(
            f"{where}: the schedule ends at zero signal-to-noise ratio (ᾱ_T = 0), where neither x̂_0 nor the "
            "rollout's gradient √(1/ᾱ_T) is defined; use one that is not rescaled to zero terminal SNR, such "
            "as β up to 0.02 in 1000 timesteps"
        )


def ddim_timesteps(
    steps: int, train_steps: int = 1000, spacing: Spacing = "leading", offset: int = 0
) -> list[tuple[int, int]]:
    """Return the (t, t_prev) pairs of a DDIM schedule, noisiest first; the last t_prev is −1.

    t_prev is simply the next t of the list. Truncation means slicing this list: the first 10 pairs of
    a 50-step schedule are another thing than a 10-step schedule.

    Args:
        steps: number of DDIM steps, at most ``train_steps``.
        train_steps: T of the trained schedule.
        spacing: as in Table 2 of Lin et al., "Common Diffusion Noise Schedules and Sample Steps are
            Flawed", WACV 2024.
        offset: added to every t under ``leading``.

    Raises:
        InputError: ``steps`` is not in 1 … ``train_steps``, a timestep falls outside the schedule, or
            ``leading``, which rounds T / steps down, would leave out more than the noisiest tenth of it.
    """
    if not 1 <= steps <= train_steps:
        raise InputError(f"{steps} DDIM steps of a schedule with {train_steps}: choose 1 to {train_steps}")
    if spacing == "leading":
        covered = train_steps // steps * steps
        if covered < 0.9 * train_steps:
            raise InputError(
                f"{steps} DDIM steps with leading spacing would leave out the noisiest "
                f"{train_steps - covered} of {train_steps} timesteps; choose a divisor of {train_steps}"
            )
        times = [i * (train_steps // steps) + offset for i in reversed(range(steps))]
    elif spacing == "trailing":
        times = [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]
    else:
        times = torch.linspace(train_steps - 1, 0, steps).round().int().tolist()
    if times[0] >= train_steps:
        raise InputError(
            f"{steps} DDIM steps with offset {offset} would begin at t = {times[0]}, beyond "
            f"{train_steps - 1}; choose fewer"
        )
    return list(zip(times, [*times[1:], -1], strict=True))


def predict_x0(x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x̂_0 = (x_t − √(1 − ᾱ_t) ε) / √ᾱ_t."""
    return (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()


def add_noise(x_0: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε."""
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * epsilon


def min_snr_mse(
    output: Tensor, target: Tensor, alpha_bar: Tensor, gamma: float | None, v: bool = False
) -> Tensor:
    """Return the mean squared error, each sample weighted by min(SNR, γ) / SNR.

    ᾱ / (1 − ᾱ) is the signal-to-noise ratio SNR. Without the weight nearly clean images, which teach least,
    count most (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023).

    Args:
        output: what the network predicts, ``(B, C, H, W)``.
        target: what it should.
        alpha_bar: ᾱ_t ``(B, 1, 1, 1)``.
        gamma: γ; None leaves all weights at 1.
        v: whether v is predicted and not ε; the weight then is min(SNR, γ) / (SNR + 1).
    """
    error = (output - target).square()
    if gamma is None:
        return error.mean()
    snr = alpha_bar / (1 - alpha_bar)
    return (error * snr.clamp(max=gamma) / (snr + v)).mean()
