"""What a network reads of initial noise: the backbone's first response to it, or the noise itself."""

from typing import Literal

Response = Literal["score", "estimate", "glance", "noise"]
"""``score`` is S at T, ``estimate`` x̂_0 at T, ``glance`` x̂_0 from where ᾱ_t has reached 0.02 (both clipped to
[−3, 3]), ``noise`` x_T without a call."""
