"""DA-Fusion: SDEdit at several strengths, mixed with the real image."""

from collections.abc import Sequence

from methods.sdedit import SDEdit


class DAFusion(SDEdit):
    """SDEdit of the real image at a strength drawn from four, label kept, then mixup with that image.

    Trabucco et al., "Effective Data Augmentation With Diffusion Models", ICLR 2024. Their textual
    inversion has no counterpart where the condition is a mask. The authors of native adversarial
    synthesis add mixup of the result and the real image of the same mask.

    Args:
        strengths: s, each in (0, 1]; the strength of a sample is drawn from them uniformly.
        mixup: α of the mixing weight's Beta(α, α); 0 does not mix, as in the original.

    Raises:
        InputError: an argument is out of its range.
    """

    name = "da_fusion"

    def __init__(self, strengths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), mixup: float = 0.5) -> None:
        super().__init__(strengths, mixup)
