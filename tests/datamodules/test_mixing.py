import numpy as np
import pytest
import torch

from datamodules.mixing import copy_paste, paired_cutmix


def coded_batch(size, edge=12):
    """Every pixel of the batch has a value of its own, in image and mask."""
    mask = torch.arange(size * edge * edge).reshape(size, edge, edge)
    return mask[:, None].expand(-1, 3, -1, -1).float(), mask


@pytest.mark.parametrize("size", [2, 6, 7])
def test_cutmix_swaps_between_the_halves(size):
    image, mask = coded_batch(size)
    shares = []
    for seed in range(20):
        mixed, labels = paired_cutmix(image, mask, np.random.default_rng(seed), 1.0)
        assert torch.equal(labels.flatten().sort().values, mask.flatten())  # every pixel stays in the batch
        assert torch.equal(mixed, labels[:, None].expand(-1, 3, -1, -1).float())  # labels move along
        half = size // 2
        owner = labels // mask[0].numel()
        moved = owner != torch.arange(size)[:, None, None]
        for i in range(half):
            assert set(owner[i].unique().tolist()) <= {i, i + half}
            assert torch.equal(moved[i], moved[i + half])
        assert not moved[2 * half :].any()
        y, x = torch.nonzero(moved[0], as_tuple=True)  # one full rectangle, at its own place
        assert moved[0].sum() == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
        assert torch.equal(labels % mask[0].numel(), mask % mask[0].numel())
        shares.append(moved[0].float().mean().item())
    assert max(shares) > 0.8
    assert min(shares) < 0.2


def test_copy_paste_pastes_whole_objects_with_their_labels():
    image, _ = coded_batch(6)
    mask = torch.zeros(6, 12, 12, dtype=torch.long)
    for i in range(6):
        mask[i, i : i + 4, 1 + i : 4 + i] = 1 + i % 2
    seen = set()
    for seed in range(30):
        mixed, labels = copy_paste(image, mask, np.random.default_rng(seed), 0.5)
        for i in range(6):
            moved = mixed[i, 0] != image[i, 0]
            if not moved.any():
                assert torch.equal(labels[i], mask[i])
                continue
            owner = (mixed[i, 0][moved] // 144).long().unique()
            assert len(owner) == 1  # one partner
            j = owner.item()
            assert j != i
            options = {
                name: (m, v)
                for name, m, v in (
                    ("as it is", mask[j], image[j, 0]),
                    ("mirrored", mask[j].flip(-1), image[j, 0].flip(-1)),
                )
                if torch.equal(moved, m > 0)
            }
            assert len(options) >= 1  # the whole object and nothing else
            seen.update(options)
            m, v = next(iter(options.values()))
            assert torch.equal(labels[i], torch.where(moved, m, mask[i]))
            assert torch.equal(mixed[i, 0], torch.where(moved, v, image[i, 0]))
    assert seen == {"as it is", "mirrored"}


def test_copy_paste_probability():
    image, _ = coded_batch(4)
    mask = torch.ones(4, 12, 12, dtype=torch.long)
    pasted = [copy_paste(image, mask, np.random.default_rng(s), 0.25)[0] for s in range(200)]
    share = np.mean([(p != image).flatten(1).any(1).float().mean().item() for p in pasted])
    assert share == pytest.approx(0.25, abs=0.05)
    assert torch.equal(copy_paste(image, mask, np.random.default_rng(0), 0.0)[0], image)
    assert torch.equal(copy_paste(image[:1], mask[:1], np.random.default_rng(0), 1.0)[0], image[:1])


def test_cutmix_probability():
    image, mask = coded_batch(4)
    mixed = [paired_cutmix(image, mask, np.random.default_rng(s), 0.5)[1] for s in range(200)]
    assert 70 <= sum(not torch.equal(labels, mask) for labels in mixed) <= 130
    assert torch.equal(paired_cutmix(image, mask, np.random.default_rng(0), 0.0)[1], mask)
    assert torch.equal(paired_cutmix(image[:1], mask[:1], np.random.default_rng(0), 1.0)[1], mask[:1])
    assert torch.equal(mask, coded_batch(4)[1])  # in place nothing happens
