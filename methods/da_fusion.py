"""DA-Fusion: SDEdit at several strengths, mixed with the real image."""

from collections.abc import Sequence

from torch import Tensor

from errors import require
from methods.method import OWN, Request
from methods.sdedit import SDEdit

MIXUP = OWN + 3_001
"""Stream of the mixing weight, beside SDEdit's."""


class DAFusion(SDEdit):
    """SDEdit of the real image at a strength drawn from four, label kept, then mixup with that image.

    Trabucco et al., "Effective Data Augmentation With Diffusion Models", ICLR 2024. Their textual
    inversion has no counterpart where the condition is a mask. The authors of native adversarial
    synthesis add mixup (Zhang et al., ICLR 2018) of the result and the real image of the same mask:
    λ·made + (1 − λ)·real, λ ~ Beta(α, α), the label staying the mask, which both share.

    Args:
        strengths: s, each in (0, 1]; the strength of a sample is drawn from them uniformly.
        mixup: α; 0 does not mix, as in the original.

    Raises:
        InputError: an argument is out of its range.

    Raises:
        InputError: an argument is out of its range.
    """

    name = "da_fusion"

    def __init__(self, strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), mixup: float = 0.5) -> None:
        super().__init__(strengths)
        require(mixup >= 0, "mixup", mixup, "must be at least 0; 0 does not mix")
        self.mixup = mixup

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``strength`` and, where it mixes, ``mixup`` = λ."""
        image, notes = super().synthesize(request)
        if not self.mixup:
            return image, notes
        weight = request.noise.scalars(lambda rng: rng.beta(self.mixup, self.mixup), MIXUP)
        share = weight.view(-1, 1, 1, 1)
        return (share * image + (1 - share) * request.image).clamp(-1, 1), notes | {"mixup": weight}
