import math
import urllib.error

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from conftest import make_segmenter
from errors import InputError
from evaluation.fid import EncoderFeatures, InceptionFeatures, fid, inception


class Flatten(nn.Module):
    """Features that are the image itself."""

    name = "identity"

    def forward(self, images):
        return images.flatten(1)


def as_batches(features: np.ndarray, size: int = 17) -> list[torch.Tensor]:
    return list(torch.from_numpy(features)[:, :, None, None].split(size))


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """n vectors whose sample mean and (unbiased) covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_closed_form_of_diagonal_gaussians():
    m1, m2 = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 1.0])
    s1, s2 = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    real = with_moments(60, m1, np.diag(s1), 0)
    fake = with_moments(45, m2, np.diag(s2), 1)
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    assert fid(as_batches(real), as_batches(fake), Flatten()) == pytest.approx(expected, rel=1e-9)


def test_matches_scipys_matrix_root():
    rng = np.random.default_rng(2)
    real = rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12)) + rng.standard_normal(12)
    fake = rng.standard_normal((150, 12)) @ rng.standard_normal((12, 12))
    s1, s2 = np.cov(real.T), np.cov(fake.T)
    gap = real.mean(0) - fake.mean(0)
    expected = gap @ gap + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fid(as_batches(real), iter(as_batches(fake)), Flatten()) == pytest.approx(expected, rel=1e-9)


def test_a_set_with_itself_is_zero():
    images = as_batches(np.random.default_rng(3).standard_normal((50, 6)))
    assert fid(images, images, Flatten()) == pytest.approx(0, abs=1e-9)


def test_is_symmetric():
    rng = np.random.default_rng(4)
    a, b = as_batches(rng.standard_normal((40, 5))), as_batches(3 * rng.standard_normal((30, 5)))
    assert fid(a, b, Flatten()) == pytest.approx(fid(b, a, Flatten()), rel=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_undefined_for_fewer_than_two(n):
    many = as_batches(np.random.default_rng(5).standard_normal((10, 3)))
    few = as_batches(np.zeros((1, 3)))[:n]
    assert math.isnan(fid(many, few, Flatten()))
    assert math.isnan(fid(few, many, Flatten()))


def test_encoder_features_are_the_spatial_mean_of_a_frozen_net():
    segmenter = make_segmenter()
    features = EncoderFeatures(segmenter)
    features.train()
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    out = features(images)
    assert features.name == f"NNUNet encoder {segmenter.fingerprint()[:8]}"
    assert EncoderFeatures(segmenter, "reference").name == "reference"
    assert not segmenter.training
    assert not any(p.requires_grad for p in segmenter.parameters())
    assert not out.requires_grad
    torch.testing.assert_close(out, segmenter.features(images).mean((2, 3)).detach())
    assert fid([images.detach()], [images.detach()], features) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def random_inception(monkeypatch, tmp_path):
    """A weights file of the right form; the network is built once without its file."""
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: pytest.fail("no download"))
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.save({}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_inception_takes_grey_images_in_minus_one_to_one(random_inception, monkeypatch):
    net = inception(str(random_inception))
    assert isinstance(net, InceptionFeatures)
    seen = []
    monkeypatch.setattr(net.net, "forward", lambda x: (seen.append(x), [torch.zeros(len(x), 2048)])[1])
    grey = torch.tensor([-1.0, 0.0, 1.0, 1.2]).reshape(1, 1, 2, 2)
    assert net(grey).shape == (1, 2048)
    assert seen[0].shape == (1, 3, 2, 2)
    assert seen[0].dtype == torch.uint8
    assert seen[0][0, 2].flatten().tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("content", [None, b"", b"not weights", b"\x80\x02]."])
def test_inception_file_that_cannot_be_used(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pth (does not exist|cannot be read)"):
        inception(str(path))


def test_inception_file_with_other_weights(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="cannot be read as Inception's weights"):
        inception(str(tmp_path / "other.pth"))


def test_inception_that_cannot_be_downloaded(monkeypatch, caplog, capfd):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", refuse)
    assert inception(None) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "encoder instead" in caplog.text
    assert "no route" not in "".join(capfd.readouterr())
