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
        image_size: the only height and width that it takes; None takes every multiple of ``divisor``.
        divisor: what height and width must be multiples of.
        normalisation: how each channel is normalised, where that is planned; None elsewhere.
    """

    image_channels: int
    num_classes: int
    patch_size: tuple[int, int]
    image_size: tuple[int, int] | None = None
    divisor: tuple[int, int] = (1, 1)
    normalisation: Sequence[Channel] | None = None

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Return logits of images in [−1, 1]."""

    def misfit(self, size: Sequence[int]) -> str | None:
        """Return what is wrong with images of ``size`` (H, W), and None where nothing is."""
        given = f"images of {size[0]} × {size[1]} pixels"
        if self.image_size is not None and tuple(size) != self.image_size:
            return f"{given}: the network takes {self.image_size[0]} × {self.image_size[1]} alone"
        if any(edge % divisor for edge, divisor in zip(size, self.divisor, strict=True)):
            return f"{given}: the network takes multiples of {self.divisor[0]} × {self.divisor[1]}"
        return None

    def normalise(self, image: Tensor) -> Tensor:
        """Return what the layers see of whole images in [−1, 1], of any size; as they are by default."""
        return image

    def segment(self, normalised: Tensor) -> Tensor | list[Tensor]:
        """Return logits of normalised images, or of parts of them; ``forward`` does both in a row."""
        return self(normalised)

    @abstractmethod
    def features(self, image: Tensor) -> Tensor:
        """Return the deepest feature map ``(B, D, h, w)`` of images in [−1, 1]."""
