"""Latents of images that come again."""

import hashlib

import torch
from torch import Tensor

from diffusion.backbones import Backbone


class LatentCache:
    """Latents by the content of their images, whatever they are called and whichever way they are turned.

    Args:
        size: latents kept, on the CPU; once there are so many no more are added.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def encode(self, backbone: Backbone, image: Tensor) -> Tensor:
        """Return latents ``(B, *noise_shape)`` of images ``(B, C, H, W)``; only unknown ones are encoded."""
        if self.size == 0:
            return backbone.encode(image)
        keys = [hashlib.sha1(one.tobytes()).digest() for one in image.cpu().contiguous().numpy()]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        fresh = dict(zip(new, backbone.encode(image[new]), strict=True)) if new else {}
        for i, latent in fresh.items():
            if len(self.known) < self.size:
                self.known[keys[i]] = latent.cpu()
        return torch.stack(
            [fresh[i] if i in fresh else self.known[key].to(image.device) for i, key in enumerate(keys)]
        )
