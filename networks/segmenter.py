"""What a segmentation network looks like to the rest of the application."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from networks.normalisation import Channel
from networks.pretrained import Pretrained


class Segmenter(Pretrained, ABC):
    """Image to class logits.

    ``forward`` takes images float ``(B, C, H, W)`` in [−1, 1] and returns logits ``(B, K, H, W)``, or
    in training mode a list of them, finest first, when the network is deeply supervised. It owns its
    normalisation, differentiably, so that real and synthetic images go the same way.

    Attributes:
        image_channels: image channels C.
        num_classes: classes K, background included.
        patch_size: height and width in pixels that the network is made for.
        normalisation: how each channel is normalised, where that is planned; None elsewhere.
    """

    image_channels: int
    num_classes: int
    patch_size: tuple[int, int]
    normalisation: Sequence[Channel] | None = None

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits of images in [−1, 1]."""

    def normalise(self, image: Tensor) -> Tensor:
        """Return what the layers see of whole images in [−1, 1], of any size; as they are by default."""
        return image

    def segment(self, normalised: Tensor) -> Tensor | list[Tensor]:
        """Return logits of normalised images, or of parts of them; ``forward`` does both in a row."""
        return self(normalised)

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
