"""Plain sampling: the yardstick of every other method."""

from torch import Tensor

from methods.method import PROBE, Method, Request


class Base(Method):
    """x_T ~ N(0, I), then unmodified DDIM."""

    name = "base"

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``kl``, which is 0."""
        x_T = request.noise.draw(PROBE)
        notes = {"x_T": x_T, "kl": x_T.new_zeros(len(x_T))}
        return request.sampler.sample(x_T, request.condition), notes
