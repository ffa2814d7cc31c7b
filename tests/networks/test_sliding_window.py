"""Sliding windows against the arithmetic of nnunetv2's predictor."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import nn

from networks.sliding_window import gaussian, mirrored, sliding_window, window_starts


@pytest.mark.parametrize("window", [(32, 32), (64, 48), (256, 224), (7, 5)])
def test_weights(window):
    theirs = compute_gaussian(window, sigma_scale=1 / 8, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.allclose(gaussian(window), theirs, rtol=1e-6)
    assert gaussian(window).max() == 1
    assert gaussian(window).min() > 0


def test_starts():
    rng = np.random.default_rng(0)
    for _ in range(200):
        window = int(rng.integers(1, 60))
        size, step = window + int(rng.integers(0, 200)), float(rng.choice([0.25, 0.5, 0.7, 1.0]))
        assert [window_starts(size, window, step)] == compute_steps_for_sliding_window(
            (size,), (window,), step
        )
    assert window_starts(110, 64) == [0, 23, 46]


def network():
    """Sees its surroundings, and knows left from right."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 5, padding=2), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1)).eval()


def predictor(window, mirror):
    theirs = nnUNetPredictor(
        tile_step_size=0.5,
        use_gaussian=True,
        use_mirroring=mirror,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    theirs.network = network()
    theirs.configuration_manager = SimpleNamespace(patch_size=list(window))
    theirs.label_manager = SimpleNamespace(num_segmentation_heads=3)
    theirs.allowed_mirroring_axes = (0, 1)
    return theirs


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", [(50, 71), (24, 32), (20, 45), (13, 11)])
@pytest.mark.parametrize("bits", [16, 32])
def test_logits_are_the_predictors(size, mirror, bits, monkeypatch):
    """Theirs are summed with 16 bits, in which the corners weigh roughly; with 32 they are ours."""
    if bits == 32:
        single = partial(compute_gaussian, dtype=torch.float32)
        monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.compute_gaussian", single)
        monkeypatch.setattr(torch, "half", torch.float32)
    window, ours = (24, 32), network()
    image = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = sliding_window(ours, image, window, mirror=mirror)
    theirs = predictor(window, mirror)
    for one, mine in zip(image, logits, strict=True):
        expected = theirs.predict_sliding_window_return_logits(one[:, None])[:, 0].float()
        assert mine.shape == expected.shape == (3, *size)
        error = (mine - expected).abs()
        assert error.max() < (0.05 if bits == 16 else 1e-5)
        assert error.mean() < 2e-3


def test_one_window_without_mirroring_is_the_network():
    image, whole = torch.randn(2, 2, 24, 32), network()
    with torch.no_grad():
        assert torch.allclose(sliding_window(whole, image, (24, 32), mirror=False), whole(image), atol=1e-6)


def test_mirroring_is_the_mean_over_four():
    image, whole = torch.randn(1, 2, 9, 7), network()
    with torch.no_grad():
        mean = mirrored(whole, image)
        for axes in ((-1,), (-2,), (-2, -1)):
            assert torch.allclose(mirrored(whole, image.flip(axes)).flip(axes), mean, atol=1e-6)
        flips = [whole(image.flip(axes)).flip(axes) for axes in ((-1,), (-2,), (-2, -1))]
        assert torch.allclose(mean, (whole(image) + sum(flips)) / 4, atol=1e-6)
