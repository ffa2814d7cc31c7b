import itertools
import math

import pytest
import torch
from toy import check_samples, make_request

from conftest import make_miner
from errors import InputError
from methods import Base, SeedScorer
from methods.best_of import BestOfN
from networks import Scorer
from objectives.nativeness import best_of_n_kl
from objectives.rewards import REWARDS


class Perfect(Scorer):
    """Knows the finished sample's reward, with the sign and the request that it is given."""

    def __init__(self, request, sign=1):
        super().__init__(inputs="noise")
        self.request, self.sign = request, sign

    def predict(self, response, mask):
        image = self.request.sampler.sample(response, self.request.condition)
        return self.sign * REWARDS["bounded_ce"](self.request.anchor(image), mask)


class Random(Scorer):
    """Says something that has nothing to do with the sample."""

    def __init__(self):
        super().__init__(inputs="noise")
        self.generator = torch.Generator().manual_seed(0)

    def predict(self, response, mask):
        return torch.rand(len(response), generator=self.generator)


def rewards(method, request):
    with torch.no_grad():
        return request.reward(method.synthesize(request)[0], "bounded_ce")


def synthesize(method, request):
    with torch.no_grad():
        return method.synthesize(request)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_perfect_scorer_is_best_of_n(n):
    request = make_request(range(6))
    image, notes = synthesize(SeedScorer(Perfect(request), n), request)
    expected, found = synthesize(BestOfN(n), request)
    assert torch.equal(notes["proposal"], found["proposal"])
    assert torch.allclose(image, expected, atol=1e-6)
    assert notes["predicted"].tolist() == pytest.approx(
        request.reward(expected, "bounded_ce").tolist(), rel=1e-4
    )


def test_a_random_scorer_is_base():
    """Over 400 samples the mean reward is base's to a standard error or three; a perfect one's is not."""
    request = make_request(range(400), steps=2)
    base = rewards(Base(), request)
    error = base.std() / math.sqrt(len(base))
    assert (rewards(SeedScorer(Random(), 4), request).mean() - base.mean()).abs() < 3 * math.sqrt(2) * error
    assert rewards(SeedScorer(Perfect(request), 4), request).mean() > base.mean() + 6 * error
    assert rewards(SeedScorer(Perfect(request, -1), 4), request).mean() < base.mean() - 6 * error


def test_quantiles_go_from_the_easiest_to_the_hardest():
    request = make_request(range(6))
    values = [rewards(SeedScorer(Perfect(request), 5, q), request) for q in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all((high >= low).all() for low, high in itertools.pairwise(values))
    assert (values[-1] > values[0]).all()


def test_kl_of_selection_is_that_of_the_maximum_of_uniforms():
    """The best of N has the density N·uᴺ⁻¹ over the rank u of a draw."""
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 6, 32):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(
            (density * density.log().nan_to_num()).mean().item(), abs=1e-3
        )


def test_costs_n_calls_beside_those_of_the_sampler():
    request = make_request(range(3), steps=4)
    synthesize(SeedScorer(Scorer(), 5), request)
    assert request.sampler.calls == 3 * (5 + 4)


def test_an_untrained_miner_changes_no_proposal():
    request, scorer = make_request(range(4)), Scorer(inputs="score")
    plain, notes = synthesize(SeedScorer(scorer, 4), request)
    shifted, noted = synthesize(SeedScorer(scorer, 4, miner=make_miner().eval()), request)
    assert torch.allclose(plain, shifted, atol=1e-6)
    assert torch.allclose(notes["kl"], noted["kl"])
    moved, noted = synthesize(SeedScorer(scorer, 4, miner=make_miner(trained=True).eval()), request)
    assert not torch.allclose(plain, moved, atol=1e-2)
    assert (noted["kl"] > notes["kl"]).all()
    assert not torch.allclose(norms(noted["x_T"]), norms(drawn(noted, request)), rtol=1e-3)
    kept = SeedScorer(scorer, 4, miner=make_miner(trained=True).eval(), keep_norm=True)
    _, noted = synthesize(kept, request)
    assert torch.allclose(norms(noted["x_T"]), norms(drawn(noted, request)), rtol=1e-5)


def norms(x):
    return x.flatten(1).norm(dim=1)


def drawn(notes, request):
    """Return the draw that each chosen proposal was shifted from."""
    draws = torch.stack([request.proposal(k) for k in range(4)])
    return draws[notes["proposal"], torch.arange(len(notes["proposal"]))]


@pytest.mark.parametrize("inputs", ["estimate", "score", "glance", "noise"])
def test_samples(inputs):
    torch.manual_seed(0)
    check_samples(SeedScorer(Scorer(inputs=inputs, width=8).eval(), 3), None)


@pytest.mark.parametrize(("arguments", "message"), [({"n": 0}, "n 0"), ({"quantile": 1.5}, "quantile 1.5")])
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SeedScorer(Scorer(), **arguments)
