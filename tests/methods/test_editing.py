import itertools
import math

import pytest
import torch
from toy import SPREAD, Gaussian, Latent, check_samples, discs, make_request

from conftest import make_backbone
from errors import InputError
from methods import Base
from methods.cig import CIG, SECOND, angle, circle_interpolation
from methods.da_fusion import DAFusion
from methods.diffaug import NOISE, DiffAug
from methods.inpainting import Inpainting, foreground
from methods.sdedit import SDEdit, last_part

N = 6


@pytest.fixture
def request_():
    return make_request(range(N))


def synthesize(method, request):
    with torch.no_grad():
        return method.synthesize(request)


def many(n=400):
    """So many samples of 8 × 8 pixels: statistics of what is drawn."""
    return make_request(range(n), size=8, steps=2)


def changed(request, **changes):
    return type(request)(**{**request.__dict__, **changes})


# CIG


def vector(*values):
    return torch.tensor(values).view(1, -1, 1, 1)


def test_angle():
    assert angle(vector(1.0, 0.0), vector(3.0, 3.0)).item() == pytest.approx(math.pi / 4)
    assert angle(vector(1.0, 0.0), vector(0.0, 2.0)).item() == pytest.approx(math.pi / 2)
    assert angle(vector(1.0, 0.0), vector(-2.0, 0.0)).item() == pytest.approx(math.pi)
    pair = torch.cat([vector(1.0, 0.0), vector(0.0, 1.0)])
    assert angle(pair, pair.flip(0)).tolist() == pytest.approx([math.pi / 2] * 2)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0, 2.5, 3.9])
def test_circle_of_orthogonal_vectors(a):
    """θ = π/2: z = cos(aπ/2) z1 − sin(aπ/2) z2."""
    z1, z2 = vector(2.0, 0.0, 0.0), vector(0.0, 2.0, 0.0)
    expected = vector(2 * math.cos(a * math.pi / 2), -2 * math.sin(a * math.pi / 2), 0.0)
    assert torch.allclose(circle_interpolation(z1, z2, torch.tensor([a])), expected, atol=1e-6)


@pytest.mark.parametrize("degrees", [20, 60, 110, 170])
def test_every_point_is_on_the_circle(degrees):
    theta, a = math.radians(degrees), torch.linspace(0, 360 / degrees, 37)
    z1 = vector(1.0, 0.0, 0.0).expand(37, -1, -1, -1)
    z2 = vector(math.cos(theta), math.sin(theta), 0.0).expand(37, -1, -1, -1)
    z = circle_interpolation(z1, z2, a)
    assert torch.allclose(z.flatten(1).norm(dim=1), torch.ones(37), atol=1e-5)
    turned = torch.stack([torch.cos(a * theta), -torch.sin(a * theta), 0 * a], dim=1)  # by aθ, away from z2
    assert torch.allclose(z.flatten(1), turned, atol=1e-5)
    for turns, end in ((0.0, z1), (-1.0, z2), (2 * math.pi / theta, z1), (2 * math.pi / theta - 1, z2)):
        assert torch.allclose(circle_interpolation(z1, z2, torch.full((37,), turns)), end, atol=1e-5)


def test_cig_starts_between_two_noised_versions_of_the_real_image(request_):
    image, notes = synthesize(CIG(), request_)
    alpha = request_.sampler.backbone.alphas_cumprod[750]  # four steps: 750 … 0
    z1, z2 = (
        alpha.sqrt() * request_.image + (1 - alpha).sqrt() * request_.noise.draw(stream)
        for stream in (0, SECOND)
    )
    turn, theta = notes["turn"].view(-1, 1, 1, 1), angle(z1, z2).float().view(-1, 1, 1, 1)
    z = (torch.sin(theta + turn) * z1 - torch.sin(turn) * z2) / torch.sin(theta)
    assert torch.allclose(image, request_.sampler.sample(z, request_.condition), atol=1e-5)
    assert not torch.allclose(image, synthesize(Base(), request_)[0], atol=0.1)


def test_cig_goes_all_the_way_round():
    turn = synthesize(CIG(), many())[1]["turn"]
    assert 0 <= turn.min() < 0.1
    assert 2 * math.pi - 0.1 < turn.max() <= 2 * math.pi
    assert turn.mean().item() == pytest.approx(math.pi, abs=5 * 2 * math.pi / math.sqrt(12 * 400))


# SDEdit, DA-Fusion


@pytest.mark.parametrize(
    ("strength", "calls"), [(1.0, 50), (0.75, 38), (0.5, 25), (0.25, 12), (0.02, 1), (1e-9, 1)]
)
def test_part_of_the_schedule(strength, calls):
    pairs = make_request([0], steps=50).sampler.pairs
    assert last_part(pairs, strength) == pairs[50 - calls :]
    assert last_part(pairs, strength)[0] == (20 * (calls - 1), 20 * (calls - 1) - 20 if calls > 1 else -1)


def test_full_strength_on_nothing_is_plain_sampling_from_scaled_noise(request_):
    request = changed(request_, image=torch.zeros_like(request_.image))
    image, notes = synthesize(SDEdit([1.0]), request)
    alpha = request.sampler.terminal_alpha
    expected = request.sampler.sample(math.sqrt(1 - alpha) * request.noise.draw(), request.condition)
    assert torch.allclose(image, expected, atol=1e-6)
    assert notes["strength"].tolist() == [1.0] * N
    assert set(notes) == {"strength"}


def test_half_strength_by_the_formula(request_):
    """Two of four steps, t = 250 and 0, each by hand."""
    image, _ = synthesize(SDEdit([0.5]), request_)
    backbone = request_.sampler.backbone
    alpha = [*backbone.alphas_cumprod[[250, 0]].tolist(), 1.0]
    x = math.sqrt(alpha[0]) * request_.image + math.sqrt(1 - alpha[0]) * request_.noise.draw()
    for now, then, t in zip(alpha, alpha[1:], (250, 0), strict=False):
        eps = backbone.epsilon(x, torch.full((N,), t), request_.condition)
        x_0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(then) * x_0 + math.sqrt(1 - then) * eps
    assert torch.allclose(image, x.clamp(-1, 1), atol=1e-5)


def test_the_weaker_the_closer_to_the_real_image():
    request = make_request(range(N), steps=50)
    far = [
        (synthesize(SDEdit([strength]), request)[0] - request.image).square().mean().item()
        for strength in (0.02, 0.25, 0.5, 1.0)
    ]
    assert far == sorted(far)
    assert far[0] < 0.002
    assert far[3] > 10 * far[0]


def test_each_sample_has_its_own_strength(request_):
    image, notes = synthesize(SDEdit([0.25, 0.5, 1.0]), request_)
    assert len(notes["strength"].unique()) > 1
    for i, strength in enumerate(notes["strength"].tolist()):
        alone, _ = synthesize(SDEdit([strength]), make_request([i], segmenter=request_.anchor))
        assert torch.allclose(image[i], alone[0], atol=1e-6)


def test_strengths_are_drawn_uniformly():
    drawn = synthesize(DAFusion(), many())[1]["strength"]
    for strength in (0.25, 0.5, 0.75, 1.0):
        assert abs((drawn == strength).sum().item() - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_mixup_of_result_and_real_image(request_):
    image, notes = synthesize(DAFusion(), request_)
    made, _ = synthesize(DAFusion(mixup=0.0), request_)
    share = notes["mixup"].view(-1, 1, 1, 1)
    assert torch.allclose(image, share * made + (1 - share) * request_.image, atol=1e-6)
    low, high = torch.minimum(made, request_.image), torch.maximum(made, request_.image)
    assert ((image >= low - 1e-6) & (image <= high + 1e-6)).all()


def test_mixing_weights_follow_beta():
    """Beta(½, ½): mean ½, variance ⅛, in [0, 1]."""
    weight = synthesize(DAFusion([0.1]), many())[1]["mixup"]
    assert 0 <= weight.min() < 0.01
    assert 0.99 < weight.max() <= 1
    assert weight.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(0.125 / 400))
    assert weight.var().item() == pytest.approx(0.125, abs=0.02)


# DiffAug


def test_diffaug_is_the_posterior_mean(request_):
    """E[x_0 | x_t] of N(μ, s²) is μ + √ᾱ s² (x_t − √ᾱ μ) / (ᾱ s² + 1 − ᾱ)."""
    image, notes = synthesize(DiffAug(), request_)
    base, _ = synthesize(Base(), request_)
    alpha = request_.sampler.backbone.alphas_cumprod[notes["t"]].view(-1, 1, 1, 1)
    x_t = alpha.sqrt() * base + (1 - alpha).sqrt() * request_.noise.draw(NOISE)
    mean = request_.condition["mean"]
    gain = alpha.sqrt() * SPREAD**2 / (alpha * SPREAD**2 + 1 - alpha)
    assert torch.allclose(image, (mean + gain * (x_t - alpha.sqrt() * mean)).clamp(-1, 1), atol=1e-5)
    assert len(notes["t"].unique()) > 1


def test_diffaug_at_small_t_is_nearly_base(request_):
    """At t = 0 the noise added is √(1 − ᾱ_0) = 0.03."""
    image, notes = synthesize(DiffAug(1.0, 1e6), request_)
    base, _ = synthesize(Base(), request_)
    assert notes["t"].tolist() == [0] * N
    assert (image - base).std() < 0.03
    late, _ = synthesize(DiffAug(1e6, 1.0), request_)  # and at t = T − 1 hardly more than μ is known
    assert (late - request_.condition["mean"]).std() < 0.01
    assert (base - request_.condition["mean"]).std() > 0.05


def test_diffaug_times_follow_beta():
    """Beta(2, 4): mean ⅓, variance 8/252; of 1000 timesteps."""
    t = synthesize(DiffAug(), many())[1]["t"].double()
    assert t.mean().item() == pytest.approx(1000 / 3, abs=5 * 1000 * math.sqrt(8 / 252 / 400))
    assert t.var().item() == pytest.approx(1e6 * 8 / 252, rel=0.3)


# inpainting


@pytest.mark.parametrize("kind", [Gaussian, Latent])
@pytest.mark.parametrize(("dilate", "resample"), [(0, 1), (2, 1), (0, 3)])
def test_the_foreground_is_exactly_the_real_one(kind, dilate, resample):
    request = make_request(range(N), kind())
    image, _ = synthesize(Inpainting(dilate, resample), request)
    keep = foreground(request.mask, dilate).expand_as(image)
    assert torch.equal(image[keep], request.image[keep])
    assert (image[~keep] - request.image[~keep]).abs().mean() > 0.1


def test_in_pixel_space_the_sampler_itself_ends_at_the_real_foreground(request_, monkeypatch):
    backbone, ends = request_.sampler.backbone, []
    monkeypatch.setattr(backbone, "decode", lambda latent: ends.append(latent) or latent)
    image, _ = synthesize(Inpainting(resample=2), request_)
    assert torch.allclose(ends[0], image, atol=1e-6)


@pytest.mark.parametrize("resample", [1, 2, 5])
def test_an_empty_mask_leaves_nothing_of_the_real_image(resample):
    """Without jumps it is plain sampling. With them mean and variance follow from the linear steps:
    DDIM multiplies the distance from √ᾱ μ by c, going back by √r, r = ᾱ_t/ᾱ_s, adding variance 1 − r."""
    backbone, size = Gaussian(), 32
    mask = torch.zeros(N, size, size, dtype=torch.long)
    condition = backbone.condition(mask)
    request = changed(make_request(range(N), backbone, 10, size=size), mask=mask, condition=condition)
    image, _ = synthesize(Inpainting(resample=resample), request)
    assert backbone.calls == 9 * resample + 1
    base, _ = synthesize(Base(), request)
    assert torch.equal(image, base) == (resample == 1)

    alpha = [*backbone.alphas_cumprod[list(range(900, -1, -100))].tolist(), 1.0]
    mean, variance = 0.3 * math.sqrt(alpha[0]), 1.0
    for now, then in itertools.pairwise(alpha):
        total = now * SPREAD**2 + 1 - now
        c = math.sqrt(then * now) * SPREAD**2 / total + math.sqrt((1 - then) * (1 - now)) / total
        for repeat in range(resample if then < 1 else 1):
            if repeat:
                mean, variance = math.sqrt(now / then) * mean, now / then * variance + 1 - now / then
            mean, variance = c * mean, c**2 * variance
    assert image.mean().item() == pytest.approx(mean - 0.3, abs=5 * math.sqrt(variance / image.numel()))
    assert image.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / image.numel()))


def test_dilation():
    mask = torch.zeros(2, 8, 8, dtype=torch.long)
    mask[0, 3, 4], mask[1, 0, 0] = 2, 1
    assert [foreground(mask, d).sum((1, 2, 3)).tolist() for d in (0, 1, 2)] == [[1, 1], [9, 4], [25, 9]]
    assert foreground(mask, 1)[0, 0, 2:5, 3:6].all()


def test_the_latent_keeps_what_lies_under_the_mask(monkeypatch):
    """A latent pixel is held where the image's mask is set at its place; it ends at the encoded image."""
    request = make_request(range(N), Latent())
    ends = []
    monkeypatch.setattr(
        Latent,
        "decode",
        lambda self, latent: ends.append(latent) or latent.repeat_interleave(2, 2).repeat_interleave(2, 3),
    )
    synthesize(Inpainting(), request)
    held = (discs(range(N))[:, 1::2, 1::2] > 0).unsqueeze(1).expand_as(ends[0])
    real = request.sampler.backbone.encode(request.image)
    assert torch.allclose(ends[0][held], real[held], atol=1e-6)
    assert (ends[0][~held] - real[~held]).abs().mean() > 0.1


# all of them

METHODS = {
    "cig": CIG,
    "sdedit": lambda: SDEdit([0.25, 0.75]),
    "da_fusion": DAFusion,
    "diffaug": DiffAug,
    "inpainting": lambda: Inpainting(dilate=1, resample=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["unet", "exact"])
def test_samples_stand_by_themselves(name, kind):
    backbone = Gaussian() if kind == "exact" else make_backbone(beta_schedule="scaled_linear").freeze()
    check_samples(METHODS[name](), backbone)


def test_names():
    assert [METHODS[name]().name for name in METHODS] == list(METHODS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SDEdit([]), r"strengths \[\]:"),
        (lambda: SDEdit([0.5, 0.0]), "strengths 0.0:"),
        (lambda: SDEdit([1.5]), "strengths 1.5:"),
        (lambda: DAFusion(mixup=-1.0), "mixup -1.0:"),
        (lambda: DiffAug(0.0), "a 0.0:"),
        (lambda: DiffAug(2.0, -4.0), "b -4.0:"),
        (lambda: Inpainting(dilate=-1), "dilate -1:"),
        (lambda: Inpainting(resample=0), "resample 0:"),
    ],
)
def test_arguments_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
