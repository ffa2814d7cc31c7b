"""GAL: keep the draws whose gradient agrees with that of the real images."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from errors import InputError, require
from methods.method import Method, Preparation, Request
from networks.segmenter import Segmenter
from objectives.gradients import cosine, last_parameters, parameter_gradient
from objectives.rewards import ce


class GAL(Method):
    """Accept a plain draw iff cos(g, ∇_ϑ ℓ_syn) ≥ τ, where g remembers the gradients of real batches.

    Zhu et al., "Generative Active Learning for Long-tailed Instance Segmentation" (BSGAL), ICML 2024:
    g ← m·g + (1 − m)·∇_ϑ ℓ_real over the real batches. There the segmenter is being trained and the
    bank follows it; here the anchor is frozen and the bank is built once, in the order of the real
    training images, from the gradient of the first batch on. ℓ is the mean cross-entropy over the
    pixels. As the paper has it, m weighs the memory: at m = 0.1 the bank is mostly the last batch.

    Args:
        momentum: m.
        threshold: τ.
        tries: most redraws of a sample; after that its draw with the highest cosine is kept.
        parameters: gradients in ``all`` parameters of the anchor or in those of its ``last`` module.
        batch_size: real images in a batch of the bank.

    Raises:
        InputError: an argument is out of its range; while preparing, gradients are switched off, or the
            parameters have none.
    """

    name = "gal"

    def __init__(
        self,
        momentum: float = 0.1,
        threshold: float = -0.05,
        tries: int = 10,
        parameters: Literal["all", "last"] = "all",
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        require(0 <= momentum < 1, "momentum", momentum, "must lie in [0, 1), such as 0.1")
        require(-1 <= threshold <= 1, "threshold", threshold, "is compared with a cosine; choose -1 to 1")
        require(tries >= 0, "tries", tries, "must be at least 0 redraws")
        require(parameters in ("all", "last"), "parameters", parameters, "is unknown; choose all or last")
        require(batch_size >= 1, "batch_size", batch_size, "must be at least 1 real image")
        self.momentum = momentum
        self.threshold = threshold
        self.tries = tries
        self.parameters_used = parameters
        self.batch_size = batch_size
        self.bank: Tensor | None = None

    def gradient(self, anchor: Segmenter, image: Tensor, mask: Tensor) -> Tensor:
        """Return the gradient of the batch's mean ℓ in the parameters that this method looks at."""
        names = last_parameters(anchor) if self.parameters_used == "last" else None
        return parameter_gradient(anchor, image, mask, ce, names)

    def prepare(self, preparation: Preparation) -> None:
        """See :meth:`Method.prepare`; builds the bank."""
        anchor, bank = preparation.anchor, None
        device = next(anchor.parameters()).device
        for batch in DataLoader(preparation.real, batch_size=self.batch_size):
            found = self.gradient(anchor, batch["image"].to(device), batch["mask"].to(device))
            bank = found if bank is None else self.momentum * bank + (1 - self.momentum) * found
        if bank is None or not bank.any():
            raise InputError(
                f"parameters {self.parameters_used!r}: the real images give no gradient in them; choose all"
            )
        self.bank = bank

    def _cosines(self, request: Request, image: Tensor) -> Tensor:
        """Return cos(g, ∇ℓ) of each sample ``(B,)``, one gradient in memory at a time."""
        if self.bank is None:
            raise RuntimeError("GAL.prepare must build the bank before samples are made")
        rows = (slice(i, i + 1) for i in range(len(image)))
        return torch.stack(
            [cosine(self.bank, self.gradient(request.anchor, image[row], request.mask[row])) for row in rows]
        )

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``cosine`` of what is kept and ``tries``: redraws made."""
        image = request.sampler.sample(request.proposal(0), request.condition)
        similarity = self._cosines(request, image)
        tries = torch.zeros_like(similarity, dtype=torch.int64)
        for number in range(1, self.tries + 1):
            rows = (similarity < self.threshold).nonzero().flatten()
            if not len(rows):
                break
            part = request.take(rows)
            redraw = part.sampler.sample(part.proposal(number), part.condition)
            found = self._cosines(part, redraw)
            tries[rows] = number
            better = found > similarity[rows]
            chosen = rows[better]
            image[chosen], similarity[chosen] = redraw[better], found[better]
        return image, {"cosine": similarity, "tries": tries}
