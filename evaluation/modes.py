"""Which appearance mode each image of a set shows, judged by real images whose mode is known."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from errors import InputError

FOLDS = 5
RIM = 0.04
"""Width of an object's rim, and lag of the texture features, as a share of the shorter edge."""


@dataclass(frozen=True)
class ModeHistogram:
    """How often each mode occurs among the fakes, and how far the count can be trusted.

    The accuracy is that on real images. A fake which looks like no mode is counted for the nearest one.

    Attributes:
        predicted: mode of each fake ``(M,)``, int64.
        modes: the modes that the real images show, in order.
        counts: fakes judged to show each of them.
        accuracy: mean over the modes of ``recall``; chance is 1 / number of modes.
        recall: share of the held-out real images of each mode that are judged right; NaN, and left out
            of ``accuracy``, where a mode has one real image.
    """

    predicted: Tensor
    modes: tuple[int, ...]
    counts: tuple[int, ...]
    accuracy: float
    recall: tuple[float, ...]


def classify_modes(real_features: Tensor, real_modes: Tensor, fake_features: Tensor) -> ModeHistogram:
    """Judge the mode of each fake by linear discriminant analysis fitted on real images.

    Modes have equal prior probability, so that a rare one is not swallowed by a frequent one, and the
    common covariance is shrunk towards a multiple of the identity by Ledoit and Wolf's formula ("A
    well-conditioned estimator for large-dimensional covariance matrices", 2004), after each feature is
    scaled to unit deviation. The accuracy is by cross-validation: fold i has every fifth image of each
    mode.

    Args:
        real_features: ``(N, D)``; whichever features tell the modes apart, such as :func:`appearance`.
        real_modes: int64 ``(N,)``.
        fake_features: ``(M, D)``.

    Raises:
        InputError: shapes do not agree, a feature is not finite, or there are no real images.
    """
    _check(real_features, real_modes, fake_features)
    real, fake = real_features.double(), fake_features.double()
    modes, label = real_modes.unique(return_inverse=True)
    rank = torch.zeros_like(label)  # position of each image among those of its mode
    for k in range(len(modes)):
        rank[label == k] = torch.arange(int((label == k).sum()), device=label.device)
    held_out, correct = rank % FOLDS, torch.full_like(real[:, 0], float("nan"))
    for fold in range(FOLDS):
        test = held_out == fold
        if test.any() and len(label[~test].unique()) == len(modes):
            correct[test] = (_lda(real[~test], label[~test], real[test]) == label[test]).double()
    recall = torch.stack([correct[label == k].nanmean() for k in range(len(modes))])
    predicted = _lda(real, label, fake)
    return ModeHistogram(
        predicted=modes[predicted],
        modes=tuple(modes.tolist()),
        counts=tuple(torch.bincount(predicted, minlength=len(modes)).tolist()),
        accuracy=float(recall.nanmean()),
        recall=tuple(recall.tolist()),
    )


def mode_histogram(real: Dataset, fake: Dataset) -> ModeHistogram:
    """Judge which mode each fake shows, by :func:`appearance`.

    Args:
        real: samples with ``image``, ``mask`` and ``mode``; best with all modes equally often.
        fake: samples with ``image`` and ``mask``.

    Raises:
        InputError: as in :func:`classify_modes`, or the real samples carry no mode.
    """
    if not knows_modes(real):
        raise InputError("mode histogram: the real samples carry no mode; give a split of phantoms")
    modes = torch.tensor([real[i]["mode"] for i in range(len(real))])  # type: ignore[arg-type]
    return classify_modes(_appearances(real), modes, _appearances(fake))


def knows_modes(dataset: Dataset) -> bool:
    """Return whether the samples of a set carry a ``mode``."""
    return len(dataset) > 0 and "mode" in dataset[0]  # type: ignore[arg-type]


def appearance(image: Tensor, mask: Tensor) -> Tensor:
    """Describe how the objects of an image look against what is around them.

    Grey values are the mean of the channels, relative to the mean in a band around the objects; "texture"
    is what remains after the mean of each class is taken away.

    Args:
        image: float ``(C, H, W)``.
        mask: int64 ``(H, W)``; the objects are all that is not 0.

    Returns:
        float64 ``(8,)``: grey value of the objects' core and rim; deviation of the texture, and of its
        fine part; its autocovariance at one, two and three rim widths; the brightest surroundings (98 %).
    """
    grey, inside = image.double().mean(0)[None, None], (mask > 0).double()[None, None]
    step = max(1, round(RIM * min(mask.shape)))
    dilated = F.max_pool2d(inside, 2 * step + 1, 1, step)
    core = 1 - F.max_pool2d(1 - inside, 2 * step + 1, 1, step)
    grey = grey - _mean(grey, dilated - inside)
    texture = torch.zeros_like(grey)
    for label in mask[mask > 0].unique():
        member = (mask == label).double()[None, None]
        texture = texture + member * (grey - _mean(grey, member))
    fine = texture - F.avg_pool2d(texture, 3, 1, 1)
    outside = grey[dilated == 0]
    return torch.stack(
        [
            _mean(grey, core),
            _mean(grey, inside - core),
            _mean(texture.square(), inside).sqrt(),
            _mean(fine.square(), inside).sqrt(),
            *(_autocovariance(texture, inside, lag * step) for lag in (1, 2, 3)),
            outside.quantile(0.98) if len(outside) else outside.new_zeros(()),
        ]
    )


def _appearances(dataset: Dataset) -> Tensor:
    samples = (dataset[i] for i in range(len(dataset)))  # type: ignore[arg-type]
    return torch.stack([appearance(sample["image"], sample["mask"]) for sample in samples])


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean over all pixels, 0 where nothing has weight."""
    return (values * weight).sum() / weight.sum().clamp(min=1)


def _autocovariance(texture: Tensor, inside: Tensor, lag: int) -> Tensor:
    """Return the mean product of the texture with itself ``lag`` pixels below and to the right."""
    products = [
        _mean(texture.roll(lag, axis) * texture, inside.roll(lag, axis) * inside) for axis in (-2, -1)
    ]
    return (products[0] + products[1]) / 2


def _lda(features: Tensor, label: Tensor, unknown: Tensor) -> Tensor:
    """Return the class (M,) of unknown features (M, D), from features (N, D) of classes 0 … K − 1 (N,)."""
    scale, offset = features.std(0, correction=0), features.mean(0)
    scale = torch.where(scale > 1e-12, scale, 1.0)
    features, unknown = (features - offset) / scale, (unknown - offset) / scale
    means = torch.stack([features[label == k].mean(0) for k in range(int(label.max()) + 1)])
    root = torch.linalg.cholesky(_ledoit_wolf(features - means[label]))
    whitened = [torch.linalg.solve_triangular(root, x.T, upper=False).T for x in (unknown, means)]
    return torch.cdist(*whitened).argmin(1)


def _ledoit_wolf(centred: Tensor) -> Tensor:
    """Return the shrunk covariance (D, D) of centred features (N, D); positive definite always."""
    n, d = centred.shape
    covariance = centred.T @ centred / n
    identity = torch.eye(d, dtype=centred.dtype, device=centred.device)
    target = (covariance.trace() / d).clamp(min=1e-12) * identity
    distance = (covariance - target).square().sum().clamp(min=1e-300)
    # mean squared distance of the estimates of single images to their mean, without forming them
    noise = (centred.square().sum(1).square().mean() - covariance.square().sum()) / n
    weight = (noise / distance).clamp(1e-6, 1)
    return (1 - weight) * covariance + weight * target


def _check(real: Tensor, modes: Tensor, fake: Tensor) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or modes.shape != real.shape[:1]:
        raise InputError(
            f"modes: features {tuple(real.shape)} and {tuple(fake.shape)} and {tuple(modes.shape)} modes do "
            "not belong together; give (N, D), (M, D) and (N,)"
        )
    if len(real) == 0:
        raise InputError("modes: there are no real images to learn the modes from; give some")
    if not bool(real.isfinite().all() and fake.isfinite().all()):
        raise InputError("modes: some features are not finite; look for a damaged image")
