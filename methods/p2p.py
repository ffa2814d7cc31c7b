"""Prompt2Perturb: optimise the condition instead of the image."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from diffusion.schedule import add_noise
from errors import InputError, require
from methods.guided import base_latent, estimated_image
from methods.method import OWN, PROBE, Method, Request, gradient_of
from objectives.rewards import REWARDS, require_reward


class P2P(Method):
    """Medghalchi et al., "Prompt2Perturb (P2P): Text-Guided Diffusion-Based … Attacks …", CVPR 2025.

    The authors optimise the embedding of a prompt so that a classifier errs on an image; here it is
    whatever the backbone is conditioned on that is of floating point and has an entry for each sample: the
    mask channels of SegDiff, embeddings elsewhere. How the paper is read:

    1. The image that is attacked is the base sample x, from the noise of plain sampling.
    2. Each iteration draws ε ~ N(0, I) and t uniformly from the ``max_t`` smallest training timesteps,
       noises x to t and takes the one-step x̂_0 under the current condition. AdamW raises ℓ(f_ϑ(x̂_0), y);
       then the condition is put back into the ∞-norm ball of radius ε around its start.
    3. A classifier errs or does not; a segmenter errs here when x̂_0 reaches a soft Dice loss of
       ``success``: half of the object is lost.
    4. Of the iterations that succeeded the condition with the lowest t is kept, and at equal t the one
       with the lowest mean squared error of x̂_0's pixels from x. From a sample's first success on
       ``mse_weight`` times that error is taken off its objective. Without any success the last condition
       counts.
    5. The authors keep the x̂_0 itself; here the kept condition gives the sample, by plain DDIM from the
       noise of plain sampling, so that the method makes new images as its rivals do.

    Mind the units: ε is absolute. SegDiff's ``index`` encoding has classes 1/255 apart, so that ε = 0.05
    spans a dozen of them, while 500 steps of 1e-5 go no further than 0.005 whatever ε is.

    Args:
        epsilon: ε, radius of the ball.
        lr: AdamW's learning rate.
        iterations: AdamW steps; 0 is plain sampling.
        max_t: t is less than this, in timesteps of training.
        success: soft Dice loss, in [0, 1], from which on the segmenter errs.
        mse_weight: weight of the pixel error after the first success; pixels are in [−1, 1].
        reward: ℓ, of each sample by itself.

    Raises:
        InputError: an argument is out of its range, the backbone's condition has nothing to optimise, or
            gradients are switched off (inference mode).
    """

    name = "p2p"

    def __init__(
        self,
        epsilon: float = 0.05,
        lr: float = 1e-5,
        iterations: int = 500,
        max_t: int = 50,
        success: float = 0.5,
        mse_weight: float = 1.0,
        reward: str = "ce",
    ) -> None:
        super().__init__()
        require(0 <= epsilon < math.inf, "epsilon", epsilon, "must be a number of at least 0")
        require(0 < lr < math.inf, "lr", lr, "must be a positive number")
        require(0 <= iterations < OWN, "iterations", iterations, f"choose 0 to {OWN - 1}")
        require(1 <= max_t <= 1000, "max_t", max_t, "choose 1 to 1000 timesteps")
        require(0 <= success <= 1, "success", success, "choose 0 to 1, a soft Dice loss")
        require(0 <= mse_weight < math.inf, "mse_weight", mse_weight, "must be a number of at least 0")
        require_reward(reward)
        self.epsilon = epsilon
        self.lr = lr
        self.iterations = iterations
        self.max_t = max_t
        self.success = success
        self.mse_weight = mse_weight
        self.reward = reward

    @torch.no_grad()
    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`.

        Notes ``perturbation``, the largest change of the condition, and ``success_t``, the t of the
        success that was kept, −1 without any.
        """
        condition, own = request.condition, _own(request)
        if not any(own):
            raise InputError(
                f"p2p: {type(request.sampler.backbone).__name__} is conditioned on nothing of floating point "
                "that each sample has its own of, so there is nothing to optimise; choose another method"
            )
        start = pack(condition, own)
        chosen, t = self._optimise(request, start, own)
        image = request.sampler.sample(request.noise.draw(PROBE), unpack(chosen, condition, own))
        return image, {"perturbation": (chosen - start).abs().amax(1), "success_t": t}

    def _optimise(self, request: Request, start: Tensor, own: list[bool]) -> tuple[Tensor, Tensor]:
        """Return the kept conditions, packed, and the t of their success, −1 without any."""
        backbone = request.sampler.backbone
        max_t = min(self.max_t, len(backbone.alphas_cumprod))
        current, kept = start.clone(), start.clone()
        kept_t = torch.full((len(start),), max_t, device=start.device)
        kept_mse = torch.full((len(start),), math.inf, device=start.device)
        if not self.iterations:
            return start, torch.full_like(kept_t, -1)
        latent = base_latent(request)
        base = backbone.decode(latent).clamp(-1, 1)
        # The authors multiply the loss by 1e10, which leaves of AdamW's ε what 1e-18 is
        optimizer = torch.optim.AdamW([current], lr=self.lr, eps=1e-18, maximize=True)
        for i in range(self.iterations):
            t = request.noise.integers(max_t, OWN + 2 * i)
            x_t = add_noise(latent, request.noise.draw(OWN + 2 * i + 1), backbone.alpha_bar(t))
            weight = self.mse_weight * (kept_t < max_t)
            gradient, dice, mse = self._attempt(request, current, own, x_t, t, base, weight)
            closer = (t < kept_t) | ((t == kept_t) & (mse < kept_mse))
            better = (dice >= self.success) & closer
            kept = torch.where(better.unsqueeze(1), current, kept)
            kept_t, kept_mse = torch.where(better, t, kept_t), torch.where(better, mse, kept_mse)
            current.grad = gradient
            optimizer.step()
            current.copy_(start + (current - start).clamp(-self.epsilon, self.epsilon))
        succeeded = kept_t < max_t
        return torch.where(succeeded.unsqueeze(1), kept, current), torch.where(succeeded, kept_t, -1)

    def _attempt(
        self,
        request: Request,
        flat: Tensor,
        own: list[bool],
        x_t: Tensor,
        t: Tensor,
        base: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective's gradient in the condition, and soft Dice loss and pixel error of x̂_0."""
        seen: dict[str, Tensor] = {}

        def objective(values: Tensor) -> Tensor:
            epsilon = request.sampler.epsilon(x_t, t, unpack(values, request.condition, own))
            image = estimated_image(request.sampler, x_t, epsilon, t)
            logits = request.anchor(image).float()
            mse = F.mse_loss(image, base, reduction="none").flatten(1).mean(1)
            seen["dice"], seen["mse"] = REWARDS["dice"](logits, request.mask).detach(), mse.detach()
            return REWARDS[self.reward](logits, request.mask) - weight * mse

        _, gradient = gradient_of(objective, flat)
        return gradient, seen["dice"], seen["mse"]


def own_leaves(condition: Any, batch: int) -> list[bool]:
    """Return which leaves of a nested condition are float tensors with an entry for each of B samples."""
    return [
        isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0 and len(leaf) == batch
        for leaf in tree_leaves(condition)
    ]


def _own(request: Request) -> list[bool]:
    """Return :func:`own_leaves` of a request, told apart on two samples: one may have what all share."""
    rows = torch.zeros(2, dtype=torch.long, device=request.mask.device)
    return own_leaves(request.sampler.backbone.condition(request.mask[rows], request.image[rows]), 2)


def pack(condition: Any, own: list[bool]) -> Tensor:
    """Return what a nested condition has of floating point for each sample, float32 ``(B, N)``, N above 0.

    Args:
        condition: a tensor, or dicts, tuples and lists of tensors.
        own: which of its leaves are the samples' own (:func:`own_leaves`); the others are shared.
    """
    leaves = [leaf for leaf, mine in zip(tree_leaves(condition), own, strict=True) if mine]
    return torch.cat([leaf.reshape(len(leaf), -1).float() for leaf in leaves], dim=1)


def unpack(flat: Tensor, condition: Any, own: list[bool]) -> Any:
    """Return a condition with the values of ``flat`` ``(B, N)`` where :func:`pack` read them."""
    offset, flags = 0, iter(own)

    def fill(leaf: Any) -> Any:
        nonlocal offset
        if not next(flags):
            return leaf
        size = leaf[0].numel()
        values = flat[:, offset : offset + size].reshape(leaf.shape)
        offset += size
        return values.to(leaf.dtype)

    return tree_map(fill, condition)
