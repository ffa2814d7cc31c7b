"""What a network reads of initial noise: the backbone's first response to it, or the noise itself."""

from typing import Literal, get_args

from errors import InputError
from networks.pretrained import Pretrained

Response = Literal["score", "estimate", "glance", "noise"]
"""``score`` is S at T, ``estimate`` x̂_0 at T, ``glance`` x̂_0 from where ᾱ_t has reached a signal (both
clipped to [−3, 3]), ``noise`` x_T without a call."""

SIGNAL = 0.02
"""ᾱ at which a glance reads the noise by default."""


class Reader(Pretrained):
    """A network that reads the backbone's response to initial noise.

    Attributes:
        inputs: which response.
        signal: ᾱ at which a glance that it reads begins.
    """

    inputs: Response
    signal: float

    def _reads(self, inputs: Response, signal: float) -> None:
        if inputs not in get_args(Response):
            raise InputError(f"inputs {inputs!r}: choose one of {', '.join(get_args(Response))}")
        if not 0 < signal < 1:
            raise InputError(f"signal {signal}: choose an ᾱ between 0 and 1, such as {SIGNAL}")
        self.inputs = inputs
        self.signal = signal

    def begin_at(self, signal: float) -> None:
        """Read glances from this ᾱ on, and note it among the settings."""
        self._reads(self.inputs, signal)
        self.register_to_config(signal=signal)
