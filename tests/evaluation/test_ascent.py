import json

import pytest
import torch

from datamodules.sources.synthetic import SyntheticSet
from diffusion.backbones import Backbone
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from errors import InputError
from evaluation import ascent as module
from evaluation.ascent import RANDOM, ascent, main
from methods.method import PROBE
from networks.pretrained import load_pretrained
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS


@pytest.fixture
def two_calls(monkeypatch):
    """What is climbed, on a schedule of two steps: its names are those of the command."""
    looks = {name: (kind, 2, mode) for name, (kind, _, mode) in module.LOOKS.items()}
    monkeypatch.setattr(module, "LOOKS", looks)
    return list(looks)


def test_gradients_and_steps_are_those_of_the_sampler(plain_samples, weights, two_calls):
    plain = SyntheticSet(plain_samples)
    anchor = load_pretrained(weights.segmenter, Segmenter).freeze()
    sampler = Sampler(load_pretrained(weights.backbone, Backbone).freeze(), 2)
    rows = {row["direction"]: row for row in ascent(plain, sampler, anchor, nats=(0.0, 8.0))}
    assert list(rows) == [*two_calls, RANDOM]
    stop, true, glance = (rows[name] for name in two_calls)
    assert true["cosine"] == pytest.approx(1, abs=1e-5)
    assert glance["cosine"] == pytest.approx(1, abs=1e-5)
    for row in rows.values():
        assert abs(row["rise"]["0"]) < 2e-3  # samples are kept with 8 bits

    samples = [plain[i] for i in range(len(plain))]
    mask = torch.stack([sample["mask"] for sample in samples])
    shape = sampler.backbone.noise_shape((mask.shape[-2], mask.shape[-1]))
    stream = NoiseStream(plain.entries[0]["seed"], [e["index"] for e in plain.entries], shape, mask.device)
    x_T = stream.draw(PROBE).requires_grad_()
    condition = sampler.backbone.condition(mask)
    norms = {}
    for mode in ("stop", "full"):
        image = sampler.backbone.decode(sampler.rollout(x_T, condition, 2, mode)).clamp(-1, 1)
        reward = REWARDS["bounded_ce"](anchor(image), mask)
        (gradient,) = torch.autograd.grad(reward.sum(), x_T)
        norms[mode] = gradient.flatten(1).norm(dim=1).median().item()
    assert stop["norm"] == pytest.approx(norms["stop"], rel=1e-4)
    assert true["norm"] == pytest.approx(norms["full"], rel=1e-4)
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    before, after = (
        REWARDS["bounded_ce"](anchor(sampler.sample(x.detach(), condition)), mask).mean()
        for x in (x_T, x_T + 4 * unit)
    )
    assert true["rise"]["8"] == pytest.approx((after - before).item(), abs=2e-3)


def test_command(plain_samples, weights, two_calls, tmp_path, capsys):
    arguments = {"set": plain_samples, "backbone": weights.backbone, "anchor": weights.segmenter, "steps": 2}
    output = tmp_path / "ascent.json"
    main([f"--{key}={value}" for key, value in (arguments | {"output": output}).items()])
    figures = json.loads(output.read_text())
    assert figures["amplification"] == pytest.approx(
        Sampler(load_pretrained(weights.backbone, Backbone).freeze(), 2).terminal_alpha ** -0.5
    )
    assert [row["direction"] for row in figures["rows"]] == [*two_calls, RANDOM]
    printed = capsys.readouterr().out
    assert "temporal stop-gradient: ‖∇‖" in printed
    assert "random direction: rise of bounded_ce: 2 nats" in printed


def test_a_schedule_that_is_shorter_than_the_rollout(plain_samples, weights, tmp_path):
    arguments = {"set": plain_samples, "backbone": weights.backbone, "anchor": weights.segmenter, "steps": 3}
    with pytest.raises(InputError, match=r"--steps 3: must be at least 10"):
        main([f"--{key}={value}" for key, value in (arguments | {"output": tmp_path / "a.json"}).items()])
    assert not list(tmp_path.iterdir())
