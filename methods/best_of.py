"""Best of N: the hardest of a few plain samples."""

from typing import Literal

import torch
from torch import Tensor

from errors import InputError, require
from methods.method import Method, Request
from networks.pretrained import frozen
from networks.segmenter import Segmenter
from objectives.nativeness import best_of_n_kl
from objectives.rewards import REWARDS, Transform, reducible, require_reward


def preference(reward: Tensor, cap: float | None) -> Tensor:
    """Return what the chosen proposal has most of, like ``reward``, which is never negative.

    Up to the cap the harder is preferred; all that is harder than the cap comes after all that is not,
    the easier first.
    """
    return reward if cap is None else torch.where(reward <= cap, reward, -reward)


def easiest(reward: Tensor, share: float) -> Tensor:
    """Return which proposals belong to the easiest ``share`` of each mask's, bool like ``reward`` ``(N, B)``.

    At least one does; of equal ones the first.
    """
    rank = reward.argsort(dim=0, stable=True).argsort(dim=0)
    return rank < max(1, round(share * len(reward)))


class BestOfN(Method):
    """Draw N noises a mask and keep the one that the anchor finds hardest; no gradient is used.

    Every sample is an untouched draw of the diffusion model, so that the set stays on its manifold
    whatever the anchor is: the yardstick of what a method that moves the noise must beat. Proposal 0 is
    the draw of plain sampling. With ``by="sample"``, no cap and no reference no sample is easier than it;
    of equal ones the first is kept.
    Keeping the best of N costs at most ln N nats from the prior.

    Args:
        n: proposals a mask.
        by: judge proposals by the full ``sample``, N times the cost of plain sampling; by the
            ``estimate`` x̂_0 after ``truncate`` calls; or by a ``glance`` of ``calls`` calls
            (:meth:`Sampler.glance`). After the latter two only the chosen one is sampled.
        truncate: calls of the backbone before an ``estimate``, of the full schedule.
        calls: calls of the backbone of a ``glance``.
        reward: how the anchor's difficulty is measured.
        cap: proposals with a higher reward are not eligible, unless all of a mask are, when the easiest
            is taken; None has no cap.
        reference: a segmenter that has learnt more than the anchor, or its folder: proposals are then
            compared by what is reducible, φ(ℓ_anchor) − λ·φ(ℓ_reference).
        reducible: λ; 0 leaves the anchor alone to compare, among those that are trusted.
        transform: φ, ``log`` or ``none``.
        trusted: share of a mask's proposals that are eligible, those that the reference finds easiest; at
            least one is. 1 trusts all.

    Raises:
        InputError: a folder cannot be used, an argument is out of its range, or the reward is unknown.
    """

    def __init__(
        self,
        n: int = 4,
        by: Literal["sample", "estimate", "glance"] = "sample",
        truncate: int = 10,
        calls: int = 2,
        reward: str = "bounded_ce",
        cap: float | None = None,
        reference: str | Segmenter | None = None,
        reducible: float = 1.0,
        transform: Transform = "log",
        trusted: float = 1.0,
    ) -> None:
        super().__init__()
        require(n >= 1, "n", n, "must be at least 1 proposal a mask")
        require(by in ("sample", "estimate", "glance"), "by", by, "choose sample, estimate or glance")
        require(truncate >= 1, "truncate", truncate, "must be at least 1 call of the backbone")
        require(calls >= 1, "calls", calls, "must be at least 1 call of the backbone, better 2")
        require_reward(reward)
        require(cap is None or cap >= 0, "cap", cap, "must be at least 0, as rewards are; null has no cap")
        if cap is not None and reference is not None:
            raise InputError(
                "cap and reference: choose one; a reference bars what nobody can learn by itself"
            )
        require(0 < trusted <= 1, "trusted", trusted, "is a share of the proposals: above 0, at most 1")
        if trusted < 1 and reference is None:
            raise InputError(f"trusted {trusted}: the reference is what trusts; give one, or leave it at 1")
        self.name = f"best_of_{n}" if by == "sample" else f"{by}_{n}"
        self.n = n
        self.by = by
        self.truncate = truncate
        self.calls = calls
        self.reward = reward
        self.cap = cap
        self.reference = None if reference is None else frozen(reference, Segmenter)  # type: ignore[type-abstract]
        self.reducible = reducible
        self.transform: Transform = transform
        self.trusted = trusted

    def _judged(self, request: Request, x_T: Tensor) -> Tensor:
        """Return the images that a proposal is judged by."""
        sampler = request.sampler
        if self.by == "sample":
            return sampler.sample(x_T, request.condition)
        if self.by == "glance":
            estimate = sampler.glance(x_T, request.condition, self.calls)
            return sampler.backbone.decode(estimate).clamp(-1, 1)
        if self.truncate > len(sampler.pairs):
            raise InputError(
                f"truncate {self.truncate}: the schedule has only {len(sampler.pairs)} steps; "
                "lower it or raise model.steps"
            )
        estimate = sampler.rollout(x_T, request.condition, self.truncate)
        return sampler.backbone.decode(estimate).clamp(-1, 1)

    def _liked(self, rewards: Tensor, learnt: Tensor) -> Tensor:
        """Return what the chosen proposal of a mask has most of, ``(N, B)``."""
        if self.reference is None:
            return preference(rewards, self.cap)
        liked = reducible(rewards, learnt, self.reducible, self.transform)
        return liked.masked_fill(~easiest(learnt, self.trusted), -torch.inf)

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`."""
        return {} if self.reference is None else {"reference": self.reference.fingerprint()}

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``proposal``, ``proposals_mean`` (reward), ``kl``."""
        images, rewards, learnt = [], [], []
        for number in range(self.n):
            image = self._judged(request, request.proposal(number))
            with torch.no_grad():
                rewards.append(request.reward(image, self.reward))
                if self.reference is not None:
                    learnt.append(REWARDS[self.reward](self.reference(image).float(), request.mask))
            if self.by == "sample":  # others are looks, and would be held for nothing
                images.append(image)
        reward = torch.stack(rewards)
        liked = self._liked(reward, torch.stack(learnt or rewards))
        proposal = liked.argsort(dim=0, descending=True, stable=True)[0]
        x_T = request.proposal(0)
        for number in proposal.unique().tolist():
            x_T = torch.where((proposal == number).view(-1, 1, 1, 1), request.proposal(number), x_T)
        if self.by == "sample":
            image = torch.stack(images)[proposal, torch.arange(len(proposal), device=proposal.device)]
        else:
            image = request.sampler.sample(x_T, request.condition)
        kl = torch.full_like(reward[0], best_of_n_kl(self.n))
        notes = {"proposal": proposal, "proposals_mean": reward.mean(dim=0), "kl": kl, "x_T": x_T}
        return image, notes
