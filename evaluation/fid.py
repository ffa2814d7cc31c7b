"""Fréchet distance between image sets, over named features."""

import io
import logging
import pickle
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from errors import InputError
from networks.segmenter import Segmenter

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT = 5.0
"""Seconds without an answer after which the download of Inception's weights is given up."""


class EncoderFeatures(nn.Module):
    """Features of a segmenter, frozen for good: the spatial mean of its deepest map.

    Distances over them say how far apart two sets are *for that segmenter*; they compare only with
    distances over the same segmenter.

    Args:
        segmenter: network for images ``(B, C, H, W)`` in [−1, 1].
        name: what reports call these features; None takes the segmenter's class and fingerprint.
    """

    def __init__(self, segmenter: Segmenter, name: str | None = None) -> None:
        super().__init__()
        self.segmenter = segmenter.freeze()
        self.name = name or f"{type(segmenter).__name__} encoder {segmenter.fingerprint()[:8]}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, D)`` of images ``(B, C, H, W)`` in [−1, 1]."""
        return self.segmenter.features(images).mean(dim=(2, 3))


class InceptionFeatures(nn.Module):
    """The 2,048 features of FID's own Inception v3 (TensorFlow 2015-12-05, torch-fidelity's port), frozen.

    Args:
        weights: path of torch-fidelity's weights file; ``None`` takes its cached or downloaded copy.
    """

    name = "Inception v3 (2048)"

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.net = FeatureExtractorInceptionV3(self.name, ["2048"], weights, verbose=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, 2048)`` of images ``(B, 1 or 3, H, W)`` in [−1, 1], grey repeated to RGB."""
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.net(levels.expand(-1, 3, -1, -1))[0]


def fid(real: Iterable[Tensor], fake: Iterable[Tensor], extractor: nn.Module) -> float:
    """Return the Fréchet distance ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two image sets.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule …", over the extractor's features
    instead of Inception's where it is another one. Statistics are float64. The estimate is biased
    upwards in small sets: compare sets of one size only.

    Args:
        real: batches of images ``(B, C, H, W)`` in [−1, 1].
        fake: batches of images of the other set.
        extractor: images → features ``(B, D)``, on whatever device it is.

    Returns:
        The distance ≥ 0, in squared feature units; NaN when either set has fewer than two images.
    """
    metric: FrechetInceptionDistance | None = None
    counts = [0, 0]
    sets = chain(((batch, True) for batch in real), ((batch, False) for batch in fake))
    for features, is_real in _features(sets, extractor):
        if metric is None:
            metric = FrechetInceptionDistance(feature=_Given(features.shape[1]))
        metric.update(features, real=is_real)
        counts[is_real] += len(features)
    if metric is None or min(counts) < 2:
        return float("nan")
    return max(0.0, float(metric.compute()))


def inception(weights: str | None) -> nn.Module | None:
    """Return FID's Inception, or ``None`` where its weights are not given and cannot be had.

    Args:
        weights: path of torch-fidelity's weights file (``weights-inception-2015-12-05-6726825d.pth``);
            ``None`` takes the copy in torch's cache, or tries to download it there.

    Raises:
        InputError: the given file is absent, cannot be read, or holds other weights.
    """
    return _cached_inception() if weights is None else _given_inception(weights)


def _cached_inception() -> InceptionFeatures | None:
    try:
        with _timeout(DOWNLOAD_TIMEOUT), redirect_stderr(io.StringIO()):
            return InceptionFeatures(None)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        log.warning(
            "Inception's weights are not here and cannot be downloaded: FID is over the encoder instead"
        )
        return None


def _given_inception(weights: str) -> InceptionFeatures:
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run its pickle
        return InceptionFeatures(weights)
    except Exception as error:  # a damaged file raises whatever its bytes lead the unpickler to
        problem = "cannot be read as Inception's weights" if Path(weights).is_file() else "does not exist"
        raise InputError(
            f"{weights} {problem}; give weights-inception-2015-12-05-6726825d.pth of torch-fidelity's "
            "release v0.2.0, or no file to take the encoder"
        ) from error


class _Given(nn.Identity):
    """Tells torchmetrics that what it gets are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _features(sets: Iterable[tuple[Tensor, bool]], extractor: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Yield the float64 features (B, D) on the CPU, without a graph, of (batch, flag) pairs."""
    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    for images, flag in sets:
        with torch.no_grad():
            features = extractor(images.to(device))
        yield features.double().cpu(), flag


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Give up network reads after a time, inside the block."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
