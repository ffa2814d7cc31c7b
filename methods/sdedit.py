"""SDEdit: noise the real image in part, and sample from there."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.schedule import add_noise
from errors import InputError, require
from methods.method import OWN, PROBE, Method, Request, together

STRENGTH = OWN + 3_000
"""Stream of the choice of strength."""


def last_part(pairs: list[tuple[int, int]], strength: float) -> list[tuple[int, int]]:
    """Return the last ``strength`` of a schedule, to the nearest step, at least one."""
    return pairs[-max(1, round(strength * len(pairs))) :]


class SDEdit(Method):
    """Noise the real image of the mask to timestep s·T, then DDIM to the end with the mask as condition.

    Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations",
    ICLR 2022. The noise is that of plain sampling. Strength 1 starts at the schedule's first timestep,
    where a trace √ᾱ_T of the image is left.

    Args:
        strengths: s, each in (0, 1]; the strength of a sample is drawn from them uniformly.

    Raises:
        InputError: an argument is out of its range.
    """

    name = "sdedit"

    def __init__(self, strengths: Sequence[float] = (0.5,)) -> None:
        super().__init__()
        self.strengths = tuple(float(strength) for strength in strengths)
        if not self.strengths:
            raise InputError("strengths []: must hold at least one strength, such as [0.5]")
        for strength in self.strengths:
            require(0 < strength <= 1, "strengths", strength, "each must lie above 0 and be at most 1")

    @staticmethod
    def _edit(request: Request, strength: float) -> Tensor:
        """Return the edited images, all by the same strength."""
        sampler = request.sampler
        pairs = last_part(sampler.pairs, strength)
        real = sampler.backbone.encode(request.image)
        x_t = add_noise(real, request.noise.draw(PROBE), sampler.backbone.alpha_bar(pairs[0][0]))
        return sampler.finish(x_t, request.condition, pairs)

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``strength``."""
        choice = request.noise.integers(len(self.strengths), STRENGTH)
        groups = {number: (choice == number).nonzero().flatten() for number in choice.unique().tolist()}
        made = [self._edit(request.take(rows), self.strengths[number]) for number, rows in groups.items()]
        image = together(made, list(groups.values()))
        return image, {"strength": image.new_tensor(self.strengths)[choice]}
