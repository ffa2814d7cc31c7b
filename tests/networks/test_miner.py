import pytest
import torch
from torch.distributions import Normal, kl_divergence

from conftest import make_miner
from networks import Miner
from networks.gaussian import ShiftedGaussian
from networks.pretrained import load_pretrained, save_pretrained


@pytest.mark.parametrize(("channels", "expected"), [(4, 8_387_422), (3, 8_387_822), (1, 8_386_964)])
def test_published_parameter_counts(channels, expected):
    with torch.device("meta"):
        miner = Miner(channels)
    assert sum(p.numel() for p in miner.parameters()) == expected


def test_untrained_miner_is_exactly_the_prior():
    miner, eps = make_miner(), torch.randn(3, 3, 16, 16)
    shifted = miner(100 * torch.randn(3, 3, 16, 16))
    assert torch.equal(shifted.rsample(eps), eps)
    assert torch.equal(shifted.kl(), torch.zeros(3))


def test_rsample_shifts_and_scales():
    shifted = ShiftedGaussian(torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[0.25, 1.69]]]]))
    assert torch.allclose(shifted.rsample(torch.full((1, 1, 1, 2), 2.0)), torch.tensor([1.5, 3.1]))


def test_mixed_precision_keeps_the_divergence():
    """At two nats over 3,072 values the variance is within half precision's step of 1."""
    miner = make_miner(trained=True)
    for head in (miner.mean_head, miner.variance_head):
        with torch.no_grad():
            head[-1].weight.mul_(0.25)
    torch.manual_seed(0)
    response = torch.randn(4, 3, 32, 32)
    exact = miner(response).kl()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = miner(response).kl()
    assert 0.05 < exact.min() < exact.max() < 20
    assert torch.allclose(mixed.float(), exact, rtol=0.05)


def test_kl_is_that_of_torch():
    torch.manual_seed(0)
    mean, variance = torch.randn(5, 3, 4, 6), 0.05 + 1.9 * torch.rand(5, 3, 4, 6)
    expected = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(ShiftedGaussian(mean, variance).kl(), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_variance_stays_within_its_bound(scale):
    miner = make_miner(trained=True)
    torch.nn.init.normal_(miner.variance_head[-1].weight, std=10.0)
    with torch.no_grad():
        variance = miner(scale * torch.randn(4, 3, 16, 16)).variance
    assert variance.min() >= 1 - 0.95 - 1e-6
    assert variance.max() <= 1 + 0.95 + 1e-6
    assert variance.std() > 0.1  # the raw values are wild indeed


def test_gradient_reaches_every_weight_of_a_trained_miner():
    miner = make_miner(trained=True)
    shifted = miner(torch.randn(2, 3, 16, 16))
    (shifted.rsample(torch.randn(2, 3, 16, 16)).square().mean() + shifted.kl().mean()).backward()
    assert [name for name, p in miner.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


def test_sizes_that_pooling_does_not_divide():
    score = torch.randn(1, 3, 13, 18)
    assert make_miner(trained=True)(score).mean.shape == score.shape


def test_save_and_load(tmp_path):
    miner = make_miner(seed=3, trained=True, head_width=6, variance_bound=0.5).eval()
    save_pretrained(miner, tmp_path / "miner", {})
    loaded = load_pretrained(tmp_path / "miner", Miner)
    score = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before, after = miner(score), loaded(score)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.variance, after.variance)
    assert loaded.config["variance_bound"] == 0.5
