import copy
import json
import math

import pytest
import torch
from torch import nn
from toy import (
    Gaussian,
    anchor,
    check_samples,
    discs,
    make_request,
    pictures,
    preparation,
)

from callbacks import SynthesisCallback
from conftest import make_backbone, make_segmenter, make_trainer
from datamodules import ConditionDataModule
from diffusion.noise import NoiseStream
from errors import InputError
from lightning_modules import SynthesisLitModule
from methods import Base, Method
from methods.best_of import BestOfN, preference
from methods.gal import GAL
from methods.hat import Hat
from methods.mixture import Mixture
from methods.sdedit import SDEdit
from objectives.gradients import cosine, last_parameters, parameter_gradient
from objectives.nativeness import best_of_n_kl
from objectives.rewards import REWARDS, ce

N = 6


@pytest.fixture
def request_():
    return make_request(range(N))


def proposals(request, count, name="bounded_ce"):
    """Images (count, B, …) of the first proposals and their rewards (count, B)."""
    images = torch.stack(
        [request.sampler.sample(request.proposal(k), request.condition) for k in range(count)]
    )
    with torch.no_grad():
        return images, torch.stack([request.reward(image, name) for image in images])


def pick(images, which):
    return images[which, torch.arange(images.shape[1])]


def synthesize(method, request):
    with torch.no_grad():
        return method.synthesize(request)


# best of N


@pytest.mark.parametrize("name", ["bounded_ce", "dice"])
def test_best_of_n_is_the_hardest_proposal_and_never_easier_than_base(request_, name):
    image, notes = synthesize(BestOfN(5, reward=name), request_)
    images, rewards = proposals(request_, 5, name)
    assert torch.equal(image, pick(images, rewards.argmax(0)))
    assert torch.equal(notes["proposal"], rewards.argmax(0))
    assert torch.allclose(notes["proposals_mean"], rewards.mean(0))
    value = request_.reward(image, name)
    assert torch.equal(value, rewards.max(0).values)
    base = request_.reward(synthesize(Base(), request_)[0], name)
    assert torch.equal(base, rewards[0])
    assert (value >= base).all()
    assert (value > base).any()


@pytest.mark.parametrize("by", ["sample", "estimate", "glance"])
def test_best_of_one_is_base(request_, by):
    image, notes = synthesize(BestOfN(1, by=by, truncate=2), request_)
    assert torch.equal(image, synthesize(Base(), request_)[0])
    assert notes["proposal"].tolist() == [0] * N


@pytest.mark.parametrize("by", ["estimate", "glance"])
def test_best_by_a_look_ahead_samples_only_the_chosen_one(by):
    backbone = Gaussian()
    request = make_request(range(N), backbone)
    image, notes = synthesize(BestOfN(3, by=by, truncate=2, calls=2), request)
    assert backbone.calls == 3 * 2 + 4
    noise = torch.stack([request.proposal(k) for k in range(3)])
    look = request.sampler.rollout if by == "estimate" else request.sampler.glance
    estimates = [look(x_T, request.condition, 2).clamp(-1, 1) for x_T in noise]
    rewards = torch.stack([request.reward(estimate, "bounded_ce") for estimate in estimates])
    assert torch.equal(notes["proposal"], rewards.argmax(0))
    assert len(notes["proposal"].unique()) > 1
    expected = request.sampler.sample(pick(noise, rewards.argmax(0)), request.condition)
    assert torch.equal(image, expected)


def test_a_reference_bars_what_it_has_not_learnt_either(request_):
    images, rewards = proposals(request_, 4)
    reference = make_segmenter(seed=7).freeze()
    learnt = torch.stack([REWARDS["bounded_ce"](reference(image), request_.mask) for image in images])
    for transform, weight in (("none", 1.0), ("none", 0.5), ("log", 1.0)):
        method = BestOfN(4, reference=reference, reducible=weight, transform=transform)
        _, notes = synthesize(method, request_)
        score = (
            rewards - weight * learnt
            if transform == "none"
            else (rewards + 1e-3).log() - (learnt + 1e-3).log()
        )
        assert torch.equal(notes["proposal"], score.argmax(0))
    assert method.fingerprints() == {"reference": reference.fingerprint()}
    same = BestOfN(4, reference=request_.anchor, reducible=1.0)  # nothing is reducible: ties go to the first
    assert synthesize(same, request_)[1]["proposal"].tolist() == [0] * N


def test_of_those_that_the_reference_trusts_the_hardest_is_taken(request_):
    images, rewards = proposals(request_, 5)
    reference = make_segmenter(seed=7).freeze()
    learnt = torch.stack([REWARDS["bounded_ce"](reference(image), request_.mask) for image in images])
    image, notes = synthesize(BestOfN(5, reference=reference, trusted=0.4, reducible=0.0), request_)
    for i in range(N):
        first, second = learnt[:, i].argsort().tolist()[:2]
        expected = first if rewards[first, i] > rewards[second, i] else second
        assert notes["proposal"][i] == expected
    assert torch.equal(image, pick(images, notes["proposal"]))
    assert not torch.equal(notes["proposal"], rewards.argmax(0))
    ratio = (rewards + 1e-3) / (learnt + 1e-3)
    _, notes = synthesize(BestOfN(5, reference=reference, trusted=0.4), request_)
    among = torch.where(learnt <= learnt.sort(0).values[1], ratio, -1)
    assert torch.equal(notes["proposal"], among.argmax(0))
    _, notes = synthesize(BestOfN(5, reference=reference, trusted=0.01), request_)
    assert torch.equal(notes["proposal"], learnt.argmin(0))


def test_cap_bars_what_is_too_hard(request_):
    images, rewards = proposals(request_, 4)
    cap = float(rewards.flatten().sort().values[len(rewards.flatten()) // 2])
    image, notes = synthesize(BestOfN(4, cap=cap), request_)
    for i in range(N):
        column = rewards[:, i]
        eligible = column[column <= cap]
        expected = eligible.max() if len(eligible) else column.min()
        assert column[notes["proposal"][i]] == expected
    assert torch.equal(image, pick(images, notes["proposal"]))
    _, notes = synthesize(BestOfN(4, cap=0.0), request_)
    assert torch.equal(notes["proposal"], rewards.argmin(0))
    order = preference(torch.tensor([0.1, 0.5, 0.6, 0.9]), 0.5).argsort(descending=True)
    assert order.tolist() == [1, 0, 2, 3]


def test_ties_go_to_the_first_proposal():
    flat = anchor()
    for parameter in flat.parameters():
        parameter.zero_()
    request = make_request(range(N), segmenter=flat)
    image, notes = synthesize(BestOfN(3), request)
    assert notes["proposal"].tolist() == [0] * N
    assert notes["proposals_mean"].tolist() == pytest.approx([0.5] * N, abs=1e-6)  # 1 − exp(−ln 2)
    assert torch.equal(image, synthesize(Base(), request)[0])


def test_an_estimate_beyond_the_schedule(request_):
    with pytest.raises(InputError, match=r"truncate 10: .*4 steps"):
        synthesize(BestOfN(2, by="estimate"), request_)


# gradients


@pytest.mark.parametrize("names", [None, "last"])
def test_gradient_is_that_of_a_trainable_copy(names):
    frozen = anchor()
    image, mask = pictures(range(3)), discs(range(3))
    names = last_parameters(frozen) if names else None
    with torch.no_grad():
        ours = parameter_gradient(frozen, image, mask, ce, names)
        apart = [parameter_gradient(frozen, image[i : i + 1], mask[i : i + 1], ce, names) for i in range(3)]
    twin = copy.deepcopy(frozen).requires_grad_(True)
    ce(twin(image), mask).mean().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in twin.named_parameters()}
    expected = torch.cat([gradients[name].flatten() for name in names or gradients])
    assert expected.norm() > 0.01
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(torch.stack(apart).mean(0), expected, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())
    assert not ours.requires_grad


def test_gradients_under_mixed_precision_are_those_without():
    network, image, mask = anchor(), pictures([0]).bfloat16(), discs([0])  # as a VAE decodes them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = parameter_gradient(network, image, mask, ce)
    assert torch.equal(mixed, parameter_gradient(network, image.float(), mask, ce))


def test_gradient_of_a_linear_network_in_closed_form():
    """Softmax regression in each pixel: ∂ℓ/∂W = mean of (p − onehot(y)) xᵀ."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 1, bias=False)
    image, mask = pictures([0]), discs([0])
    with torch.no_grad():
        p = network(image).softmax(1)[0].flatten(1)
        target = nn.functional.one_hot(mask[0], 2).permute(2, 0, 1).flatten(1)
        expected = (p - target) @ image[0].flatten(1).T / p.shape[1]
    assert torch.allclose(parameter_gradient(network, image, mask, ce), expected.flatten(), atol=1e-6)


def test_the_last_module_of_nnunet_is_its_finest_output_layer():
    assert last_parameters(anchor()) == [
        f"network.decoder.seg_layers.2.{kind}" for kind in ("weight", "bias")
    ]


def test_cosine():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert cosine(a, b).item() == pytest.approx(math.sqrt(0.5))
    assert cosine(1e-20 * a, 1e-20 * b).item() == pytest.approx(math.sqrt(0.5))
    assert cosine(a, -3 * a).item() == -1
    assert cosine(a, torch.zeros(2)).item() == 0


def test_no_gradient_in_inference_mode():
    with torch.inference_mode(), pytest.raises(InputError, match=r"trainer\.inference_mode=false"):
        GAL().prepare(preparation())


# GAL


def gradients(request, image):
    """The gradient of each sample, by autograd on a copy."""
    found = []
    for i in range(len(image)):
        twin = copy.deepcopy(request.anchor).requires_grad_(True)
        ce(twin(image[i : i + 1]), request.mask[i : i + 1]).mean().backward()
        parameters = list(twin.parameters())
        found.append(torch.cat([(0 * p if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(found).detach()


def prepared_gal(request, **settings):
    gal = GAL(**settings)
    gal.prepare(preparation(request.anchor))
    return gal


def similarities(gal, request, count):
    images, _ = proposals(request, count)
    found = [gradients(request, image) for image in images]
    return images, torch.stack([nn.functional.cosine_similarity(gal.bank[None], g) for g in found])


def test_bank_is_a_moving_average_over_the_real_batches(request_):
    gal = prepared_gal(request_, momentum=0.25, batch_size=2)
    real = make_request(range(5), segmenter=request_.anchor)
    g = gradients(real, real.image)
    first, second, third = g[:2].mean(0), g[2:4].mean(0), g[4]
    expected = 0.25 * (0.25 * first + 0.75 * second) + 0.75 * third
    assert torch.allclose(gal.bank, expected, rtol=1e-4, atol=1e-6)


def test_gal_accepts_every_draw_at_threshold_minus_one(request_):
    gal = prepared_gal(request_, threshold=-1.0)
    image, notes = synthesize(gal, request_)
    images, similar = similarities(gal, request_, 1)
    assert torch.equal(image, images[0])
    assert notes["tries"].tolist() == [0] * N
    assert torch.allclose(notes["cosine"], similar[0], atol=1e-4)


def test_gal_takes_the_highest_cosine_if_none_is_accepted(request_):
    gal = prepared_gal(request_, threshold=1.0, tries=3)
    image, notes = synthesize(gal, request_)
    images, similar = similarities(gal, request_, 4)
    assert torch.equal(image, pick(images, similar.argmax(0)))
    assert len(similar.argmax(0).unique()) > 1
    assert notes["tries"].tolist() == [3] * N
    assert torch.allclose(notes["cosine"], similar.max(0).values, atol=1e-4)


def test_gal_takes_the_first_draw_that_reaches_the_threshold(request_):
    images, similar = similarities(prepared_gal(request_), request_, 4)
    ordered = similar.flatten().sort().values
    threshold = float(ordered[14:16].mean())  # of 24: apart from every cosine
    image, notes = synthesize(prepared_gal(request_, threshold=threshold, tries=3), request_)
    reached = similar >= threshold
    expected = torch.where(reached.any(0), reached.float().argmax(0), similar.argmax(0))
    assert torch.equal(image, pick(images, expected))
    assert torch.equal(notes["tries"], torch.where(reached.any(0), expected, 3))
    assert len(notes["tries"].unique()) > 1


def test_gal_in_the_last_layer_alone(request_):
    everything, last = (prepared_gal(request_, parameters=which) for which in ("all", "last"))
    assert torch.allclose(last.bank, everything.bank[-len(last.bank) :], rtol=1e-4, atol=1e-7)
    assert len(last.bank) == 2 * 4 + 2


@pytest.mark.parametrize("method", [GAL(), Hat(Base())])
def test_samples_before_preparation(method, request_):
    with pytest.raises(RuntimeError, match="prepare"):
        synthesize(method, request_)


# the filter


def retries(request, count):
    """Images (count, B, …) and rewards of plain samples under the seeds of the retries."""
    images = []
    for attempt in range(1, count + 1):
        noise = NoiseStream(request.noise.seed + attempt * 2**34, request.noise.indices, request.noise.shape)
        images.append(request.sampler.sample(noise.draw(), request.condition))
    rewards = [request.reward(image, "bounded_ce") for image in images]
    return torch.stack(images), torch.stack(rewards)


def test_threshold_is_the_quantile_of_the_calibration_samples(request_):
    hat = Hat(Base(), quantile=0.7, calibration=10)
    ready = preparation(request_.anchor)
    hat.prepare(ready)
    values = []
    for request in ready.requests(10):
        values += request.reward(synthesize(Base(), request)[0], "bounded_ce").tolist()
    values.sort()
    assert len(values) == 10
    assert hat.threshold == pytest.approx(values[6] + 0.3 * (values[7] - values[6]), rel=1e-5)  # at 0.7 · 9


def test_only_what_is_too_hard_is_made_again(request_):
    plain, rewards = proposals(request_, 1)
    again, values = retries(request_, 2)
    hat = Hat(Base(), tries=2)
    hat.threshold = float(torch.cat([rewards, values]).flatten().sort().values[8:10].mean())  # of 18
    image, notes = synthesize(hat, request_)
    above = rewards[0] > hat.threshold
    assert 0 < above.sum() < N
    assert torch.equal(image[~above], plain[0][~above])
    assert notes["tries"][~above].eq(0).all()
    for i in above.nonzero().flatten().tolist():
        below = [k for k in range(2) if values[k, i] <= hat.threshold]
        kept = below[0] if below else int(values[:, i].argmin())
        assert torch.allclose(image[i], again[kept, i], atol=1e-6)
        assert notes["tries"][i] == (below[0] + 1 if below else 2)


def test_the_easiest_retry_is_kept_even_if_the_first_attempt_was_easier(request_):
    _, rewards = proposals(request_, 1)
    again, values = retries(request_, 3)
    hat = Hat(Base(), tries=3)
    hat.threshold = -1.0
    image, notes = synthesize(hat, request_)
    assert torch.equal(image, pick(again, values.argmin(0)))
    assert notes["tries"].tolist() == [3] * N
    assert (rewards[0] < values.min(0).values).any()


def test_notes_are_those_of_the_attempt_that_is_kept(request_):
    hat = Hat(BestOfN(3), tries=2)
    hat.threshold = -1.0
    _, notes = synthesize(hat, request_)
    found = [synthesize(BestOfN(3), request_.reseeded(attempt)) for attempt in (1, 2)]
    values = torch.stack([request_.reward(image, "bounded_ce") for image, _ in found])
    for key in ("proposal", "proposals_mean"):
        expected = pick(torch.stack([note[key] for _, note in found]), values.argmin(0))
        assert torch.allclose(notes[key].float(), expected.float(), atol=1e-6)
    assert hat.name == "best_of_3_hat"


def test_a_retry_has_other_noise_in_every_stream(request_):
    assert torch.equal(request_.reseeded(0).noise.draw(3), request_.noise.draw(3))
    streams = [request_.reseeded(k).noise.draw(s).flatten() for k in range(4) for s in (0, 1, 1_000_000)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(len(streams[0]))


def test_take(request_):
    request = request_.take(torch.tensor([4, 1]))
    alone = make_request([4, 1], segmenter=request_.anchor)
    for name in ("mask", "image"):
        assert torch.equal(getattr(request, name), getattr(alone, name))
    assert torch.equal(request.condition["mean"], alone.condition["mean"])
    assert torch.equal(request.noise.draw(7), alone.noise.draw(7))


def with_condition(request, condition):
    return type(request)(**{**request.__dict__, "condition": condition})


def test_take_of_nested_conditions(request_):
    rows, nested = (
        torch.tensor([5, 0]),
        (torch.arange(N), [torch.tensor(2.0), {"shared": torch.ones(1, 3)}, None]),
    )
    numbers, (scalar, shared, nothing) = with_condition(request_, nested).take(rows).condition
    assert numbers.tolist() == [5, 0]
    assert (scalar, nothing) == (2.0, None)
    assert torch.equal(shared["shared"], torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"\(12, 3\)"):
        with_condition(request_, torch.ones(2 * N, 3)).take(rows)


# mixtures


class Constant(Method):
    """Grey images of one level."""

    def __init__(self, level, prints=None, **notes):
        super().__init__()
        self.name = f"constant_{level}"
        self.level, self.notes, self.prints = level, notes, prints or {}
        self.prepared = 0

    def prepare(self, preparation):
        self.prepared += 1

    def synthesize(self, request):
        size = len(request.mask)
        notes = {key: torch.full((size,), value) for key, value in self.notes.items()}
        return torch.full((size, 3, 16, 16), self.level), notes

    def fingerprints(self):
        return self.prints


def test_a_mixture_of_one_is_that_method(request_):
    image, notes = synthesize(Mixture([BestOfN(3), Base()], [1.0, 0.0]), request_)
    expected, noted = synthesize(BestOfN(3), request_)
    assert torch.equal(image, expected)
    assert notes["component"].tolist() == [0] * N
    assert torch.equal(notes["proposal"], noted["proposal"].float())


def test_each_sample_is_made_by_its_component(request_):
    methods = [Base(), BestOfN(3), SDEdit()]
    image, notes = synthesize(Mixture(methods, [1.0, 1.0, 1.0]), request_)
    made = torch.stack([synthesize(method, request_)[0] for method in methods])
    assert torch.equal(image, pick(made, notes["component"]))
    assert len(notes["component"].unique()) > 1


def test_proportions():
    n = 3000
    mask = torch.zeros(n, 1, 1, dtype=torch.long)
    request = make_request([0])
    request = type(request)(
        request.sampler, NoiseStream(0, range(n), (1,)), mask, mask, request.anchor, mask[:, None].float()
    )
    image, notes = synthesize(
        Mixture([Constant(0.0), Constant(0.5), Constant(1.0)], [2.0, 1.0, 5.0]), request
    )
    for number, share in enumerate((0.25, 0.125, 0.625)):
        count = (notes["component"] == number).sum().item()
        assert abs(count - share * n) < 5 * math.sqrt(n * share * (1 - share))
        assert (image[notes["component"] == number] == number / 2).all()


def test_notes_that_a_component_lacks(request_):
    mixture = Mixture([Constant(0.0, kl=2.0), Constant(0.5, loss=7.0), Constant(0.9)], [1.0, 1.0, 1.0])
    mixture.prepare(preparation())
    assert [method.prepared for method in mixture.methods] == [1, 1, 1]
    _, notes = synthesize(mixture, request_)
    for component, kl, loss in zip(
        *(notes[key].tolist() for key in ("component", "kl", "loss")), strict=True
    ):
        assert kl == 2.0 if component == 0 else math.isnan(kl)
        assert loss == 7.0 if component == 1 else math.isnan(loss)
    apart = [synthesize(mixture, request_.take(torch.tensor([i])))[1] for i in range(N)]
    assert all(set(one) == {"component", "kl", "loss"} for one in apart)


def test_fingerprints(request_):
    one, two = {"miner": "a", "net": "n"}, {"miner": "b", "net": "n"}
    mixture = Mixture([Constant(0.0, one), Base(), Hat(Constant(0.5, two))], [1.0, 1.0, 1.0])
    assert mixture.fingerprints() == {"0.miner": "a", "2.miner": "b", "net": "n"}
    assert Mixture([Constant(0.0, one), Base()], [1.0, 1.0]).fingerprints() == one


def test_no_mixture_in_a_mixture():
    with pytest.raises(InputError, match="one mixture"):
        Mixture([Base(), Hat(Mixture([Base()], [1.0]))], [1.0, 1.0])


# all of them

METHODS = {
    "best_of": lambda: BestOfN(3),
    "estimate": lambda: BestOfN(3, by="estimate", truncate=2, cap=0.5),
    "glance": lambda: BestOfN(3, by="glance"),
    "gal": lambda: GAL(threshold=0.2, tries=2),
    "hat": lambda: Hat(BestOfN(2), quantile=0.2, tries=2, calibration=6),
    "mixture": lambda: Mixture([Base(), BestOfN(2), SDEdit()], [1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["unet", "exact"])
def test_samples_stand_by_themselves(name, kind):
    backbone = Gaussian() if kind == "exact" else make_backbone(beta_schedule="scaled_linear").freeze()
    check_samples(METHODS[name](), backbone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOfN(0), "n 0:"),
        (lambda: BestOfN(by="eye"), "by 'eye':"),
        (lambda: BestOfN(truncate=0), "truncate 0:"),
        (lambda: BestOfN(reward="hardness"), "reward 'hardness':.*bounded_ce"),
        (lambda: BestOfN(cap=-0.1), "cap -0.1:"),
        (lambda: BestOfN(trusted=0.0), "trusted 0.0:"),
        (lambda: BestOfN(trusted=0.5), r"trusted 0\.5: .*reference"),
        (lambda: GAL(momentum=1.0), "momentum 1.0:"),
        (lambda: GAL(threshold=2.0), "threshold 2.0:"),
        (lambda: GAL(tries=-1), "tries -1:"),
        (lambda: GAL(parameters="first"), "parameters 'first':"),
        (lambda: GAL(batch_size=0), "batch_size 0:"),
        (lambda: Hat(Base(), quantile=95.0), "quantile 95.0:"),
        (lambda: Hat(Base(), tries=0), "tries 0:"),
        (lambda: Hat(Base(), calibration=0), "calibration 0:"),
        (lambda: Hat(Base(), reward="hardness"), "reward 'hardness':"),
        (lambda: Mixture([], []), "weights"),
        (lambda: Mixture([Base()], [0.5, 0.5]), r"weights \[0.5, 0.5\]:"),
        (lambda: Mixture([Base(), Base()], [2.0, -1.0]), r"weights \[2.0, -1.0\]:"),
        (lambda: Mixture([Base()], [0.0]), r"weights \[0.0\]:"),
    ],
)
def test_arguments_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_set_filled_through_the_trainer(weights, source, tmp_path):
    mixture = Mixture([BestOfN(2), Hat(SDEdit(), calibration=4), GAL(tries=1)], [1.0, 1.0, 1.0])
    module = SynthesisLitModule(weights.backbone, weights.segmenter, mixture, steps=3)
    trainer = make_trainer(tmp_path, callbacks=[SynthesisCallback()], inference_mode=False)
    trainer.predict(module, ConditionDataModule(source, budget=2.0, batch_size=4), return_predictions=False)
    lines = (tmp_path / "synthetic" / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    own = {"proposal": {0}, "strength": {1}, "cosine": {2}, "tries": {1, 2}}
    assert {entry["component"] for entry in entries} == {0, 1, 2}
    for entry in entries:
        for key, components in own.items():
            assert (entry[key] is None) == (entry["component"] not in components)
        assert entry["kl"] == (None if entry["proposal"] is None else pytest.approx(best_of_n_kl(2)))
        assert entry["method"] == "mixture"
