"""A VAE that takes images to latents and back."""

from diffusers import AutoencoderKL

from networks.pretrained import Pretrained


class Autoencoder(Pretrained, AutoencoderKL):
    """diffusers' ``AutoencoderKL``, with its arguments (Rombach et al., CVPR 2022); can be frozen.

    ``config.scaling_factor`` is 1 over the standard deviation of its latents: a diffusion model sees them
    with variance 1.
    """
