"""Plain sampling: the yardstick of every other method."""

from torch import Tensor

from methods.method import PROBE, Method, Request


class Base(Method):
    """x_T ~ N(0, I), then unmodified DDIM."""

    name = "base"

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`."""
        return request.sampler.sample(request.noise.draw(PROBE), request.condition), {}
