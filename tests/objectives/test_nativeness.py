import math

import pytest
import torch
from torch.distributions import Normal

from networks.gaussian import ShiftedGaussian
from objectives.nativeness import controlled_beta, next_log_beta, overlap, preserve_norm, score_function


@pytest.mark.parametrize("start", [1e-4, 0.1, 30.0])
@pytest.mark.parametrize("budget", [0.5, 4.0, 40.0])
def test_controller_spends_the_budget(start, budget):
    """Reward a·μ under β·½‖μ‖²: the best shift is a/β, so that β settles at ‖a‖/√(2·budget)."""
    a = torch.tensor([3.0, 4.0])
    mean, log_beta, spent = torch.zeros(2), torch.tensor(math.log(start)), []
    for _ in range(3000):
        kl = 0.5 * mean.square().sum()
        beta = controlled_beta(log_beta, kl, budget)
        log_beta = next_log_beta(log_beta, kl, budget, 0.02)
        mean = mean + 0.05 * (a - beta * mean) / (1 + beta)  # a miner that lags behind β
        spent.append(kl.item())
    assert spent[-1] == pytest.approx(budget, rel=0.01)
    assert beta.item() == pytest.approx(5 / math.sqrt(2 * budget), rel=0.01)
    late = torch.tensor(spent[-1000:])
    assert late.max() < 1.02 * budget  # it does not swing
    assert late.min() > 0.98 * budget


def test_controller_moves_by_its_rate_at_most():
    log_beta = torch.tensor(-2.0)
    for kl, expected in ((1e9, -1.95), (0.0, -2.025), (4.0, -2.0), (4 * math.exp(0.2), -1.99)):
        assert next_log_beta(log_beta, torch.tensor(kl), 4.0, 0.05).item() == pytest.approx(expected)
        beta = controlled_beta(log_beta, torch.tensor(kl), 4.0).item()
        assert beta == pytest.approx(math.exp(-2) * kl / 4, rel=1e-5)


def test_norm_is_that_of_the_reference_and_the_direction_its_own():
    torch.manual_seed(0)
    x, reference = 3 * torch.randn(4, 3, 8, 8) + 1, torch.randn(4, 3, 8, 8)
    scaled = preserve_norm(x, reference)
    assert torch.allclose(scaled.flatten(1).norm(dim=1), reference.flatten(1).norm(dim=1), rtol=1e-5)
    cosine = torch.cosine_similarity(scaled.flatten(1), x.flatten(1))
    assert torch.allclose(cosine, torch.ones(4), atol=1e-5)
    assert torch.allclose(preserve_norm(reference, reference), reference, atol=1e-6)


def test_log_prob_is_that_of_torch():
    torch.manual_seed(0)
    mean, variance, x = torch.randn(3, 2, 4, 4), 0.1 + torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    expected = Normal(mean, variance.sqrt()).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(ShiftedGaussian(mean, variance).log_prob(x), expected, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_score_function_estimates_the_gradient_of_the_expected_reward(offset):
    """E[c + a·x + (a·x)²] = c + a·μ + (a·μ)² + Σ a²σ² for x ~ N(μ, σ²), whatever c."""
    torch.manual_seed(0)
    a = torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    mean = torch.tensor([0.3, 0.1, -0.4]).reshape(1, 3, 1, 1).requires_grad_()
    variance = torch.tensor([0.5, 1.0, 1.5]).reshape(1, 3, 1, 1).requires_grad_()
    eps = torch.randn(800_000, 3, 1, 1)
    shifted = ShiftedGaussian(*(x.expand(len(eps), -1, -1, -1) for x in (mean, variance)))
    draws = [shifted.rsample(e).detach() for e in (eps, -eps)]
    along = torch.stack([(a * x).sum((1, 2, 3)) for x in draws])
    log_prob = torch.stack([shifted.log_prob(x) for x in draws])
    surrogate = score_function(log_prob, offset + along + along.square())
    of_mean, of_variance = torch.autograd.grad(surrogate.mean(), [mean, variance])
    assert torch.allclose(of_mean, (1 + 2 * (a * mean).sum().detach()) * a, atol=0.05)
    assert torch.allclose(of_variance, a.square(), atol=0.05)


def test_score_function_of_one_sample_has_no_baseline():
    log_prob = torch.zeros(2, 1, requires_grad=True)
    score_function(log_prob, torch.tensor([[3.0], [1.0]])).sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.flatten().tolist() == [1.5, 0.5]


def test_overlap_of_known_shifts():
    mean = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(2, 1, 1, 2)
    same, across = 5 * mean, torch.tensor([[0.0, 2.0], [-1.0, 1.0]]).reshape(2, 1, 1, 2)
    assert torch.allclose(overlap(mean, [same]), torch.ones(2), atol=1e-6)
    assert torch.allclose(overlap(mean, [-same]), torch.ones(2), atol=1e-6)
    assert torch.allclose(overlap(mean, [across]), torch.zeros(2), atol=1e-6)
    assert torch.allclose(overlap(mean, [same, across]), torch.full((2,), 0.5), atol=1e-6)
