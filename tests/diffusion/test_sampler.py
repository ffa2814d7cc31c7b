import functools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from conftest import make_backbone
from diffusion.backbones import Backbone
from diffusion.sampler import Sampler

SCHEDULES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}


class Analytic(Backbone):
    """A score that is cheap, depends on x, t and y, and has a gradient in x."""

    def __init__(self, schedule: str, clip_sample: bool = False) -> None:
        super().__init__()
        self.clip_sample = clip_sample
        self.calls = 0
        self._register_schedule(schedule, *SCHEDULES[schedule], 1000)

    def epsilon(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        neighbour = x_t.roll(1, dims=-1)
        return 0.9 * x_t + 0.1 * torch.sin(3 * neighbour + condition) + t.view(-1, 1, 1, 1) / 5000

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    noise_shape = condition = training_loss = None  # a sampler calls none of these


def noise(batch=2, size=4, channels=2, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def segdiff(schedule, clip):
    start, end = SCHEDULES[schedule]
    backbone = make_backbone(
        beta_schedule=schedule, beta_start=start, beta_end=end, clip_sample=clip, block_out_channels=(8, 8)
    )
    return backbone.eval()


def diffusers_sample(backbone, x, condition, schedule, clip, **changes):
    start, end = SCHEDULES[schedule]
    settings = {"beta_schedule": schedule, "clip_sample": clip, "set_alpha_to_one": True, "steps_offset": 0}
    scheduler = DDIMScheduler(1000, start, end, **settings | changes)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = backbone.epsilon(x, t.expand(len(x)), condition)
            x = scheduler.step(eps, t, x, eta=0.0).prev_sample
    return x


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("clip", [True, False])
def test_whole_sample_is_that_of_diffusers(schedule, clip):
    """To 1e-5 of the result's largest value: without clipping √(1/ᾱ_T) amplifies an untrained network's
    output, and with it float32's rounding, up to 130 times; with clipping the largest value is 1."""
    backbone, x = segdiff(schedule, clip), noise(2, 8, 3)
    condition = backbone.condition((noise(2, 8, 1)[:, 0] > 0).long())
    expected = diffusers_sample(backbone, x, condition, schedule, clip)
    sampler = Sampler(backbone)
    latent = sampler.rollout(x, condition, truncate=50).detach()
    latent = latent.clamp(-1, 1) if clip else latent
    scale = expected.abs().max().clamp(min=1)
    assert (latent - expected).abs().max() <= 1e-5 * scale
    assert expected.std() > 0.05
    sample = sampler.sample(x, condition)
    assert (sample - expected.clamp(-1, 1)).abs().max() <= 1e-5 * scale


def test_a_last_step_that_does_not_end_at_one():
    """Stable Diffusion: timesteps 981 … 1 and ᾱ_0 at the end."""
    backbone, x = Analytic("scaled_linear"), noise()
    backbone.steps_offset, backbone.final_alpha = 1, float(backbone.alphas_cumprod[0])
    changes = {"set_alpha_to_one": False, "steps_offset": 1}
    expected = diffusers_sample(backbone, x, torch.zeros(()), "scaled_linear", False, **changes)
    latent = Sampler(backbone).run(x, torch.zeros(()), Sampler(backbone).pairs, backbone_epsilon(backbone))[0]
    assert torch.allclose(latent, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(latent, diffusers_sample(backbone, x, torch.zeros(()), "scaled_linear", False))


def backbone_epsilon(backbone):
    return lambda x, t, condition: backbone.epsilon(x, torch.full((len(x),), t), condition)


def frozen_chain(backbone, x_T, condition, calls):
    """x̂_0 after 1 … ``calls`` calls, by the formulas, every score held constant."""
    times = [*range(980, -1, -20), -1]
    alpha = [backbone.alphas_cumprod[t].item() if t >= 0 else 1.0 for t in times]
    x, estimates = x_T, []
    for i in range(calls):
        with torch.no_grad():
            eps = backbone.epsilon(x, torch.full((len(x),), times[i]), condition)
        x_0 = (x - math.sqrt(1 - alpha[i]) * eps) / math.sqrt(alpha[i])
        x = math.sqrt(alpha[i + 1]) * x_0 + math.sqrt(1 - alpha[i + 1]) * eps
        estimates.append(x_0)
    return estimates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stop_gradient_is_the_closed_form_at_every_truncation(schedule):
    backbone, condition = Analytic(schedule), torch.tensor(0.3)
    sampler, x_T = Sampler(backbone), noise().requires_grad_()
    constant = math.sqrt(1 / backbone.alphas_cumprod[980].item())
    weight = noise(seed=1)
    estimates = frozen_chain(backbone, x_T, condition, 50)
    for truncate in range(1, 51):
        latent = sampler.rollout(x_T, condition, truncate)
        closed = torch.autograd.grad((latent * weight).sum(), x_T)[0]
        frozen = torch.autograd.grad((estimates[truncate - 1] * weight).sum(), x_T, retain_graph=True)[0]
        assert torch.allclose(closed, constant * weight, rtol=1e-5)
        assert torch.allclose(closed, frozen, rtol=1e-4)
        expected = estimates[truncate - 1].detach()
        assert torch.allclose(latent.detach(), expected, rtol=1e-4, atol=1e-4 * constant)


def test_stop_gradient_runs_without_a_graph_and_takes_no_notice_of_clipping():
    backbone = segdiff("linear", True)
    x_T, condition = (
        noise(1, 8, 3).requires_grad_(),
        backbone.condition(torch.zeros(1, 8, 8, dtype=torch.long)),
    )
    latent = Sampler(backbone).rollout(x_T, condition, 3)
    assert latent.abs().max() > 1  # the last x̂_0 is given out as it is
    (gradient,) = torch.autograd.grad(latent.sum(), x_T)
    assert torch.allclose(gradient, torch.full_like(gradient, 130.1), rtol=1e-3)
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("clip", [False, True])
def test_full_gradient_is_plain_autograd(clip):
    backbone, condition = Analytic("scaled_linear", clip), torch.tensor(0.3)
    sampler, x_T, weight = Sampler(backbone), noise().requires_grad_(), noise(seed=1)
    latent = sampler.rollout(x_T, condition, 10, gradient="full")
    (gradient,) = torch.autograd.grad((latent * weight).sum(), x_T)

    x = x_T
    for t in range(980, 780, -20):
        alpha, alpha_prev = backbone.alphas_cumprod[t], backbone.alphas_cumprod[t - 20]
        eps = backbone.epsilon(x, torch.full((2,), t), condition)
        x_0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        used = x_0.clamp(-1, 1) if clip else x_0
        x = alpha_prev.sqrt() * used + (1 - alpha_prev).sqrt() * eps
    (expected,) = torch.autograd.grad((x_0 * weight).sum(), x_T)
    assert torch.allclose(latent, x_0, rtol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    stop = torch.autograd.grad((sampler.rollout(x_T, condition, 10) * weight).sum(), x_T)[0]
    assert not torch.allclose(gradient, stop, rtol=0.1)


def test_full_gradient_through_the_unet():
    backbone = segdiff("scaled_linear", False)
    x_T = noise(1, 8, 3).requires_grad_()
    condition = backbone.condition(torch.ones(1, 8, 8, dtype=torch.long))
    latent = Sampler(backbone).rollout(x_T, condition, 1, gradient="full")
    alpha = backbone.alphas_cumprod[980]
    plain = (x_T - (1 - alpha).sqrt() * backbone.epsilon(x_T, torch.tensor([980]), condition)) / alpha.sqrt()
    ours, expected = (torch.autograd.grad(out.square().sum(), x_T)[0] for out in (latent, plain))
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("gradient", "forward", "total"), [("stop", 5, 5), ("full", 5, 10)])
def test_calls_of_the_backbone(gradient, forward, total):
    backbone, x_T = Analytic("linear"), noise().requires_grad_()
    latent = Sampler(backbone).rollout(x_T, torch.zeros(()), 5, gradient=gradient)
    assert backbone.calls == forward
    latent.sum().backward()
    assert backbone.calls == total


def test_initial_score():
    backbone, x_T = Analytic("linear"), noise()
    eps = backbone.epsilon(x_T, torch.tensor([980, 980]), torch.tensor(0.3))
    expected = -eps / math.sqrt(1 - backbone.alphas_cumprod[980].item())
    score = Sampler(backbone).initial_score(x_T.requires_grad_(), torch.tensor(0.3))
    assert torch.allclose(score, expected, rtol=1e-6)
    (slope,) = torch.autograd.grad(score.sum(), x_T)
    x = x_T.detach().requires_grad_()
    eps = backbone.epsilon(x, torch.tensor([980, 980]), torch.tensor(0.3))
    (direct,) = torch.autograd.grad(eps.sum(), x)
    assert torch.allclose(slope, -direct / math.sqrt(1 - backbone.alphas_cumprod[980].item()), rtol=1e-5)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("truncate", [0, -1, 51])
def test_impossible_truncations(truncate):
    with pytest.raises(ValueError, match="50"):
        Sampler(Analytic("linear")).rollout(noise(), torch.zeros(()), truncate)


class Gaussian(Analytic):
    """The exact ε for images that are N(0, s²) in every pixel: ε = √(1 − ᾱ) x / (ᾱ s² + 1 − ᾱ)."""

    s = 2.0

    def epsilon(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha = self.alpha_bar(int(t[0]))
        return (1 - alpha).sqrt() * x_t / (alpha * self.s**2 + 1 - alpha)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_glance_is_ddim_from_where_the_signal_begins(schedule, calls):
    backbone, x, condition = Analytic(schedule), noise(), torch.tensor(0.3)
    alphas = backbone.alphas_cumprod
    start = max(t for t in range(1000) if alphas[t] >= 0.02)
    times = [start * (calls - i) // calls for i in range(calls)]
    expected = x
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        eps = backbone.epsilon(expected, torch.full((2,), t), condition)
        x_0 = (expected - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        previous = alphas[t_prev] if t_prev >= 0 else torch.tensor(1.0)
        expected = previous.sqrt() * x_0 + (1 - previous).sqrt() * eps
    backbone.calls = 0
    latent = Sampler(backbone).glance(x, condition, calls)
    assert backbone.calls == calls
    assert torch.allclose(latent, expected, rtol=1e-4, atol=1e-5)


def test_the_glance_of_stable_diffusions_schedule_begins_at_865():
    seen = []
    backbone = Analytic("scaled_linear")
    backbone.epsilon = lambda x, t, condition: seen.append(int(t[0])) or x
    Sampler(backbone).glance(noise(), torch.zeros(()), 2)
    assert seen == [865, 432]
    seen.clear()
    Sampler(backbone, signal=0.005).glance(noise(), torch.zeros(()), 2)
    assert seen == [993, 496]
    Sampler(backbone, signal=0.005).glance(noise(), torch.zeros(()), 2, signal=0.02)
    assert seen[2:] == [865, 432]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_glance_shows_what_the_whole_schedule_ends_at(schedule):
    """For Gaussian images DDIM scales the noise by s; a glance must be far nearer than a look at T is."""
    backbone, x = Gaussian(schedule), noise(size=32)
    sampler = Sampler(backbone)
    final = sampler.run(x, torch.zeros(()), sampler.pairs)[0]
    assert torch.allclose(final, backbone.s * x, rtol=0.15)
    ratio = {
        "glance": float((sampler.glance(x, torch.zeros(())) / final).mean()),
        "first": float((sampler.rollout(x, torch.zeros(()), 1) / final).mean()),
    }
    assert abs(ratio["glance"] - 1) < 0.5 * abs(ratio["first"] - 1)


@pytest.mark.parametrize("gradient", ["stop", "full"])
def test_gradient_of_a_glance(gradient):
    backbone, x_T = Gaussian("scaled_linear"), noise().requires_grad_()
    latent = Sampler(backbone).glance(x_T, torch.zeros(()), 2, gradient)
    (got,) = torch.autograd.grad(latent.sum(), x_T)
    alpha = backbone.alphas_cumprod[865]
    expected = latent.detach() / x_T if gradient == "full" else alpha.rsqrt()  # linear in x
    assert torch.allclose(got, expected.expand_as(got), rtol=1e-4)


@pytest.mark.parametrize("calls", [0, 866])
def test_impossible_glances(calls):
    with pytest.raises(ValueError, match="1 to 865"):
        Sampler(Analytic("scaled_linear")).glance(noise(), torch.zeros(()), calls)
