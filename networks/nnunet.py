"""nnU-Net's 2D network, built from its own package of architectures."""

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from errors import InputError
from networks.nnunet_plan import stage_features, topology
from networks.normalisation import check_channels, normalise
from networks.segmenter import Segmenter


def pooling_strides(patch_size: Sequence[int], min_edge: int = 4) -> list[tuple[int, ...]]:
    """Stride of each stage by nnU-Net's rule for square pixels, see :func:`networks.nnunet_plan.topology`.

    Args:
        patch_size: height and width in pixels.
        min_edge: smallest edge of the deepest feature map, in pixels.
    """
    return list(topology(patch_size, min_edge=min_edge).strides)


def _forget_aliases(network: PlainConvUNet) -> None:
    """Register every module once: the package keeps second names, under which weights were saved twice."""
    aliases = [(network.decoder, "encoder")]
    for module in network.modules():
        if isinstance(module, ConvDropoutNormReLU):
            aliases += [(module, name) for name in ("conv", "norm", "nonlin") if name in module._modules]
    for owner, name in aliases:
        owner.__dict__[name] = owner._modules.pop(name)


class NNUNet(Segmenter):
    """The plain convolutional U-Net of nnU-Net (two convolutions a stage, InstanceNorm, LeakyReLU).

    Args:
        in_channels: image channels.
        num_classes: classes, background included.
        patch_size: height and width that the network is planned for, in pixels.
        base_features: features of the first stage; they double with each stage.
        max_features: upper bound of the features.
        deep_supervision: return logits at every resolution while training.
        strides: stride of each stage along height and width, as planned; None follows from ``patch_size``.
        kernel_sizes: kernel of each stage, as planned; None is 3 × 3 everywhere.
        normalisation: how each channel is normalised, ``{scheme: zscore}`` or ``{scheme: ct, mean: …, std: …,
            lower: …, upper: …}``, as planned; None is the z-score over all channels of an image together.

    Raises:
        InputError: ``normalisation`` does not fit the channels.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        patch_size: tuple[int, int] = (256, 256),
        base_features: int = 32,
        max_features: int = 512,
        deep_supervision: bool = True,
        strides: Sequence[Sequence[int]] | None = None,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        normalisation: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.image_channels = in_channels
        self.num_classes = num_classes
        self.patch_size = (patch_size[0], patch_size[1])
        if normalisation is not None:
            check_channels(normalisation, in_channels, "normalisation")
        self.normalisation = normalisation
        strides = pooling_strides(patch_size) if strides is None else [tuple(pair) for pair in strides]
        stages = len(strides)
        if stages < 2:
            raise InputError(
                f"patch_size {patch_size[0]} × {patch_size[1]}: too small to be halved once; choose 8 or more"
            )
        self.network = PlainConvUNet(
            input_channels=in_channels,
            n_stages=stages,
            features_per_stage=stage_features(stages, base_features, max_features),
            conv_op=nn.Conv2d,
            kernel_sizes=3 if kernel_sizes is None else [tuple(pair) for pair in kernel_sizes],
            strides=strides,
            n_conv_per_stage=2,
            num_classes=num_classes,
            n_conv_per_stage_decoder=2,
            conv_bias=True,
            norm_op=nn.InstanceNorm2d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
        )
        self.network.apply(InitWeights_He(1e-2))
        _forget_aliases(self.network)
        self.deep_supervision = deep_supervision
        if not deep_supervision:
            self.network.decoder.seg_layers[:-1].requires_grad_(False)  # DDP waits for their gradients
        height, width = (2 ** sum(stride[axis] == 2 for stride in strides) for axis in (0, 1))
        self.divisor = (height, width)

    def normalise(self, image: Tensor) -> Tensor:
        """Normalise by channel as planned; without a plan, z-score per image, as nnU-Net does but for CT."""
        if self.normalisation is not None:
            return normalise(image, self.normalisation)
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        std = image.std(dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (std + 1e-5)

    def _fitting(self, image: Tensor) -> Tensor:
        if wrong := self.misfit(image.shape[-2:]):
            raise ValueError(wrong)
        return image

    def segment(self, normalised: Tensor) -> Tensor | list[Tensor]:
        """Return logits ``(B, K, H, W)``; a list of them, finest first, in deeply supervised training.

        Raises:
            ValueError: an edge is not a multiple of the network's total stride.
        """
        self.network.decoder.deep_supervision = self.deep_supervision and self.training
        return self.network(self._fitting(normalised))

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits of images in [−1, 1]; see :meth:`segment`."""
        return self.segment(self.normalise(image))

    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
        return self.network.encoder(self.normalise(self._fitting(image)))[-1]
