"""The options that keep a miner native; the paper's own setting is tested beside the other stages."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import make_miner, make_segmenter, make_trainer
from datamodules import ConditionDataModule
from errors import InputError
from lightning_modules import MinerLitModule, SynthesisLitModule
from methods import Mined
from methods.best_of import BestOfN
from methods.method import PROBE
from networks import Scorer
from networks.miner import Miner
from networks.pretrained import save_pretrained
from objectives.rewards import bounded_ce


def mining(folders, **changes):
    settings = {"miner": make_miner(trained=True), "steps": 3, "truncate": 2, "kappa_up": 10.0}
    settings["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-3)
    return MinerLitModule(folders.backbone, folders.segmenter, **settings | changes)


@pytest.fixture
def batch(source):
    samples = [source.dataset("train")[i] for i in range(3)]
    pair = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "mask")}
    return pair | {"index": torch.tensor([0, 5, 9]), "source_mask": ["a", "b", "c"]}


@pytest.fixture
def folders(tmp_path):
    """Folders of a reference segmenter, a scorer and another miner."""
    torch.manual_seed(3)
    networks = {
        "reference": make_segmenter(seed=5).eval(),
        "scorer": Scorer(width=8, members=2).eval(),
        "other": make_miner(seed=8, trained=True).eval(),
    }
    for name, network in networks.items():
        save_pretrained(network, tmp_path / name, {})
    return {name: str(tmp_path / name) for name in networks}


def objective(module, batch):
    return -module.training_step(batch, 0)


def gradient(module, value):
    module.miner.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in module.miner.parameters()])


def parts(module, batch):
    """The request of mining, and what the miner proposes for it."""
    request = module.request(batch, 2**32)
    with torch.no_grad():
        x_T, eps, shifted = module.method.shift(request)
    return request, x_T, eps, shifted


def test_budget_is_spent(weights, source, tmp_path):
    for start in (1e-4, 1e-2):
        module = mining(weights, miner=make_miner(), kl_budget=3.0, beta=start, noise="paired")
        spent = []
        module.log_dict = lambda values, spent=spent, **_: spent.append(float(values["miner/kl"]))
        data = ConditionDataModule(source, batch_size=6, steps_per_epoch=20)
        make_trainer(tmp_path, max_steps=300).fit(module, data)
        assert sum(spent[-50:]) / 50 == pytest.approx(3.0, rel=0.35)
        assert module.own_state()["log_beta"] != math.log(start)


def test_kept_norm_is_that_of_the_draw(weights, batch):
    module = mining(weights, keep_norm=True, noise="paired")
    _, x_T, eps, shifted = parts(module, batch)
    assert torch.allclose(x_T.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1), rtol=1e-5)
    assert torch.allclose(
        F.cosine_similarity(x_T.flatten(1), shifted.rsample(eps).flatten(1)), torch.ones(3), atol=1e-5
    )


def test_a_miner_may_read_estimate_and_mask(weights, batch):
    miner = make_miner(trained=True, inputs="estimate", num_classes=2, variance_bound=0.0)
    module = mining(weights, miner=miner)
    request, _, _, shifted = parts(module, batch)
    assert torch.equal(shifted.variance, torch.ones_like(shifted.variance))
    probe = request.noise.draw(0)
    alpha = module.backbone.alphas_cumprod[module.sampler.pairs[0][0]]
    with torch.no_grad():
        epsilon = module.sampler.epsilon(probe, module.sampler.pairs[0][0], request.condition)
        estimate = ((probe - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-3, 3)
        expected = miner(estimate, batch["mask"]).mean
        other = miner(estimate, 1 - batch["mask"]).mean
    assert torch.allclose(shifted.mean, expected, atol=1e-5)
    assert not torch.allclose(shifted.mean, other, atol=1e-3)
    assert gradient(module, objective(module, batch)).abs().sum() > 0


@pytest.mark.parametrize("transform", ["none", "log"])
def test_reducible_reward_takes_the_reference_off(weights, folders, batch, transform):
    module = mining(weights, reference=folders["reference"], reducible=0.7, transform=transform, beta=0.0)
    request, x_T, _, _ = parts(module, batch)
    image = module.sampler.rollout(x_T, request.condition, 2).clamp(-1, 1)
    losses = [bounded_ce(f(image), batch["mask"]) for f in (module.anchor, make_segmenter(seed=5).eval())]
    hard, learnt = losses if transform == "none" else [(loss + 1e-3).log() for loss in losses]
    assert objective(module, batch).item() == pytest.approx((hard - 0.7 * learnt).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("inputs", "calls"), [("estimate", 2), ("score", 2), ("glance", 2), ("noise", 0)])
def test_climbing_a_scorer_has_its_gradient_at_one_call(weights, batch, tmp_path, inputs, calls):
    torch.manual_seed(3)
    save_pretrained(Scorer(width=8, members=2, inputs=inputs).eval(), tmp_path / "scorer", {})
    module = mining(weights, scorer=str(tmp_path / "scorer"), beta=0.0, noise="paired")
    before = module.sampler.calls
    ours = gradient(module, objective(module, batch))
    assert module.sampler.calls - before == 3 * (1 + calls)  # probe; response, and again in the backward pass
    request = module.request(batch, 2**32)
    x_T, _, _ = module.method.shift(request)
    response = module.sampler.response(x_T, request.condition, module.scorer)
    expected = gradient(module, module.scorer.predict(response, batch["mask"]).mean())
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 0


def test_a_network_reads_glances_where_it_has_learnt_to(weights, batch, tmp_path):
    """In synthesis too, where nobody says so again."""
    settings = {"channels": 3, "base_width": 8, "multipliers": (1, 2), "head_width": 8, "inputs": "glance"}
    module = mining(weights, signal=0.3, miner=Miner(**settings), noise="paired")
    save_pretrained(module.miner, tmp_path / "miner", {})
    assert mining(weights, signal=0.3, miner=Miner(**settings), weights=str(tmp_path / "miner")).started
    method = Mined(str(tmp_path / "miner"), noise="paired")
    request = SynthesisLitModule(weights.backbone, weights.segmenter, method, steps=4).request(batch)
    x_T = request.noise.draw(PROBE)
    response = request.sampler.response(x_T, request.condition, method.miner)
    expected = request.sampler.glance(x_T, request.condition, 1, signal=0.3).clamp(-3, 3)
    assert torch.equal(response, expected)
    assert not torch.equal(response, request.sampler.glance(x_T, request.condition, 1).clamp(-3, 3))


def test_elites_are_learnt_by_likelihood(weights, batch):
    module = mining(weights, elites=4, beta=0.0)
    value = objective(module, batch)
    request, _, _, shifted = parts(module, batch)
    draws = torch.stack([request.proposal(2 + k) for k in range(4)])
    rewards = torch.stack(
        [
            module.reward(module.sampler.rollout(x, request.condition, 2).clamp(-1, 1), batch["mask"])
            for x in draws
        ]
    )
    hardest = draws[rewards.argmax(0), torch.arange(3)]
    normal = torch.distributions.Normal(shifted.mean, shifted.variance.sqrt())
    expected = normal.log_prob(hardest).mean((1, 2, 3)).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert gradient(module, objective(module, batch)).norm() > 0


def test_score_function_needs_no_gradient_of_anything_frozen(weights, batch):
    module = mining(weights, gradient="score_function", beta=0.0)
    ours = gradient(module, objective(module, batch))
    request = module.request(batch, 2**32)
    _, eps, shifted = module.method.shift(request)
    with torch.no_grad():
        draws = [shifted.mean + shifted.variance.sqrt() * draw for draw in (eps, -eps)]
        images = [module.sampler.rollout(x, request.condition, 2).clamp(-1, 1) for x in draws]
        rewards = [module.reward(image, batch["mask"]) for image in images]
    normal = torch.distributions.Normal(shifted.mean, shifted.variance.sqrt())
    surrogate = torch.zeros(3)
    for i in range(3):
        others = [r[j] for r in rewards for j in range(3) if j != i]
        for x, reward in zip(draws, rewards, strict=True):
            log_prob = normal.log_prob(x)[i].sum()
            surrogate[i] = surrogate[i] + 0.5 * (reward[i] - sum(others) / 4) * log_prob
    expected = gradient(module, surrogate.mean())
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_others_are_kept_away_from(weights, folders, source, tmp_path):
    alone, apart = (
        mining(weights, others=others, diversity=10.0, beta=0.0, noise="paired")
        for others in ((), (folders["other"],))
    )
    shares = {}
    for name, module in (("alone", alone), ("apart", apart)):
        data = ConditionDataModule(source, batch_size=6, steps_per_epoch=20)
        module.method.miner.load_state_dict(make_miner(seed=8, trained=True).state_dict())
        make_trainer(tmp_path / name, max_steps=40).fit(module, data)
        batch = next(iter(data.train_dataloader()))
        _, _, _, shifted = parts(module, batch)
        request = module.request(batch, 2**32)
        other = Mined(folders["other"], "paired").shift(request)[2]
        shares[name] = F.cosine_similarity(shifted.mean.flatten(1), other.mean.flatten(1)).abs().mean().item()
    assert shares["apart"] < 0.3 * shares["alone"]


def test_checkpoints_hold_the_miner_alone_whatever_the_options(weights, folders):
    module = mining(
        weights, reference=folders["reference"], scorer=folders["scorer"], others=[folders["other"]]
    )
    assert set(module.own_state()) == {"log_beta", *(f"method.miner.{n}" for n in module.miner.state_dict())}
    frozen = [module.backbone, module.anchor, module.reference, module.scorer, *module.others]
    module.train()
    assert not any(network.training for network in frozen)
    assert not any(p.requires_grad for network in frozen for p in network.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_budget": -1.0}, "model.kl_budget -1"),
        ({"beta": -0.1}, "model.beta -0.1"),
        ({"kl_budget": 2.0, "beta": 0.0}, "model.beta 0"),
        ({"elites": 1}, "model.elites 1"),
        ({"miner": make_miner(num_classes=5)}, "masks of 5 classes"),
        ({"reference": "nowhere"}, "nowhere"),
        ({"gradient": "score_function", "noise": "paired"}, "score_function needs model.noise fresh"),
    ],
)
def test_bad_options(weights, settings, message):
    with pytest.raises(InputError, match=message):
        mining(weights, **settings)


def test_elites_and_scorer_exclude_each_other(weights, folders):
    with pytest.raises(InputError, match="choose one"):
        mining(weights, scorer=folders["scorer"], elites=3)


def test_best_of_n_notes_its_kl(weights, batch):
    module = mining(weights)
    with torch.no_grad():
        _, notes = BestOfN(4).synthesize(module.request(batch))
    assert notes["kl"].tolist() == pytest.approx([math.log(4) - 0.75] * 3)


@pytest.mark.parametrize("gradient_mode", ["stop", "full"])
def test_a_glance_takes_the_rollouts_place(weights, batch, gradient_mode):
    module = mining(weights, glance=2, gradient=gradient_mode, beta=0.0)
    request = module.request(batch, 2**32)
    x_T, _, _ = module.method.shift(request)
    image = module.sampler.glance(x_T, request.condition, 2, gradient_mode).clamp(-1, 1)
    expected = bounded_ce(module.anchor(image), batch["mask"]).mean()
    found = objective(module, batch)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(gradient(module, found), gradient(module, expected), rtol=1e-3, atol=1e-6)
    rolled = objective(mining(weights, gradient=gradient_mode, beta=0.0), batch)
    assert not torch.allclose(found, rolled, rtol=1e-3)


def test_a_glance_without_calls_is_refused(weights):
    with pytest.raises(InputError, match="glance -1"):
        mining(weights, glance=-1)
