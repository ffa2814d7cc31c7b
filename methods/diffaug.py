"""DiffAug: one noising and one denoising step of the plain sample."""

from torch import Tensor

from diffusion.schedule import add_noise, predict_x0
from errors import require
from methods.method import OWN, PROBE, Method, Request

TIME, NOISE = OWN + 4_000, OWN + 4_001
"""Streams of the timestep and of the noise added there."""


class DiffAug(Method):
    """Noise the plain sample to t and return its one-step estimate x̂_0, clipped.

    Sastry et al., "DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers", NeurIPS
    2024. As the authors of native adversarial synthesis compare with it: of synthetic images, with
    t ~ Beta(a, b)·T over the T timesteps of training.

    Args:
        a: first parameter of the Beta distribution.
        b: second parameter of the Beta distribution.

    Raises:
        InputError: a parameter is not positive.
    """

    name = "diffaug"

    def __init__(self, a: float = 2.0, b: float = 4.0) -> None:
        super().__init__()
        for key, value in (("a", a), ("b", b)):
            require(value > 0, key, value, "a parameter of Beta(a, b) must be above 0")
        self.a = a
        self.b = b

    def synthesize(self, request: Request) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Method.synthesize`; notes ``t``, the timestep."""
        backbone = request.sampler.backbone
        base = request.sampler.sample(request.noise.draw(PROBE), request.condition)
        steps = len(backbone.alphas_cumprod)
        share = request.noise.scalars(lambda rng: rng.beta(self.a, self.b), TIME)
        t = (share * steps).long().clamp(max=steps - 1)
        alpha_bar = backbone.alpha_bar(t)
        x_t = add_noise(backbone.encode(base), request.noise.draw(NOISE), alpha_bar)
        x_0 = predict_x0(x_t, request.sampler.epsilon(x_t, t, request.condition), alpha_bar)
        return backbone.decode(x_0).clamp(-1, 1), {"t": t}
