import pytest
import torch
import torch.nn.functional as F

from errors import InputError
from objectives.segmentation import DiceCE, deep_supervision_weights, dice_ce

SMOOTH = 1e-5  # MONAI's, in numerator and denominator


def plain(logits, mask):
    """Cross-entropy + soft Dice loss of the foreground, over the whole batch."""
    p, target = logits.softmax(1), F.one_hot(mask, logits.shape[1]).permute(0, 3, 1, 2).float()
    losses = []
    for k in range(1, logits.shape[1]):
        overlap = (p[:, k] * target[:, k]).sum()
        losses.append(1 - (2 * overlap + SMOOTH) / (p[:, k].sum() + target[:, k].sum() + SMOOTH))
    ce = -(logits.log_softmax(1) * target).sum(1).mean()
    return ce + sum(losses) / len(losses)


@pytest.fixture
def mask():
    return torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))


def logits_of(size, seed=1):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_weights():
    assert deep_supervision_weights(1) == [1.0]
    assert deep_supervision_weights(2) == [1.0, 0.0]
    assert deep_supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])
    for levels in range(1, 9):
        weights = deep_supervision_weights(levels)
        assert sum(weights) == pytest.approx(1)
        assert len(weights) == levels
        assert levels == 1 or weights[-1] == 0


def test_one_level_is_the_formula(mask):
    logits = logits_of(16)
    assert dice_ce(logits, mask).item() == pytest.approx(plain(logits, mask).item(), rel=1e-5)
    assert dice_ce([logits], mask).item() == pytest.approx(plain(logits, mask).item(), rel=1e-5)


def test_deep_supervision_is_the_weighted_sum(mask):
    levels = [logits_of(16, 1), logits_of(8, 2), logits_of(4, 3), logits_of(2, 4)]
    # nearest-exact at half the size takes pixels 1, 3, 5, …, at a quarter 2, 6, 10, …
    masks = [mask, mask[:, 1::2, 1::2], mask[:, 2::4, 2::4]]
    expected = sum(w * plain(x, y) for w, x, y in zip((4 / 7, 2 / 7, 1 / 7), levels, masks, strict=False))
    assert dice_ce(levels, mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_level_has_a_gradient(mask):
    """Also the coarsest, whose weight is 0: training by several processes waits for it."""
    levels = [logits_of(size).requires_grad_() for size in (16, 8, 4)]
    dice_ce(levels, mask).backward()
    assert [bool(level.grad.any()) for level in levels] == [True, True, False]


def test_perfect_logits_cost_nothing_and_wrong_ones_a_lot(mask):
    right = 30 * F.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    assert dice_ce(right, mask).item() == pytest.approx(0, abs=1e-5)
    assert dice_ce(-right, mask).item() > 10


def test_absent_classes_and_half_precision():
    empty = torch.zeros(2, 16, 16, dtype=torch.long)
    logits = logits_of(16)
    assert dice_ce(logits, empty).item() == pytest.approx(plain(logits, empty).item(), rel=1e-4)
    coarse = dice_ce(logits.bfloat16(), empty)
    assert coarse.item() == pytest.approx(plain(logits, empty).item(), rel=1e-2)
    assert torch.isfinite(coarse)


def test_deep_supervision_is_nnunets_loss(mask):
    """Theirs has no 1 − before Dice."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    theirs = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    levels = [logits_of(16, 1).requires_grad_(), logits_of(8, 2), logits_of(4, 3), logits_of(2, 4)]
    targets = [mask[:, None]]
    for level in levels[1:]:
        resized = F.interpolate(mask[:, None].float(), size=level.shape[2:], mode="nearest-exact")
        targets.append(resized.long())
    expected = DeepSupervisionWrapper(theirs, deep_supervision_weights(4))(levels, targets)
    ours = dice_ce(levels, mask)
    assert ours.item() == pytest.approx(1 + expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, levels[0])[0] for loss in (ours, expected)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_swin_unets_loss_is_the_formula(mask):
    """0.4 cross-entropy + 0.6 Dice over every class, squares below."""
    logits = logits_of(16)
    p, target = logits.softmax(1), F.one_hot(mask, 3).permute(0, 3, 1, 2).float()
    dice = [
        1
        - (2 * (p[:, k] * target[:, k]).sum() + SMOOTH) / ((p[:, k] ** 2).sum() + target[:, k].sum() + SMOOTH)
        for k in range(3)
    ]
    expected = 0.4 * F.cross_entropy(logits, mask) + 0.6 * sum(dice) / 3
    loss = DiceCE(ce=0.4, dice=0.6, background=True, squared=True)
    assert loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [(-1, 1), (0, 0)])
def test_weights_of_the_loss(weights):
    with pytest.raises(InputError, match="loss: the weights"):
        DiceCE(*weights)
