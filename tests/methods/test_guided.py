import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn

from conftest import make_backbone, make_segmenter
from diffusion.backbones import Backbone
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from errors import InputError
from methods import Base, Request, advdiffuser, guidance
from methods.advdiffuser import AdvDiffuser, ancestral_step, grad_cam
from methods.diff_pgd import DiffPGD, image_delta
from methods.guidance import AdversarialGuidance, guided_epsilon
from methods.guided import estimated_image, pgd_step
from methods.initno import InitNO, distribution, within_kl
from methods.method import OWN, PROBE
from methods.p2p import P2P, own_leaves, pack, unpack
from networks import Segmenter
from objectives.nativeness import best_of_n_kl

SIZE = 16


class Gaussian(Backbone):
    """The exact score of independent pixels x_0 ~ N(mean(y), 0.4²), where the mean is ±0.3."""

    image_channels = 3
    num_classes = 2
    encode = decode = staticmethod(lambda x: x)
    training_loss = None

    def __init__(self, clip_sample=True):
        super().__init__()
        self.clip_sample = clip_sample
        self._register_schedule("linear", 1e-4, 0.02, 1000)

    def noise_shape(self, size):
        return (3, *size)

    def condition(self, mask, image=None):
        """Nested, with parts that are shared by samples or are no floats."""
        shared = torch.tensor(0.6), torch.ones(1, 2), None
        return {"mask": mask.unsqueeze(1).float(), "classes": mask, "rest": shared}

    def epsilon(self, x_t, t, condition):
        alpha_bar = self.alpha_bar(t)
        mean = condition["rest"][0] * (condition["mask"] - 0.5) * condition["rest"][1].mean()
        variance = 0.16 * alpha_bar + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * mean) / variance


# An untrained network's output is amplified by √(1/ᾱ_T), and with it float32's rounding: 13 times here,
# 130 times with the linear schedule, where nine pixels of ten are saturated and gradients are rounding.
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BACKBONES = {
    "gaussian": Gaussian().freeze(),
    "segdiff": make_backbone(block_out_channels=(8, 8), **SCALED).freeze(),
}
ANCHOR = make_segmenter(patch_size=(SIZE, SIZE)).freeze()


def make_mask(index):
    """A disc whose place and size depend on the index alone."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return ((rows - 6 - index % 3) ** 2 + (columns - 8 + index % 2) ** 2 < (3 + index % 4) ** 2).long()


def make_request(indices=(0, 1, 2), backbone="gaussian", steps=4, mask=None):
    backbone = BACKBONES[backbone] if isinstance(backbone, str) else backbone
    mask = torch.stack([make_mask(i) for i in indices]) if mask is None else mask
    return Request(
        sampler=Sampler(backbone, steps),
        noise=NoiseStream(3, indices, (3, SIZE, SIZE)),
        mask=mask,
        condition=backbone.condition(mask),
        anchor=ANCHOR,
        image=torch.zeros(len(mask), 3, SIZE, SIZE),
    )


def base_of(request):
    return Base().synthesize(request)[0]


def tables(request):
    """t and ᾱ_t of each step, and ᾱ at its end, as numbers."""
    table = [*request.sampler.backbone.alphas_cumprod.double().tolist(), 1.0]
    return [(t, table[t], table[t_prev]) for t, t_prev in request.sampler.pairs]


def epsilon_of(request, x, t, condition=None):
    condition = request.condition if condition is None else condition
    return request.sampler.backbone.epsilon(x, torch.as_tensor(t).expand(len(x)), condition)


def estimate_of(request, x, t, condition=None):
    alpha_bar = request.sampler.backbone.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return (x - (1 - alpha_bar).sqrt() * epsilon_of(request, x, t, condition)) / alpha_bar.sqrt()


def cross_entropy(request, image):
    """Summed over the batch, so that autograd gives each sample its own gradient."""
    pixels = F.cross_entropy(ANCHOR(image.clamp(-1, 1)), request.mask, reduction="none")
    return pixels.mean((1, 2)).sum()


def slope(value, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(value(x), x)[0]


METHODS = {
    "ag": lambda: AdversarialGuidance(scale=100.0),
    "advdiffuser": lambda: AdvDiffuser(eta=0.1, sigma=0.5, pgd_steps=2),
    "p2p": lambda: P2P(epsilon=0.3, lr=0.05, iterations=8, success=0.9),
    "diff_pgd": lambda: DiffPGD(iterations=4),
    "diff_pgd, approximate": lambda: DiffPGD(iterations=4, gradient="approximate"),
    "initno": lambda: InitNO(steps=8, rounds=2, lr=0.05, kl_bound=0.1),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


# All of them


@each_method
def test_makes_other_and_harder_images(make):
    request = make_request(range(8))
    base, (image, notes) = base_of(request), make().synthesize(request)
    assert image.shape == base.shape
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert (image - base).abs().flatten(1).amax(1).min() > 0.02
    gain = request.reward(image) - request.reward(base)
    assert gain.mean() > 0.005
    assert (gain > 0).float().mean() > 0.6
    assert not image.requires_grad
    assert all(len(note) == 8 and not note.requires_grad for note in notes.values())


@each_method
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_sample_depends_on_itself_alone(make, backbone):
    together, notes = make().synthesize(make_request((0, 1, 2), backbone, 3))
    alone = [make().synthesize(make_request((i,), backbone, 3)) for i in (0, 1, 2)]
    assert torch.allclose(together, torch.cat([image for image, _ in alone]), atol=1e-4)
    for key, values in notes.items():
        atol = 1e-5 if key == "x_T" else 1e-6  # after ten steps of Adam
        assert torch.allclose(values, torch.cat([note[key] for _, note in alone]), rtol=1e-4, atol=atol)


@each_method
def test_twice_the_same_and_nothing_learns(make):
    backbone = BACKBONES["segdiff"]
    results = [make().synthesize(make_request(backbone="segdiff", steps=3)) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])
    assert results[0][0].isfinite().all()
    assert not torch.equal(results[0][0], base_of(make_request(backbone="segdiff", steps=3)))
    assert all(p.grad is None for network in (backbone, ANCHOR) for p in network.parameters())


@each_method
def test_inference_mode_is_refused_with_the_fix(make):
    with torch.inference_mode(), pytest.raises(InputError, match=r"trainer\.inference_mode=false"):
        make().synthesize(make_request())


@each_method
def test_names(make, request):
    assert make().name == request.node.callspec.id.split(",")[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdversarialGuidance(scale=math.nan), "scale nan: must be a finite number"),
        (lambda: AdversarialGuidance(reward="iou"), "reward 'iou': is unknown; choose ce, bounded_ce"),
        (lambda: AdvDiffuser(eta=1.5), "eta 1.5: choose 0 (DDIM) to 1 (DDPM)"),
        (lambda: AdvDiffuser(sigma=-1.0), "sigma -1.0: must be"),
        (lambda: AdvDiffuser(pgd_steps=-1), "pgd_steps -1: must be at least 0"),
        (lambda: AdvDiffuser(region="all"), "region 'all': choose grad_cam or none"),
        (lambda: P2P(epsilon=-0.1), "epsilon -0.1: must be"),
        (lambda: P2P(lr=0.0), "lr 0.0: must be a positive number"),
        (lambda: P2P(iterations=-1), "iterations -1: choose 0 to 999999"),
        (lambda: P2P(max_t=0), "max_t 0: choose 1 to 1000"),
        (lambda: P2P(success=2.0), "success 2.0: choose 0 to 1"),
        (lambda: P2P(mse_weight=-1.0), "mse_weight -1.0: must be"),
        (lambda: DiffPGD(epsilon=16.0), "epsilon 16.0: choose 0 to 1"),
        (lambda: DiffPGD(alpha=-1.0), "alpha -1.0: must be"),
        (lambda: DiffPGD(iterations=-1), "iterations -1: must be"),
        (lambda: DiffPGD(t=0), "t 0: must be at least 1"),
        (lambda: DiffPGD(gradient="none"), "gradient 'none': choose full or approximate"),
        (
            lambda: DiffPGD(t=5).synthesize(make_request(steps=4)),
            "t 5: the sampler has 4 steps",
        ),
        (lambda: InitNO(steps=-1), "steps -1: must be at least 0"),
        (lambda: InitNO(rounds=0), "rounds 0: choose 1 to 1000"),
        (lambda: InitNO(lr=-1.0), "lr -1.0: must be"),
        (lambda: InitNO(kl_bound=-1.0), "kl_bound -1.0: must be"),
        (lambda: InitNO(target=math.nan), "target nan: must be a number, or null"),
    ],
)
def test_arguments_out_of_range(build, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build()


def test_a_step_stays_in_its_ball():
    x, centre, gradient = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    inside = centre + 0.3 * (x - centre).tanh()
    moved = pgd_step(inside, gradient, centre, 0.1, 0.3)
    assert (moved - centre).abs().max() <= 0.3 + 1e-6
    free = (inside + 0.1 * gradient.sign() - centre).abs() < 0.3
    assert 0.1 < free.float().mean() < 0.99
    assert torch.allclose((moved - inside)[free], (0.1 * gradient.sign())[free], atol=1e-6)
    assert torch.allclose((moved - centre)[~free].abs(), torch.tensor(0.3))


def test_an_estimate_gives_no_gradient_where_it_is_saturated():
    sampler = Sampler(BACKBONES["gaussian"], 50)
    x_t = torch.linspace(-1, 1, 21).view(1, 1, 1, 21).repeat(2, 1, 1, 1).requires_grad_()
    t = torch.tensor([980, 100])
    image = estimated_image(sampler, x_t, torch.zeros_like(x_t), t)
    factor = sampler.backbone.alphas_cumprod[t].rsqrt().view(2, 1, 1, 1)
    assert torch.allclose(image, (x_t * factor).clamp(-1, 1))
    (gradient,) = torch.autograd.grad(image.sum(), x_t)
    assert torch.allclose(gradient, factor * ((x_t * factor).abs() <= 1))
    assert (gradient[0] != 0).sum() == 1
    assert (gradient[1] != 0).sum() > 15


# Adversarial guidance


def test_guidance_is_the_score_plus_the_gradient():
    """s + λ∇ℓ by autograd of the formulas, taken back to ε, through the whole schedule."""
    request, scale = make_request(), 40.0
    x = request.noise.draw(PROBE)
    for t, alpha_bar, previous in tables(request):
        # The score at a model whose x̂_0 is clipped, as the sampler of the backbone takes it.
        x_0 = estimate_of(request, x, t).clamp(-1, 1)
        score = -epsilon_of(request, x, t) / math.sqrt(1 - alpha_bar)
        shift = scale * slope(lambda z, t=t: cross_entropy(request, estimate_of(request, z, t)), x)
        x_0 = x_0 + (1 - alpha_bar) / math.sqrt(alpha_bar) * shift
        epsilon = -math.sqrt(1 - alpha_bar) * (score + shift)
        x = math.sqrt(previous) * x_0 + math.sqrt(1 - previous) * epsilon
    image, notes = AdversarialGuidance(scale).synthesize(request)
    assert torch.allclose(image, x.clamp(-1, 1), atol=1e-4)
    assert (image - base_of(request)).abs().max() > 0.1
    assert notes == {}


def test_guided_epsilon_is_the_guided_score():
    epsilon, gradient = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.tensor([0.2, 0.9]).view(-1, 1, 1, 1)
    guided = guided_epsilon(epsilon, gradient, alpha_bar, 3.0)
    score, plain = (-value / (1 - alpha_bar).sqrt() for value in (guided, epsilon))
    assert torch.allclose(score, plain + 3 * gradient, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_guidance_is_base(backbone):
    request = make_request(backbone=backbone)
    calls = request.sampler.calls
    image, _ = AdversarialGuidance(scale=0.0).synthesize(request)
    assert request.sampler.calls - calls == 4 * 3  # the call of the gradient is that of the step
    assert torch.equal(image, base_of(request))


def test_guidance_goes_up_where_the_sampler_clips(monkeypatch):
    """In one step, every pixel moves with its gradient, also where the model's x̂_0 lies beyond [−1, 1]."""
    request = make_request(range(8), backbone="segdiff")
    slopes = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).sign()
    monkeypatch.setattr(guidance, "gradient_of", lambda reward, x: (reward(x), slopes))
    request.sampler.pairs = request.sampler.pairs[1:2]
    moved = {scale: AdversarialGuidance(scale).synthesize(request)[0] for scale in (0.0, 1e-3)}
    x = request.noise.draw(PROBE)
    clipped = estimate_of(request, x, request.sampler.pairs[0][0]).abs() > 1
    assert 0.2 < clipped.float().mean() < 0.99
    change = moved[1e-3] - moved[0.0]
    inside = (moved[0.0].abs() < 0.99) & (moved[1e-3].abs() < 0.99)
    assert (inside & clipped).sum() > 100
    assert (change * slopes)[inside].min() > 0


def test_guidance_grows_with_its_scale_and_turns_with_its_sign():
    request = make_request(range(8))
    images = [AdversarialGuidance(scale).synthesize(request)[0] for scale in (-50.0, 0.0, 50.0, 200.0)]
    means = [float(request.reward(image).mean()) for image in images]
    assert means == sorted(means)
    assert means[3] > means[0] + 0.05


# AdvDiffuser


@pytest.mark.parametrize("backbone", BACKBONES)
def test_advdiffuser_without_attack_noise_and_region_is_base(backbone):
    request = make_request(backbone=backbone)
    image, notes = AdvDiffuser(eta=0.0, pgd_steps=0, region="none").synthesize(request)
    assert torch.equal(image, base_of(request))
    assert torch.equal(notes["kept"], torch.zeros(3))
    assert torch.equal(AdvDiffuser(eta=0.0, sigma=0.0, region="none").synthesize(request)[0], image)


def test_advdiffuser_keeps_the_base_sample_where_the_map_is_one(monkeypatch):
    request, kept = make_request(), torch.zeros(3, 1, SIZE, SIZE)
    kept[:, :, :, :8] = 1
    monkeypatch.setattr(advdiffuser, "grad_cam", lambda *_: kept)
    image, notes = AdvDiffuser().synthesize(request)
    base = base_of(request)
    assert torch.allclose(image[..., :8], base[..., :8], atol=1e-6)
    assert (image - base)[..., 8:].abs().mean() > 0.02
    assert torch.equal(notes["kept"], torch.full((3,), 0.5))


def test_advdiffuser_puts_the_base_back_at_the_noise_of_its_step(monkeypatch):
    """A schedule that ends at t = 500 shows x_500: the base sample, noised by the noise it began with."""
    monkeypatch.setattr(advdiffuser, "grad_cam", lambda *_: torch.ones(3, 1, 4, 4))
    request = make_request()
    request.sampler.pairs = [(980, 740), (740, 500)]
    alpha_bar = request.sampler.backbone.alphas_cumprod[500]
    probe = request.noise.draw(PROBE)
    base, _ = request.sampler.run(probe, request.condition, request.sampler.pairs)
    image, _ = AdvDiffuser().synthesize(request)
    expected = alpha_bar.sqrt() * base + (1 - alpha_bar).sqrt() * probe
    assert torch.allclose(image, expected.clamp(-1, 1), atol=1e-6)


def test_advdiffuser_without_attack_and_region_is_ancestral_sampling():
    request, eta = make_request(steps=6), 0.7
    x = request.noise.draw(PROBE)
    for i, (t, alpha_bar, previous) in enumerate(tables(request)):
        sigma = eta * math.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        x_0 = estimate_of(request, x, t).clamp(-1, 1)
        x = math.sqrt(previous) * x_0 + math.sqrt(1 - previous - sigma**2) * epsilon_of(request, x, t)
        x = x + sigma * request.noise.draw(OWN + i)
    image, _ = AdvDiffuser(eta=eta, pgd_steps=0, region="none").synthesize(request)
    assert torch.allclose(image, x.clamp(-1, 1), atol=1e-5)
    assert (image - base_of(request)).abs().mean() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("t", [980, 500, 0])
def test_ancestral_step_is_that_of_diffusers(eta, t):
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    x, epsilon, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = scheduler.step(epsilon, t, x, eta=eta, variance_noise=noise)
    table = scheduler.alphas_cumprod
    previous = table[t - 20] if t else torch.tensor(1.0)
    moved = ancestral_step(expected.pred_original_sample, epsilon, noise, table[t], previous, eta)
    assert torch.allclose(moved, expected.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pgd_steps", [1, 3])
def test_advdiffuser_attacks_within_sigma_beta(pgd_steps):
    """A schedule of one step, to t = 500, where what the segmenter sees is noisy and not clipped."""
    request = make_request()
    request.sampler.pairs = [(740, 500)]
    start, end = (request.sampler.backbone.alphas_cumprod[t].item() for t in (740, 500))
    x, _ = request.sampler.run(request.noise.draw(PROBE), request.condition, request.sampler.pairs)
    radius = 0.1 * (1 - start / end)
    inner = x.abs() + radius < 1  # the result is clipped
    settings = {"eta": 0.0, "sigma": 0.1, "region": "none"}
    change = AdvDiffuser(pgd_steps=pgd_steps, **settings).synthesize(request)[0] - x
    assert 0.5 < inner.float().mean() < 0.9
    assert change[inner].abs().max().item() == pytest.approx(radius, rel=1e-4)
    if pgd_steps == 1:
        gradient = slope(lambda z: F.cross_entropy(ANCHOR(z), request.mask, reduction="sum"), x)
        same = (change - radius * gradient.sign()).abs() < 1e-6
        assert same[inner].float().mean() > 0.999  # a sign may turn where ∇ is nearly 0


def test_grad_cam_is_that_of_the_deepest_features():
    """The anchor's own halves, encoder and decoder, put together by hand."""
    request = make_request(range(4))
    image = base_of(request)
    skips = ANCHOR.network.encoder(ANCHOR.normalise(image))
    skips[-1] = skips[-1].detach().requires_grad_()
    logits = ANCHOR.network.decoder(skips)
    score = (logits[:, 1] * request.mask).sum()
    (gradient,) = torch.autograd.grad(score, skips[-1])
    expected = (gradient.mean((2, 3), keepdim=True) * skips[-1]).sum(1, keepdim=True).relu().detach()
    expected = expected / expected.amax((2, 3), keepdim=True).clamp(min=1e-30)
    cam = grad_cam(ANCHOR, image, request.mask)
    assert cam.shape == (4, 1, *ANCHOR.features(image).shape[-2:])
    assert torch.allclose(cam, expected, atol=1e-5)
    assert (cam.min(), cam.max()) == (0, 1)
    assert not any(module._forward_hooks for module in ANCHOR.modules())


def test_grad_cam_of_a_mask_without_object_keeps_nothing():
    request = make_request(mask=torch.zeros(3, SIZE, SIZE, dtype=torch.long))
    assert not grad_cam(ANCHOR, base_of(request), request.mask).any()
    image, notes = AdvDiffuser().synthesize(request)
    assert torch.equal(image, AdvDiffuser(region="none").synthesize(request)[0])
    assert not notes["kept"].any()


def test_grad_cam_needs_features_of_a_module():
    class Homemade(Segmenter):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, image):
            return self.conv(image)

        def features(self, image):
            return self.conv(image) * 2

    with pytest.raises(InputError, match=r"no module of Homemade puts out its features; choose none"):
        grad_cam(Homemade(), torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long))


# Diff-PGD


def sdedit(request, image, stream, t):
    """By the formulas: noise to the t-th last timestep, then DDIM."""
    steps = tables(request)[-t:]
    x = math.sqrt(steps[0][1]) * image + math.sqrt(1 - steps[0][1]) * request.noise.draw(stream)
    for time, alpha_bar, previous in steps:
        epsilon = epsilon_of(request, x, time)
        x_0 = ((x - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)).clamp(-1, 1)
        x = math.sqrt(previous) * x_0 + math.sqrt(1 - previous) * epsilon
    return x.clamp(-1, 1)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("t", [1, 3])
def test_diff_pgd_without_iterations_is_sdedit_of_base(backbone, t):
    request = make_request(backbone=backbone, steps=50)
    image, notes = DiffPGD(iterations=0, t=t).synthesize(request)
    base = base_of(request)
    assert torch.allclose(image, sdedit(request, base, OWN, t), atol=1e-4)
    assert not torch.allclose(image, base, atol=1e-3)
    assert torch.equal(notes["delta"], torch.zeros(3))


@pytest.mark.parametrize("gradient", ["full", "approximate"])
def test_diff_pgd_follows_its_gradient(gradient):
    """Two iterations by the formulas; δ is twice as large in [−1, 1] as in [0, 1]."""
    request, alpha = make_request(steps=20), 0.03
    base = base_of(request)
    delta = torch.zeros_like(base)
    for i in range(2):
        if gradient == "full":
            direction = slope(
                lambda d, i=i: cross_entropy(request, sdedit(request, base + d, OWN + i, 3)), delta
            )
        else:
            purified = sdedit(request, base + delta, OWN + i, 3)
            direction = slope(lambda z: cross_entropy(request, z), purified)
        delta = (delta + 2 * alpha * direction.sign()).clamp(-0.08, 0.08)
        delta = (base + delta).clamp(-1, 1) - base
    method = DiffPGD(epsilon=0.04, alpha=alpha, iterations=2, gradient=gradient)
    image, notes = method.synthesize(request)
    expected = sdedit(request, base + delta, OWN + 2, 3)
    assert ((image - expected).abs() < 1e-4).float().mean() > 0.999  # a sign may turn where ∇ is nearly 0
    assert (image - sdedit(request, base, OWN + 2, 3)).abs().max() > 0.01
    assert torch.allclose(notes["delta"], torch.full((3,), 0.04), rtol=1e-4)


def test_delta_stays_within_epsilon_and_the_range_of_images():
    x, gradient = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x, delta = x.clamp(-1, 1), torch.zeros_like(x)
    for _ in range(5):
        delta = image_delta(x, delta, gradient, 2 / 255, 4 / 255)
        assert delta.abs().max() <= 8 / 255 + 1e-6
        assert (x + delta).abs().max() <= 1
    room = (x.abs() < 0.9) & (gradient != 0)
    assert torch.allclose(delta[room], 8 / 255 * gradient.sign()[room])


# P2P


def test_pack_reads_the_floats_that_each_sample_has_of_its_own():
    condition = {
        "a": torch.arange(12.0).view(3, 2, 2),
        "b": [torch.arange(3), (torch.ones(3, dtype=torch.float64), torch.ones(2, 3)), None],
        "c": torch.tensor(0.5),
    }
    own = own_leaves(condition, 3)
    flat = pack(condition, own)
    assert torch.equal(flat, torch.cat([torch.arange(12.0).view(3, 4), torch.ones(3, 1)], 1))
    back = unpack(flat + 1, condition, own)
    assert torch.equal(back["a"], condition["a"] + 1)
    assert torch.equal(back["b"][1][0], torch.full((3,), 2.0, dtype=torch.float64))
    assert back["b"][0] is condition["b"][0]
    assert back["b"][1][1] is condition["b"][1][1]
    assert back["b"][2] is None
    assert back["c"] is condition["c"]
    assert isinstance(back["b"], list)
    assert isinstance(back["b"][1], tuple)
    assert own_leaves(torch.arange(3), 3) == [False]
    tensor = torch.rand(3, 1, 4, 4)
    assert torch.equal(unpack(pack(tensor, [True]), tensor, [True]), tensor)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_p2p_without_iterations_is_base(backbone):
    request = make_request(backbone=backbone)
    image, notes = P2P(iterations=0).synthesize(request)
    assert torch.equal(image, base_of(request))
    assert torch.equal(notes["perturbation"], torch.zeros(3))
    assert torch.equal(notes["success_t"], torch.full((3,), -1))


def test_first_step_of_p2p():
    """AdamW's first step is lr · sign(∇) beside its weight decay of 1e-2 · lr."""
    request, lr = make_request(), 0.02
    base = base_of(request)
    t = request.noise.integers(50, OWN)
    alpha_bar = request.sampler.backbone.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * base + (1 - alpha_bar).sqrt() * request.noise.draw(OWN + 1)

    def condition(mask, image=None):
        return {**request.condition, "mask": mask}

    mask = request.condition["mask"]
    gradient = slope(lambda m: cross_entropy(request, estimate_of(request, x_t, t, condition(m))), mask)
    moved = mask * (1 - 0.01 * lr) + lr * gradient.sign()
    image, notes = P2P(iterations=1, lr=lr, success=1.0).synthesize(request)
    expected = request.sampler.sample(request.noise.draw(PROBE), condition(moved))
    assert torch.allclose(image, expected, atol=1e-5)
    assert (image - base).abs().max() > 0.005
    assert torch.allclose(notes["perturbation"], (moved - mask).abs().flatten(1).amax(1), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_p2p_stays_in_its_ball(epsilon):
    request = make_request()
    image, notes = P2P(epsilon=epsilon, lr=0.1, iterations=6, success=1.0).synthesize(request)
    assert torch.allclose(notes["perturbation"], torch.full((3,), epsilon), atol=1e-6)
    # the mean of this backbone's pixels is 0.6 · (mask − 0.5), and its sampler is linear in it
    assert (image - base_of(request)).abs().max() <= 0.6 * epsilon + 1e-5


def test_p2p_keeps_the_success_of_the_lowest_t():
    """Every attempt succeeds at 0; the first is that of the unchanged condition."""
    request = make_request(range(6))
    image, notes = P2P(lr=0.1, iterations=1, success=0.0).synthesize(request)
    assert torch.equal(image, base_of(request))
    times = torch.stack([request.noise.integers(50, OWN + 2 * i) for i in range(5)])
    assert torch.equal(notes["success_t"], times[0])
    image, notes = P2P(lr=0.1, iterations=5, success=0.0).synthesize(request)
    lowest, at = times.min(0)
    assert torch.equal(notes["success_t"], lowest)
    assert 0 < (at == 0).sum() < 6
    assert torch.equal(notes["perturbation"] == 0, at == 0)
    same = (image == base_of(request)).flatten(1).all(1)
    assert torch.equal(same, at == 0)


def test_p2p_prefers_the_closer_image_at_equal_t():
    """With t always 0 every success ties. There the condition has next to no influence: the noise decides."""
    request = make_request(range(6))
    settings = {"lr": 0.1, "epsilon": 0.5, "iterations": 8, "max_t": 1, "success": 0.0}
    _, notes = P2P(**settings).synthesize(request)
    assert torch.equal(notes["success_t"], torch.zeros(6, dtype=torch.long))
    base, errors = base_of(request), []
    for i in range(8):
        x_t = 0.9999**0.5 * base + 0.01 * request.noise.draw(OWN + 2 * i + 1)
        errors.append((estimate_of(request, x_t, torch.zeros(6, dtype=torch.long)).clamp(-1, 1) - base) ** 2)
    closest = torch.stack([error.mean((1, 2, 3)) for error in errors]).argmin(0)
    assert torch.equal(notes["perturbation"] == 0, closest == 0)


def test_p2p_heeds_the_pixel_error_after_a_success():
    request = make_request()
    base, own = base_of(request), own_leaves(request.condition, 3)
    flat = pack(request.condition, own)
    t = torch.tensor([5, 20, 40])
    x_t = base + 0.1 * request.noise.draw(OWN)

    def error(values):
        image = estimate_of(request, x_t, t, unpack(values, request.condition, own)).clamp(-1, 1)
        return (image - base).square().mean((1, 2, 3)).sum()

    weights = torch.zeros(3), torch.tensor([0.0, 1.0, 5.0])
    plain, weighted = (P2P()._attempt(request, flat, own, x_t, t, base, weight)[0] for weight in weights)
    expected = weights[1].unsqueeze(1) * slope(error, flat)
    assert expected[1:].abs().amax(1).min() > 1e-6
    assert torch.allclose(plain - weighted, expected, rtol=1e-3, atol=1e-8)
    for success, alike in ((1.0, True), (0.0, False)):
        start, settings = flat, {"epsilon": 1.0, "lr": 0.05, "iterations": 8}
        kept = [
            P2P(success=success, mse_weight=weight, **settings)._optimise(request, start, own)[0]
            for weight in (0.0, 1e4)
        ]
        assert torch.equal(*kept) == alike


def test_p2p_needs_something_to_optimise():
    class Unconditional(Gaussian):
        def condition(self, mask, image=None):
            return mask

    with pytest.raises(InputError, match="Unconditional is conditioned on nothing of floating point"):
        P2P().synthesize(make_request(backbone=Unconditional()))


# InitNO


@pytest.mark.parametrize("backbone", BACKBONES)
def test_initno_without_steps_is_base(backbone):
    request = make_request(backbone=backbone)
    image, notes = InitNO(steps=0, rounds=1).synthesize(request)
    assert torch.equal(image, base_of(request))
    assert torch.equal(notes["kl"], torch.zeros(3))
    assert torch.equal(notes["rounds"], torch.ones(3))


def first_estimates(request, x_T):
    t = request.sampler.pairs[0][0]
    return request.reward(estimate_of(request, x_T, t).clamp(-1, 1))


def test_first_step_of_initno():
    """Adam's first step is lr · sign(∇), of μ and of log σ²."""
    request, lr = make_request(), 0.02
    noise = request.proposal(0)
    t = request.sampler.pairs[0][0]

    def value(parameters):
        x_T = parameters[:, 0] + (0.5 * parameters[:, 1]).exp() * noise
        return cross_entropy(request, estimate_of(request, x_T, t))

    step = lr * slope(value, torch.zeros(3, 2, 3, SIZE, SIZE)).sign()
    x_T = step[:, 0] + (0.5 * step[:, 1]).exp() * noise
    image, notes = InitNO(steps=1, rounds=1, lr=lr).synthesize(request)
    expected = request.sampler.sample(x_T, request.condition)
    assert ((image - expected).abs() < 1e-4).float().mean() > 0.99  # Adam's ε, where ∇ is nearly 0
    mean, log_variance = step.double().unbind(1)
    kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).flatten(1).sum(1)
    assert torch.allclose(notes["kl"].double(), kl, rtol=0.02)


@pytest.mark.parametrize("bound", [1e-3, 1e-2])
def test_initno_keeps_its_kl_and_raises_what_it_optimises(bound):
    request = make_request()
    x_T, value, kl = InitNO(steps=10, kl_bound=bound)._round(request, 0)
    dimensions = 3 * SIZE * SIZE
    assert (kl <= bound * dimensions).all()
    assert (value > first_estimates(request, request.proposal(0))).all()
    assert torch.allclose(value, first_estimates(request, x_T), rtol=1e-5)
    if bound == 1e-3:
        assert (kl > 0.99 * bound * dimensions).all()
    _, notes = InitNO(kl_bound=bound).synthesize(request)
    assert (notes["kl"] > 0).all()
    assert (notes["kl"] <= bound * dimensions + best_of_n_kl(5) + 1e-5).all()
    assert torch.equal(notes["rounds"], torch.full((3,), 5.0))
    _, notes = InitNO(kl_bound=0, rounds=4).synthesize(request)
    assert notes["kl"].tolist() == pytest.approx([best_of_n_kl(4)] * 3, abs=1e-5)


def test_shortening_to_the_bound_has_a_closed_form_for_the_mean():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 1, 2, 4, 4, generator=generator)
    parameters = torch.cat([mean, torch.zeros_like(mean)], 1)
    kl = 0.5 * mean.square().flatten(1).sum(1)
    bound = 0.5 * float(kl.min()) / 32
    factor = (bound * 32 / kl).sqrt().view(-1, 1, 1, 1, 1)
    assert torch.allclose(within_kl(parameters, bound), factor * parameters, rtol=1e-4)
    both = torch.randn(3, 2, 2, 4, 4, generator=generator)
    short = within_kl(both, 0.1)
    assert (distribution(short).kl() <= 3.2).all()
    assert torch.allclose(distribution(short).kl(), torch.full((3,), 3.2), rtol=1e-4)
    assert torch.allclose(F.cosine_similarity(short.flatten(1), both.flatten(1)), torch.ones(3))
    assert torch.equal(within_kl(both, 100.0), both)


def test_rounds_keep_the_hardest_and_stop_at_the_target():
    request = make_request(range(6))
    values = torch.stack([first_estimates(request, request.proposal(k)) for k in range(3)])
    hardest = values.argmax(0)
    assert len(set(hardest.tolist())) > 1
    x_T = torch.stack([request.proposal(int(k))[i] for i, k in enumerate(hardest)])
    image, _ = InitNO(steps=0, rounds=3).synthesize(request)
    assert torch.equal(image, request.sampler.sample(x_T, request.condition))
    target = float(values[0].min()) + 1e-6
    image, notes = InitNO(steps=0, rounds=3, target=target).synthesize(request)
    there = values[0] >= target
    assert torch.equal(notes["rounds"] == 1, there)
    assert (there & (hardest != 0)).any()  # a later round would have been harder still
    assert torch.equal(image[there], base_of(request)[there])
    image, notes = InitNO(target=-1.0).synthesize(request)
    assert torch.equal(image, base_of(request))
    assert torch.equal(notes["kl"], torch.zeros(6))


def test_a_sample_stops_within_its_round():
    """One that reaches the target keeps the noise that reached it while the others go on."""
    request = make_request(range(6))
    start = first_estimates(request, request.proposal(0))
    target = float(start.median())
    x_T, value, kl = InitNO(steps=4, target=target)._round(request, 0)
    there = start >= target
    assert 0 < there.sum() < 6
    assert torch.equal(x_T[there], request.proposal(0)[there])
    assert torch.allclose(value[there], start[there])
    assert (value[~there] > start[~there]).all()
    assert torch.equal(kl > 0, ~there)
