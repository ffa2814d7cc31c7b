"""A VAE that takes images to latents and back."""

from collections.abc import Sequence

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config

from networks.pretrained import Pretrained


class Autoencoder(Pretrained):
    """diffusers' ``AutoencoderKL`` (Rombach et al., CVPR 2022), for training one's own.

    Args:
        channels: channels of the images.
        latent_channels: channels of the latents.
        block_out_channels: features of each level; between two levels the size is halved.
        layers_per_block: residual layers a level.
        norm_num_groups: groups of the GroupNorm; must divide every level's features.
        scaling_factor: what latents are multiplied by, so that a diffusion model sees them with variance 1.

    Attributes:
        vae: the network.
        factor: what it divides the sides of an image by.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        self.channels = channels
        self.factor = 2 ** (levels - 1)
        self.vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            scaling_factor=scaling_factor,
        )

    def rescale(self, deviation: float) -> None:
        """Set the scale for latents of this standard deviation."""
        self.register_to_config(scaling_factor=1 / deviation)
        self.vae.register_to_config(scaling_factor=1 / deviation)
