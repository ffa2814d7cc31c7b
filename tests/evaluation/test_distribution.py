import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from errors import InputError
from evaluation.distribution import diversity, features_of, inside, kid, precision_recall, vendi


def normal(n, d, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()


def kid_by_loops(x, y):
    """The unbiased estimate, term by term."""
    kernel = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    x, y = x.numpy(), y.numpy()
    within = [
        np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)
    ]
    return within[0] + within[1] - 2 * np.mean([kernel(a, b) for a in x for b in y])


def precision_recall_by_loops(real, fake, k):
    real, fake = real.numpy(), fake.numpy()

    def covered(points, support):
        radii = [sorted(np.linalg.norm(s - t) for t in support)[k] for s in support]  # [0] is s itself
        hits = [any(np.linalg.norm(p - s) <= r for s, r in zip(support, radii, strict=True)) for p in points]
        return np.mean(hits)

    return covered(fake, real), covered(real, fake)


def test_kid_of_sets_of_different_sizes_term_by_term():
    real, fake = normal(9, 4, 0), normal(6, 4, 1, scale=1.5, shift=0.3)
    assert kid(real, fake) == pytest.approx(kid_by_loops(real, fake), rel=1e-10)
    assert kid(real, fake) == pytest.approx(kid(fake, real), rel=1e-10)


def test_kid_is_torchmetrics_over_one_subset_of_all():
    real, fake = normal(20, 5, 2), normal(20, 5, 3, shift=0.5)

    class Given(nn.Module):
        num_features = 5

        def forward(self, x):
            return x

    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=20).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert kid(real, fake) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_kid_is_unbiased():
    """Over many draws from one distribution it averages to 0; the biased estimate would give 0.95."""
    values = [kid(normal(20, 8, 2 * i), normal(15, 8, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert np.std(values) < 0.3
    assert kid(normal(20, 8, 0), normal(15, 8, 1, shift=1.0)) > 3


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_ball_by_ball(k):
    real, fake = normal(25, 3, 0), normal(18, 3, 1, scale=0.7, shift=0.6)
    expected = precision_recall_by_loops(real, fake, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_is_the_share_inside(k):
    real, fake = normal(25, 3, 0), normal(18, 3, 1, scale=0.7, shift=0.6)
    within = inside(real, fake, k)
    assert 0 < within.sum() < 18
    assert float(within.double().mean()) == pytest.approx(precision_recall(real, fake, k)[0], abs=1e-6)
    far = torch.cat([fake[within], fake[~within] + 100])
    assert inside(real, far, k).tolist() == [True] * int(within.sum()) + [False] * int((~within).sum())
    assert not inside(real[:k], fake, k).any()


def test_precision_and_recall_of_crafted_sets():
    a = normal(30, 4, 0)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)
    # six modes; the fakes show one of them, each close to a real image
    centres = 50 * torch.eye(6).double()
    real = torch.cat([centre + normal(10, 6, i) for i, centre in enumerate(centres)])
    collapsed = real[:10].repeat(6, 1) + normal(60, 6, 9, scale=0.01)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall == pytest.approx(1 / 6)  # the balls of the fakes reach over that mode at most
    # the other way round: fakes everywhere, most of them outside
    precision, recall = precision_recall(real[:10], real)
    assert precision == pytest.approx(1 / 6)
    assert recall == 1


def test_features_in_single_precision_are_scored_in_double():
    real, fake = normal(12, 3, 0).float(), normal(12, 3, 1).float()
    assert kid(real, fake) == kid(real.double(), fake.double())
    assert vendi(real) == vendi(real.double())


def test_diversity_is_the_mean_distance_of_pairs():
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert diversity(square) == pytest.approx((4 + 2 * 2**0.5) / 6)
    x = normal(7, 3, 0)
    pairs = [float((x[i] - x[j]).norm()) for i in range(7) for j in range(i)]
    assert diversity(x) == pytest.approx(np.mean(pairs))


def test_vendi_counts_different_images():
    assert vendi(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))) == pytest.approx(5)
    assert vendi(normal(1, 6, 0).repeat(8, 1)) == pytest.approx(1)
    halves = torch.eye(2).repeat_interleave(3, 0)  # two groups of three alike
    assert vendi(halves) == pytest.approx(2)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_vendi_from_the_similarity_matrix(shape):
    x = normal(*shape, 5)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(x))
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi(x) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()))


def test_undefined_is_nan():
    one, many = normal(1, 3, 0), normal(10, 3, 1)
    assert math.isnan(kid(one, many))
    assert math.isnan(kid(many, one))
    assert all(math.isnan(x) for x in precision_recall(many[:3], many))
    assert not any(math.isnan(x) for x in precision_recall(many[:4], many))
    assert math.isnan(diversity(one))
    assert math.isnan(vendi(many[:0]))
    assert math.isnan(vendi(torch.zeros(2, 3)))


@pytest.mark.parametrize("function", [kid, precision_recall])
def test_features_that_do_not_belong_together(function):
    with pytest.raises(InputError, match="all from one extractor"):
        function(normal(5, 3, 0), normal(5, 4, 1))
    broken = normal(5, 3, 0)
    broken[2, 1] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        function(normal(5, 3, 0), broken)


def test_radius_needs_a_neighbour():
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(normal(5, 3, 0), normal(5, 3, 1), k=0)


def test_features_come_in_the_order_of_the_set(source):
    class Mean(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    dataset = source.dataset("test")
    features = features_of(dataset, Mean())
    assert features.dtype == torch.float64
    expected = torch.stack([dataset[i]["image"].mean((1, 2)) for i in range(len(dataset))])
    torch.testing.assert_close(features.float(), expected)


def test_features_of_nothing():
    with pytest.raises(InputError, match="empty"):
        features_of(torch.utils.data.Subset([{"image": torch.zeros(1, 2, 2)}], []), nn.Identity())
