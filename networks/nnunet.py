"""nnU-Net's 2D network, built from its own package of architectures."""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from networks.segmenter import Segmenter


def pooling_strides(patch_size: Sequence[int], min_edge: int = 4) -> list[tuple[int, ...]]:
    """Stride of each stage by nnU-Net's rule: halve every edge that stays at ``min_edge`` or above.

    Source: Isensee et al., Nature Methods 2021, the planner's pooling rule for isotropic spacing.

    Args:
        patch_size: height and width in pixels.
        min_edge: smallest edge of the deepest feature map, in pixels.
    """
    edges = list(patch_size)
    strides = [(1,) * len(edges)]
    while any(edge // 2 >= min_edge for edge in edges):
        stride = tuple(2 if edge // 2 >= min_edge else 1 for edge in edges)
        edges = [-(-edge // step) for edge, step in zip(edges, stride, strict=True)]
        strides.append(stride)
    return strides


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
    ) -> None:
        super().__init__()
        self.image_channels = in_channels
        self.num_classes = num_classes
        strides = pooling_strides(patch_size)
        stages = len(strides)
        self.network = PlainConvUNet(
            input_channels=in_channels,
            n_stages=stages,
            features_per_stage=[min(base_features * 2**i, max_features) for i in range(stages)],
            conv_op=nn.Conv2d,
            kernel_sizes=3,
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
        self.divisor = tuple(2 ** sum(stride[axis] == 2 for stride in strides) for axis in (0, 1))

    def _normalise(self, image: Tensor) -> Tensor:
        """Z-score per image, as nnU-Net does for everything but CT."""
        height, width = image.shape[-2:]
        if height % self.divisor[0] or width % self.divisor[1]:
            raise ValueError(
                f"image of {height} × {width} pixels: the edges must be multiples of {self.divisor}"
            )
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        std = image.std(dim=(1, 2, 3), keepdim=True)
        return (image - mean) / (std + 1e-5)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits ``(B, K, H, W)``; a list of them, finest first, in deeply supervised training.

        Raises:
            ValueError: an edge is not a multiple of the network's total stride.
        """
        self.network.decoder.deep_supervision = self.deep_supervision and self.training
        return self.network(self._normalise(image))

    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
        return self.network.encoder(self._normalise(image))[-1]
