"""Deterministic DDIM through a backbone: the initial score, full sampling, truncated rollouts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion.backbones.backbone import Backbone
from diffusion.schedule import add_noise, check_terminal, ddim_timesteps, predict_x0
from networks.response import SIGNAL, Reader

GradientMode = Literal["stop", "full"]


class Sampler:
    """DDIM with η = 0 (Song et al., ICLR 2021, equation 12), in float32.

    Args:
        backbone: the diffusion model.
        steps: steps of the full schedule.
        signal: ᾱ at which a glance reads the noise, in (0, 1).

    Attributes:
        pairs: (t, t_prev) of every step, noisiest first.
        calls: forward passes of the backbone so far, counted by sample; guidance needs two a step.

    Raises:
        InputError: the schedule has a zero terminal signal-to-noise ratio: √(1/ᾱ_T) would be infinite.
    """

    def __init__(self, backbone: Backbone, steps: int = 50, signal: float = SIGNAL) -> None:
        self.backbone = backbone
        self.signal = signal
        self.calls = 0
        self.pairs = ddim_timesteps(
            steps, len(backbone.alphas_cumprod), backbone.spacing, backbone.steps_offset
        )
        check_terminal(backbone.alphas_cumprod, type(backbone).__name__)

    @property
    def terminal_alpha(self) -> float:
        """ᾱ at the first timestep of the schedule."""
        return float(self.backbone.alphas_cumprod[self.pairs[0][0]])

    def epsilon(self, x_t: Tensor, t: int | Tensor, condition: Any) -> Tensor:
        """Return ε_φ(x_t, t | y), float32; t is one for the whole batch, or int64 ``(B,)``."""
        self.calls += len(x_t) * self.backbone.passes
        times = (
            t if isinstance(t, Tensor) else torch.full((len(x_t),), t, device=x_t.device, dtype=torch.long)
        )
        return self.backbone.epsilon(x_t, times, condition).float()

    def run(
        self,
        x: Tensor,
        condition: Any,
        pairs: list[tuple[int, int]],
        epsilon: Callable[[Tensor, int, Any], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Walk along a part of the schedule.

        Args:
            x: latents at the first t of ``pairs``.
            condition: of the masks.
            pairs: (t, t_prev), a slice of ``self.pairs``.
            epsilon: takes the place of :meth:`epsilon`; same arguments.

        Returns:
            x at the last t_prev, and x̂_0 of the last call before any clipping.
        """
        x_0 = x
        for t, t_prev in pairs:
            eps = (epsilon or self.epsilon)(x, t, condition)
            x_0 = predict_x0(x, eps, self.backbone.alpha_bar(t))
            x = add_noise(self.clip(x_0), eps, self.backbone.alpha_bar(t_prev))
        return x, x_0

    def clip(self, x_0: Tensor) -> Tensor:
        """Return x̂_0 as a step of the sampler takes it: in [−1, 1] if the backbone's sampler clips."""
        return x_0.clamp(-1, 1) if self.backbone.clip_sample else x_0

    def initial_score(self, x_T: Tensor, condition: Any) -> Tensor:
        """Return S = −ε_φ(x_T, T | y) / √(1 − ᾱ_T), like ``x_T``, at the schedule's first timestep.

        Where a gradient is asked for, the backbone is called again in the backward pass.
        """
        eps = checkpoint(self.epsilon, x_T, self.pairs[0][0], condition, use_reentrant=False)
        return -eps / (1 - self.terminal_alpha) ** 0.5

    def response(self, x_T: Tensor, condition: Any, reader: Reader) -> Tensor:
        """Return what a network reads of initial noise, like ``x_T`` and differentiable in it."""
        if reader.inputs == "noise":
            return x_T
        if reader.inputs == "score":
            return self.initial_score(x_T, condition)
        if reader.inputs == "glance":
            return self.glance(x_T, condition, 1, "full", reader.signal).clamp(-3, 3)
        return self.rollout(x_T, condition, 1, "full").clamp(-3, 3)

    @torch.no_grad()
    def sample(self, x_T: Tensor, condition: Any) -> Tensor:
        """Return images in [−1, 1] from initial noise ``(B, *noise_shape)``, by the whole schedule."""
        return self.finish(x_T, condition, self.pairs)

    @torch.no_grad()
    def finish(self, x_t: Tensor, condition: Any, pairs: list[tuple[int, int]]) -> Tensor:
        """Return images in [−1, 1] from latents at the first t of ``pairs``, the schedule's last part."""
        latent, _ = self.run(x_t, condition, pairs)
        return self.backbone.decode(latent).clamp(-1, 1)

    def rollout(self, x_T: Tensor, condition: Any, truncate: int, gradient: GradientMode = "stop") -> Tensor:
        """Return x̂_0, a latent, at the ``truncate``-th call of the schedule, differentiable in ``x_T``.

        ``stop`` is the paper's temporal stop-gradient, ∂ε_φ/∂x_t ≡ 0. Every step is then linear in x, so
        that ∂x̂_0/∂x_T = √(1/ᾱ_T) for any truncation: the rollout runs without a graph and the constant
        is attached to its result. ``full`` differentiates through the backbone, which is called again in
        the backward pass so that memory does not grow with the number of calls.
        Inside the rollout x̂_0 is clipped where the backbone's sampler clips; ``stop`` takes no notice of
        it, and the x̂_0 that is returned is not clipped.

        Raises:
            ValueError: ``truncate`` is not in 1 … number of steps.
        """
        if not 1 <= truncate <= len(self.pairs):
            raise ValueError(f"rollout of {truncate} steps: the schedule has {len(self.pairs)}")
        return self._estimate(x_T, condition, self.pairs[:truncate], gradient)

    def glance(
        self,
        x_T: Tensor,
        condition: Any,
        calls: int = 2,
        gradient: GradientMode = "stop",
        signal: float | None = None,
    ) -> Tensor:
        """Return x̂_0, a latent, of a sampler that takes x_T for x_t further down the schedule.

        Where ᾱ is small, DDIM moves x hardly at all: what will be seen is in the noise already, but an
        estimate x̂_0 there is blurred by the division by √ᾱ. Read at the t where ᾱ_t has reached
        ``signal``, the same noise shows in one call what becomes of it, and in two calls nearly how it
        ends. The further calls are spread evenly over what is left of the schedule.

        Args:
            x_T: initial noise.
            condition: of the masks.
            calls: calls of the backbone.
            gradient: as in :meth:`rollout`; under ``stop`` the constant is √(1/ᾱ_t).
            signal: ᾱ of the first call, in (0, 1); None is the sampler's.

        Raises:
            ValueError: there are no calls, or more than timesteps left.
        """
        signal = self.signal if signal is None else signal
        start = int((self.backbone.alphas_cumprod >= signal).sum()) - 1
        if not 1 <= calls <= start:
            raise ValueError(
                f"glance of {calls} calls: choose 1 to {start}, the timesteps with ᾱ ≥ {signal:g}"
            )
        times = [start * (calls - i) // calls for i in range(calls)]
        return self._estimate(x_T, condition, list(zip(times, [*times[1:], -1], strict=True)), gradient)

    def _estimate(
        self, x: Tensor, condition: Any, pairs: list[tuple[int, int]], gradient: GradientMode
    ) -> Tensor:
        """Return x̂_0 of the last call along a part of the schedule, differentiable in ``x``."""
        if gradient == "full":
            return self.run(x, condition, pairs, self._checkpointed)[1]
        with torch.no_grad():
            _, x_0 = self.run(x, condition, pairs)
        return x_0 + (x - x.detach()) / self.backbone.alpha_bar(pairs[0][0]) ** 0.5

    def _checkpointed(self, x_t: Tensor, t: int, condition: Any) -> Tensor:
        return checkpoint(self.epsilon, x_t, t, condition, use_reentrant=False)
