import math

import pytest
import torch

from datamodules.sources import PhantomSource
from errors import InputError
from evaluation.modes import appearance, classify_modes, knows_modes, mode_histogram


def clusters(counts, seed=0, spread=1.0):
    """Features around the corners of a simplex, stretched alike, and their modes 0, 2, 4, …"""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.cat([torch.full((n,), 2 * k) for k, n in enumerate(counts)])
    noise = torch.randn(len(modes), 4, generator=generator)
    features = 8 * torch.eye(4)[modes // 2] + spread * noise
    return features * torch.tensor([1.0, 100.0, 0.01, 5.0]) + 3, modes


def test_separate_modes_are_all_found():
    real, modes = clusters([40, 6, 12])
    fake, truth = clusters([3, 9, 5], seed=1)
    found = classify_modes(real, modes, fake)
    assert torch.equal(found.predicted, truth)
    assert found.modes == (0, 2, 4)
    assert found.counts == (3, 9, 5)
    assert found.accuracy == 1
    assert found.recall == (1, 1, 1)


def test_accuracy_is_that_on_images_not_seen():
    """Of overlapping modes the stated accuracy is that on fresh draws; features without modes give chance."""
    real, modes = clusters([300, 300], spread=4.0)
    fresh, truth = clusters([2000, 2000], seed=1, spread=4.0)
    found = classify_modes(real, modes, fresh)
    right = float((found.predicted == truth).double().mean())
    assert 0.85 < right < 0.95
    assert found.accuracy == pytest.approx(right, abs=0.04)
    # twenty features of nothing: a fit to 40 images would call most of its own right
    nothing = torch.randn(40, 20, generator=torch.Generator().manual_seed(3))
    chance = classify_modes(nothing, torch.arange(40) % 2, nothing)
    assert float((chance.predicted == torch.arange(40) % 2).double().mean()) > 0.75
    assert chance.accuracy < 0.7


def test_a_rare_mode_weighs_as_much_as_a_frequent_one():
    real, modes = clusters([200, 10], spread=4.0)
    fake, _ = clusters([1000, 1000], seed=1, spread=4.0)
    share = classify_modes(real, modes, fake).counts[1] / 2000
    assert 0.35 < share < 0.65


def test_modes_shown_once_have_no_accuracy():
    real, modes = clusters([5, 1])
    found = classify_modes(real, modes, real)
    assert torch.equal(found.predicted, modes)
    assert math.isnan(found.recall[1])
    assert found.accuracy == 1
    alone = classify_modes(real[:1], modes[:1], real)
    assert alone.counts == (6,)
    assert math.isnan(alone.accuracy)


def test_a_constant_feature_does_no_harm():
    real, modes = clusters([10, 10])
    fake, truth = clusters([4, 4], seed=1)
    real, fake = (torch.cat([x, torch.full((len(x), 1), 7.0)], dim=1) for x in (real, fake))
    assert torch.equal(classify_modes(real, modes, fake).predicted, truth)


@pytest.mark.parametrize("family", ["cardiac", "abdomen", "polyp"])
def test_modes_of_phantoms(family):
    phantoms = PhantomSource(family, size=32, n_test=120)
    real, fake = phantoms.dataset("test_uniform"), phantoms.dataset("test")
    assert knows_modes(real)
    found = mode_histogram(real, fake)
    truth = torch.tensor([fake[i]["mode"] for i in range(len(fake))])
    assert found.accuracy > 0.9
    assert float((found.predicted == truth).double().mean()) > 0.95
    assert found.counts == tuple(torch.bincount(found.predicted, minlength=5).tolist())
    assert found.counts[0] > 60  # the natural mixture is mostly bright
    image, mask = real[0]["image"], real[0]["mask"]
    torch.testing.assert_close(
        classify_modes(*_given(real), appearance(image, mask)[None]).modes, found.modes
    )


def _given(dataset):
    samples = [dataset[i] for i in range(len(dataset))]
    features = torch.stack([appearance(s["image"], s["mask"]) for s in samples])
    return features, torch.tensor([s["mode"] for s in samples])


def test_appearance_of_a_simple_object():
    """A square at 0.5 with a rim at 0.75 on 0.25: core and rim stand above the surroundings."""
    image, mask = torch.full((2, 40, 40), 0.25), torch.zeros(40, 40, dtype=torch.int64)
    mask[10:30, 10:30] = 1
    image[:, 10:30, 10:30] = 0.75
    image[:, 12:28, 12:28] = 0.5  # a rim of two pixels, RIM of 40
    core, rim, deviation, *_, brightest = appearance(image, mask).tolist()
    assert core == pytest.approx(0.25)
    assert rim == pytest.approx(0.5)
    assert brightest == pytest.approx(0)
    share = 16**2 / 20**2
    assert deviation == pytest.approx(0.25 * (share * (1 - share)) ** 0.5)
    torch.testing.assert_close(appearance(image + 0.1, mask), appearance(image, mask))


@pytest.mark.parametrize("foreground", [0, 1])
def test_appearance_is_finite_without_object_or_surroundings(foreground):
    image = torch.rand(1, 32, 32)
    assert appearance(image, torch.full((32, 32), foreground)).isfinite().all()


def test_what_does_not_belong_together():
    real, modes = clusters([5, 5])
    for arguments in ((real, modes[:-1], real), (real, modes, real[:, :2]), (real[0], modes, real)):
        with pytest.raises(InputError, match="do not belong together"):
            classify_modes(*arguments)
    with pytest.raises(InputError, match="not finite"):
        classify_modes(real, modes, real * float("nan"))
    with pytest.raises(InputError, match="no real images"):
        classify_modes(real[:0], modes[:0], real)


def test_images_without_modes():
    dataset = [{"image": torch.zeros(1, 32, 32), "mask": torch.zeros(32, 32, dtype=torch.int64)}]
    assert not knows_modes(dataset)
    with pytest.raises(InputError, match="carry no mode"):
        mode_histogram(dataset, dataset)
