"""How a set of images lies to another one in feature space: KID, precision and recall, diversity.

Pure functions of features ``(N, D)``, one row an image. All are deterministic and take whole sets, never
random subsets. Features of two extractors do not compare. As in :func:`evaluation.fid.fid`, what is
not defined, as for too few images, is NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_kernel

from errors import InputError
from evaluation.batches import batches


@torch.no_grad()
def features_of(dataset: Dataset, extractor: nn.Module) -> Tensor:
    """Return the features ``(N, D)`` of a set, float64 on the CPU, in the order of the set.

    Args:
        dataset: samples with ``image`` float ``(C, H, W)`` in [−1, 1].
        extractor: images ``(B, C, H, W)`` → features ``(B, D)``, on whatever device it is.

    Raises:
        InputError: the set is empty.
    """
    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    features = [extractor(batch["image"].to(device)).double().cpu() for batch in batches(dataset, "features")]
    if not features:
        raise InputError("features: the image set is empty; give one with at least one image")
    return torch.cat(features)


def kid(real: Tensor, fake: Tensor) -> float:
    """Return the kernel inception distance: unbiased MMD² under the kernel (xᵀy / D + 1)³.

    Bińkowski et al., "Demystifying MMD GANs", ICLR 2018, over the whole sets and over whatever features
    these are. The expectation does not depend on the numbers of images, so that sets of different sizes
    compare; the value may be slightly negative when the distributions are the same.

    Args:
        real: features ``(N, D)``.
        fake: features ``(M, D)``; M may differ from N.

    Returns:
        The distance, in units of the kernel; NaN when either set has fewer than two images.

    Raises:
        InputError: the features do not have the same D, or are not finite.
    """
    real, fake = _checked(real, fake)
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        return float("nan")
    within_real, within_fake = poly_kernel(real, real), poly_kernel(fake, fake)
    return float(
        (within_real.sum() - within_real.trace()) / (n * (n - 1))
        + (within_fake.sum() - within_fake.trace()) / (m * (m - 1))
        - 2 * poly_kernel(real, fake).mean()
    )


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return improved precision and recall, each in [0, 1].

    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", NeurIPS
    2019: precision is the share of fakes that lie within the distance from some real image to its k-th
    neighbour among the real ones, recall the share of real images that lie so within the fakes. Precision
    is what says whether each sample is inside the real manifold; recall falls when modes are missing.

    Args:
        real: features ``(N, D)``.
        fake: features ``(M, D)``. Recall grows with M: compare sets of one size only.
        k: which neighbour sets the radius, at least 1.

    Returns:
        Precision and recall; both NaN when either set has no k-th neighbour (fewer than k + 1 images).

    Raises:
        InputError: the features do not have the same D, or are not finite.
        ValueError: k is not positive.
    """
    if k < 1:
        raise ValueError(f"k is {k}; the neighbour that sets the radius is at least the first")
    real, fake = _checked(real, fake)
    if min(len(real), len(fake)) <= k:
        return float("nan"), float("nan")
    return calculate_precision_recall_full(fake, real, neighborhood=k)


def inside(real: Tensor, fake: Tensor, k: int = 3) -> Tensor:
    """Return for each fake whether it lies in the real manifold; their share is the precision.

    Args:
        real: features ``(N, D)``.
        fake: features ``(M, D)``.
        k: as in :func:`precision_recall`.

    Returns:
        bool ``(M,)``; all False where there is no k-th neighbour (fewer than k + 1 real images).

    Raises:
        InputError: the features do not have the same D, or are not finite.
    """
    real, fake = _checked(real, fake)
    if len(real) <= k:
        return torch.zeros(len(fake), dtype=torch.bool)
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the image itself
    return (torch.cdist(fake, real) <= radius).any(dim=1)


def diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance between two different images of a set.

    Args:
        features: ``(N, D)``.

    Returns:
        The mean over all N (N − 1) / 2 pairs, in feature units; NaN for fewer than two images.

    Raises:
        InputError: the features are no finite matrix.
    """
    (features,) = _checked(features)
    return float(F.pdist(features).mean())


def vendi(features: Tensor) -> float:
    """Return the Vendi score, the effective number of different images, under the cosine kernel.

    Friedman and Dieng, "The Vendi score: a diversity evaluation metric for machine learning", TMLR 2023:
    the exponential of the entropy of the eigenvalues of K / N, where K is the matrix of cosine
    similarities. They are the squared singular values of the normalised features over N. Features that
    share a large mean, as those after a rectifier do, are all similar, and the score is low throughout.

    Args:
        features: ``(N, D)``.

    Returns:
        The score, 1 when all images are alike, up to min(N, D); NaN for an empty set, or where a row is
        zero and has no direction.

    Raises:
        InputError: the features are no finite matrix.
    """
    (features,) = _checked(features)
    if len(features) == 0 or not bool(features.any(dim=1).all()):
        return float("nan")
    eigenvalues = torch.linalg.svdvals(F.normalize(features, dim=1)) ** 2 / len(features)
    return float(torch.special.entr(eigenvalues).sum().exp())


def _checked(*sets: Tensor) -> tuple[Tensor, ...]:
    """Return features as float64, or raise unless they are finite matrices of one width."""
    shapes = [tuple(features.shape) for features in sets]
    if any(len(shape) != 2 for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise InputError(f"features of shapes {shapes}: give matrices (N, D), all from one extractor")
    if not all(bool(features.isfinite().all()) for features in sets):
        raise InputError("features: some are not finite; look for a damaged image or a diverged extractor")
    return tuple(features.double() for features in sets)
