"""A filter for any method: samples that are too hard are made again from other noise."""

import torch
from torch import Tensor

from errors import require
from methods.method import Method, Preparation, Request
from objectives.rewards import require_reward


class Hat(Method):
    """Replace the samples of a method that are harder than a quantile of what it usually makes.

    The mitigation that the authors of native adversarial synthesis added in 2026: the threshold is the
    ``quantile`` of the reward over calibration samples of the same method; a sample above it is made
    again from other noise until it is not, at most ``tries`` times, after which the easiest of these
    retries is kept (never the first attempt, even if that was easier).

    Args:
        method: whose samples are filtered.
        quantile: of the calibration rewards; what lies above is replaced.
        tries: most retries of a sample.
        calibration: samples made to find the threshold, with masks and noise that are not the set's.
        reward: how the anchor's difficulty is measured.

    Raises:
        InputError: an argument is out of its range, or the reward is unknown.
    """

    def __init__(
        self,
        method: Method,
        quantile: float = 0.95,
        tries: int = 5,
        calibration: int = 64,
        reward: str = "bounded_ce",
    ) -> None:
        super().__init__()
        require(0 < quantile < 1, "quantile", quantile, "must lie between 0 and 1, such as 0.95")
        require(tries >= 1, "tries", tries, "must be at least 1; without retries use the method itself")
        require(calibration >= 1, "calibration", calibration, "must be at least 1 sample, better 64")
        require_reward(reward)
        self.method = method
        self.name = f"{method.name}_hat"
        self.quantile = quantile
        self.tries = tries
        self.calibration = calibration
        self.reward = reward
        self.threshold: float | None = None

    def prepare(self, preparation: Preparation) -> None:
        """See :meth:`Method.prepare`; makes the calibration samples."""
        self.method.prepare(preparation)
        rewards = [
            request.reward(self.method.synthesize(request)[0], self.reward).detach()
            for request in preparation.requests(self.calibration)
        ]
        self.threshold = float(torch.quantile(torch.cat(rewards), self.quantile))

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes those of the attempt that was kept, and ``tries``: retries.

        This ``tries`` takes the place of a note of the same name of the inner method.
        """
        if self.threshold is None:
            raise RuntimeError("Hat.prepare must find the threshold before samples are made")
        image, notes = self.method.synthesize(request)
        value = request.reward(image, self.reward).detach()
        kept = {key: note.clone() for key, note in notes.items()}
        image, tries = image.clone(), torch.zeros_like(value, dtype=torch.int64)
        for attempt in range(1, self.tries + 1):
            rows = (value > self.threshold).nonzero().flatten()
            if not len(rows):
                break
            part = request.take(rows).reseeded(attempt)
            retry, notes = self.method.synthesize(part)
            found = part.reward(retry, self.reward).detach()
            tries[rows] = attempt
            better = found < value[rows] if attempt > 1 else torch.ones_like(found, dtype=torch.bool)
            chosen = rows[better]
            image[chosen], value[chosen] = retry[better], found[better]
            for key, note in notes.items():
                kept[key][chosen] = note[better]
        return image, kept | {"tries": tries}

    def fingerprints(self) -> dict[str, str]:
        """See :meth:`Method.fingerprints`; those of the inner method."""
        return self.method.fingerprints()
