"""A diffusion model that is known exactly, and requests for it."""

import torch
import torch.nn.functional as F

from conftest import make_segmenter
from diffusion.backbones import Backbone
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from methods import Preparation, Request

SPREAD = 0.2


class Gaussian(Backbone):
    """The exact denoiser of x_0 ~ N(μ(y), 0.2²), each pixel by itself: μ = 0.4 on the object, −0.3 off it."""

    image_channels, num_classes = 3, 2

    def __init__(self):
        super().__init__()
        self.calls = 0
        self._register_schedule("scaled_linear", 0.00085, 0.012, 1000)

    def noise_shape(self, size):
        return (3, *size)

    def condition(self, mask, image=None):
        return {"mean": 0.7 * mask.unsqueeze(1).float() - 0.3}

    def epsilon(self, x_t, t, condition):
        self.calls += 1
        alpha = self.alpha_bar(t)
        shift = x_t - alpha.sqrt() * condition["mean"]
        return (1 - alpha).sqrt() * shift / (alpha * SPREAD**2 + 1 - alpha)

    def encode(self, image):
        return image

    def decode(self, latent):
        return latent

    training_loss = None


class Latent(Gaussian):
    """The same at half the resolution."""

    def noise_shape(self, size):
        return (3, size[0] // 2, size[1] // 2)

    def condition(self, mask, image=None):
        return super().condition(mask[:, ::2, ::2])

    def encode(self, image):
        return F.avg_pool2d(image, 2)

    def decode(self, latent):
        return F.interpolate(latent, scale_factor=2)


def discs(indices, size=16):
    """A disc for each index, its place and size depending on the index alone; int64 (B, H, W)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = [(size / 2 + i % 3 - 1, size / 2 - i % 2, 2 + i % 4) for i in indices]
    return torch.stack([((y - v) ** 2 + (x - u) ** 2 <= r**2).long() for v, u, r in centres])


def pictures(indices, size=16):
    """Real images of those discs: brighter objects, some texture; (B, 3, H, W)."""
    texture = NoiseStream(99, indices, (3, size, size)).draw()
    return (0.5 * discs(indices, size).unsqueeze(1) - 0.2 + 0.1 * texture).clamp(-1, 1)


def anchor():
    """A frozen, untrained segmenter of 16 × 16 or 32 × 32 images."""
    return make_segmenter(seed=1).freeze()


def make_request(indices, backbone=None, steps=4, seed=0, size=16, segmenter=None):
    """A request for the samples of those indices."""
    backbone, indices = backbone or Gaussian(), list(indices)
    mask = discs(indices, size)
    return Request(
        sampler=Sampler(backbone, steps),
        noise=NoiseStream(seed, indices, backbone.noise_shape((size, size))),
        mask=mask,
        condition=backbone.condition(mask),
        anchor=segmenter or anchor(),
        image=pictures(indices, size),
    )


def preparation(segmenter=None, real=5, batch=4, **settings):
    """Real images, and calibration requests in batches."""
    segmenter = segmenter or anchor()
    images, masks = pictures(range(real)), discs(range(real))

    def requests(count):
        rows = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        return [make_request(row, seed=2**33, segmenter=segmenter, **settings) for row in rows]

    data = [{"image": images[i], "mask": masks[i], "id": str(i)} for i in range(real)]
    return Preparation(segmenter, data, requests)


def check_samples(method, backbone):
    """Reruns are identical; three samples together are three samples apart; images and notes are in order."""
    segmenter = anchor()
    method.prepare(preparation(segmenter, backbone=backbone))
    indices = [4, 0, 7]
    with torch.no_grad():
        image, notes = method.synthesize(make_request(indices, backbone, segmenter=segmenter))
        again, noted = method.synthesize(make_request(indices, backbone, segmenter=segmenter))
        alone = [method.synthesize(make_request([i], backbone, segmenter=segmenter)) for i in indices]
    assert torch.equal(image, again)
    assert image.shape == (3, 3, 16, 16)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert image.std() > 0.05
    assert (image - torch.cat([one for one, _ in alone])).abs().max() <= 1e-4
    assert set(notes) == set(noted)
    for key, value in notes.items():
        assert value.shape == ((3, 3, 16, 16) if key == "x_T" else (3,))
        assert torch.equal(value.nan_to_num(9), noted[key].nan_to_num(9))
        apart = torch.cat([one[key] for _, one in alone])
        assert torch.allclose(value.float(), apart.float(), atol=1e-4, equal_nan=True)
