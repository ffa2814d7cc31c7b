"""What a segmentation network looks like to the rest of the application."""

from abc import ABC, abstractmethod

from torch import Tensor

from networks.pretrained import Pretrained


class Segmenter(Pretrained, ABC):
    """Image to class logits.

    ``forward`` takes images float ``(B, C, H, W)`` in [−1, 1] and returns logits ``(B, K, H, W)``, or
    in training mode a list of them, finest first, when the network is deeply supervised. It owns its
    normalisation, differentiably, so that real and synthetic images go the same way.

    Attributes:
        image_channels: image channels C.
        num_classes: classes K, background included.
    """

    image_channels: int
    num_classes: int

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits of images in [−1, 1]."""

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
