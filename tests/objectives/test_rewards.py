import math

import pytest
import torch
import torch.nn.functional as F

from objectives import rewards
from objectives.rewards import REWARDS, clipped, reducible

BOUNDED = ("bounded_ce", "bounded_balanced_ce", "dice")


@pytest.fixture
def mask():
    """Four samples, three classes; the second has no class 2, the third hardly any foreground."""
    mask = torch.zeros(4, 8, 8, dtype=torch.long)
    mask[0, 1:4, 1:6], mask[0, 5:7, 2:7] = 1, 2
    mask[1, 2:6, 2:6] = 1
    mask[2, 0, 0] = 2
    mask[3, :4], mask[3, 4:] = 1, 2
    return mask


@pytest.fixture
def logits():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def right(mask, margin):
    """Logits that favour the true class by a margin, alike in every pixel."""
    return margin * F.one_hot(mask, 3).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("name", REWARDS)
def test_range_and_monotonicity(name, mask):
    margins = [8.0, 4.0, 2.0, 1.0, 0.0, -1.0, -2.0, -4.0]
    values = torch.stack([REWARDS[name](right(mask, margin), mask) for margin in margins])
    assert values.shape == (8, 4)
    assert (values[1:] > values[:-1]).all()
    assert values.min() >= 0
    assert values[0].max() < 0.15  # a good segmenter is hardly hurt
    if name in BOUNDED:
        assert values.max() <= 1
    else:
        assert values.max() > 1


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_neither_overflows_nor_rounds(name, dtype):
    mask = torch.zeros(1, 300, 300, dtype=torch.long)
    mask[:, :150] = 1
    logits = right(mask, -2.0)
    with torch.autocast("cpu", dtype=dtype):
        mixed = REWARDS[name](logits, mask)
    assert mixed.item() == pytest.approx(REWARDS[name](logits, mask).item(), rel=1e-4)


@pytest.mark.parametrize("name", REWARDS)
def test_samples_do_not_mix(name, logits, mask):
    together = REWARDS[name](logits, mask)
    alone = torch.cat([REWARDS[name](logits[i : i + 1], mask[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("name", REWARDS)
def test_ascent_on_the_logits_raises_the_reward(name, logits, mask):
    x = logits.clone().requires_grad_()
    before = REWARDS[name](x, mask)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    scale = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    after = REWARDS[name](logits + 0.1 * gradient / scale, mask)
    assert (after > before).all()


def test_ce_is_the_mean_over_pixels(logits, mask):
    expected = [F.cross_entropy(logits[i : i + 1], mask[i : i + 1]) for i in range(4)]
    assert torch.allclose(rewards.ce(logits, mask), torch.stack(expected))
    uniform = torch.zeros(4, 3, 8, 8)
    assert rewards.ce(uniform, mask).tolist() == pytest.approx([math.log(3)] * 4)


def test_bounded_versions(logits, mask):
    assert torch.allclose(rewards.bounded_ce(logits, mask), 1 - (-rewards.ce(logits, mask)).exp())
    balanced = rewards.balanced_ce(logits, mask)
    assert torch.allclose(rewards.bounded_balanced_ce(logits, mask), 1 - (-balanced).exp())
    half = right(mask, 0.0)[:, :2]  # two equal logits: CE = ln 2, the cap of 0.5
    assert rewards.bounded_ce(half, mask.clamp(max=1)).tolist() == pytest.approx([0.5] * 4)


def test_balanced_ce_loop(logits, mask):
    log_p = logits.log_softmax(1)
    for i in range(4):
        per_class = []
        for k in range(3):
            pixels = [-log_p[i, k, y, x] for y in range(8) for x in range(8) if mask[i, y, x] == k]
            if pixels:
                per_class.append(sum(pixels) / len(pixels))
        expected = float(sum(per_class) / len(per_class))
        assert rewards.balanced_ce(logits, mask)[i].item() == pytest.approx(expected, rel=1e-5)


def test_dice_loop(logits, mask):
    p = logits.softmax(1)
    for i in range(4):
        scores = []
        for k in (1, 2):
            target = (mask[i] == k).float()
            if target.sum() > 0:
                scores.append(2 * (p[i, k] * target).sum() / (p[i, k].sum() + target.sum()))
        expected = 1 - float(sum(scores) / len(scores))
        assert rewards.dice(logits, mask)[i].item() == pytest.approx(expected, rel=1e-5)


def test_focal(logits, mask):
    assert torch.allclose(rewards.focal(logits, mask, gamma=0), rewards.ce(logits, mask))
    p = logits.softmax(1).gather(1, mask[:, None])[:, 0]
    expected = (-((1 - p) ** 2) * p.log()).mean((1, 2))
    assert torch.allclose(rewards.focal(logits, mask), expected)


@pytest.mark.parametrize("name", REWARDS)
def test_masks_of_background_alone_are_finite(name, logits):
    x = logits.clone().requires_grad_()
    value = REWARDS[name](x, torch.zeros(4, 8, 8, dtype=torch.long))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()


def test_clipped_has_no_gradient_above_the_cap():
    reward = torch.tensor([0.1, 0.49, 0.51, 2.0], requires_grad=True)
    out = clipped(reward, 0.5)
    out.sum().backward()
    assert out.tolist() == pytest.approx([0.1, 0.49, 0.5, 0.5])
    assert reward.grad.tolist() == [1, 1, 0, 0]


def test_reducible_is_what_the_reference_has_learnt():
    anchor, reference = torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.5, 0.0, 0.4])
    assert torch.allclose(reducible(anchor, reference, 1.0), torch.tensor([0.0, 0.5, -0.2]))
    assert torch.allclose(reducible(anchor, reference, 2.0), torch.tensor([-0.5, 0.5, -0.6]))
    assert torch.equal(reducible(anchor, reference, 0.0), anchor)
    ratio = reducible(anchor, reference, 1.0, "log").exp()
    assert torch.allclose(ratio, torch.tensor([1.0, 501.0, 0.201 / 0.401]), rtol=1e-4)
