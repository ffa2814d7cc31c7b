"""Choose the seed instead of moving it: a learned scorer reads the backbone's first response."""

import torch
from torch import Tensor

from errors import require
from methods.method import Method, Request
from methods.mined import draw, propose
from networks.miner import Miner
from networks.pretrained import frozen
from networks.scorer import Scorer
from objectives.nativeness import best_of_n_kl


class SeedScorer(Method):
    """Draw N noises a mask, call the backbone once for each, sample the one expected to be hardest.

    Every sample is an untouched draw from the prior, at most ln N − (N − 1)/N nats from it, and costs
    N calls of the backbone beside those of the sampler. With a miner the proposals are shifted first.

    Args:
        scorer: folder of a trained scorer, or the scorer itself.
        n: proposals N.
        quantile: which proposal is taken, by its rank: 1 is the one expected to be hardest, 0.5 the
            median one. Less than 1 stays away from the extreme tail.
        miner: folder of a trained miner that shifts the proposals, each by its own response (seed-paired).
        keep_norm: rescale a shifted proposal to the norm of its draw, for a miner that was trained so.

    Raises:
        InputError: a folder cannot be used, or an argument is out of its range.
    """

    name = "seed_scorer"

    def __init__(
        self,
        scorer: str | Scorer,
        n: int = 8,
        quantile: float = 1.0,
        miner: str | Miner | None = None,
        keep_norm: bool = False,
    ) -> None:
        super().__init__()
        require(n >= 1, "n", n, "choose at least 1 proposal")
        require(0 <= quantile <= 1, "quantile", quantile, "must be between 0 and 1")
        self.scorer = frozen(scorer, Scorer)
        self.n = n
        self.rank = round(quantile * (n - 1))
        self.miner = None if miner is None else frozen(miner, Miner)
        self.keep_norm = keep_norm

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``proposal``, ``predicted`` and a bound on ``kl`` in nats."""
        sampler, condition = request.sampler, request.condition
        proposals, predictions, divergences = [], [], []
        for k in range(self.n):
            x_T = request.proposal(k)
            kl = x_T.new_zeros(len(x_T))
            if self.miner is not None:
                shifted = propose(self.miner, request, x_T)
                x_T, kl = draw(shifted, x_T, self.keep_norm), shifted.kl()
            response = sampler.response(x_T, condition, self.scorer)
            proposals.append(x_T)
            divergences.append(kl)
            predictions.append(self.scorer.predict(response, request.mask))
        predicted = torch.stack(predictions)
        chosen = predicted.argsort(dim=0, stable=True)[self.rank]
        rows = torch.arange(len(chosen), device=chosen.device)
        x_T = torch.stack(proposals)[chosen, rows]
        notes = {
            "x_T": x_T,
            "proposal": chosen,
            "predicted": predicted[chosen, rows],
            "kl": torch.stack(divergences)[chosen, rows] + best_of_n_kl(self.n),
        }
        return sampler.sample(x_T, condition), notes

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`."""
        prints = {"scorer": self.scorer.fingerprint()}
        return prints if self.miner is None else prints | {"miner": self.miner.fingerprint()}
