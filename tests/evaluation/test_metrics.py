import math
import warnings

import numpy as np
import pytest
import torch
from torch.multiprocessing import spawn
from torch.utils.data import DistributedSampler

from datamodules.sources import Volume
from evaluation.metrics import PROTOCOL, SegmentationScore
from evaluation.protocols import PROTOCOLS
from evaluation.surfaces import mask_scores

NAMES = ("background", "disc", "ring")


def random_maps(n: int, seed: int, size: tuple[int, int] = (24, 31), classes: int = 3) -> torch.Tensor:
    """Blocky random class maps (n, H, W); some touch the border, some classes are absent."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((n, *size), dtype=np.int64)
    for one in maps:
        for label in rng.permutation(np.arange(1, classes)):
            if rng.random() < 0.25:
                continue
            top, left = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
            one[top : top + rng.integers(1, 14), left : left + rng.integers(1, 14)] = label
    return torch.from_numpy(maps)


def brute_surface(mask: np.ndarray) -> np.ndarray:
    """Surface points by the words of the protocol: a pixel with a 4-neighbour outside."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside)


def brute_scores(p: np.ndarray, g: np.ndarray, spacing: tuple[float, float]) -> tuple[float, float]:
    """DSC and ASD of two masks by all pairs of surface points."""
    if not p.any() and not g.any():
        return math.nan, math.nan
    if not p.any() or not g.any():
        return 0.0, math.hypot(p.shape[0] * spacing[0], p.shape[1] * spacing[1])
    a, b = brute_surface(p) * spacing, brute_surface(g) * spacing
    pairs = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    asd = 0.5 * (pairs.min(1).mean() + pairs.min(0).mean())
    return 100 * 2 * (p & g).sum() / (p.sum() + g.sum()), asd


@pytest.mark.parametrize("spacing", [None, (1.5, 0.7)])
def test_matches_brute_force(spacing):
    prediction, target = random_maps(30, 0), random_maps(30, 1)
    score = SegmentationScore(NAMES, spacing)
    for start in range(0, 30, 7):
        batch = slice(start, start + 7)
        score.update(prediction[batch], target[batch], list(range(30))[batch])

    expected = np.array(
        [
            [brute_scores(p == k, g == k, spacing or (1.0, 1.0)) for k in (1, 2)]
            for p, g in zip(prediction.numpy(), target.numpy(), strict=True)
        ]
    )
    got = np.array([[[c[f"{m}/{n}"] for m in ("dsc", "asd")] for n in NAMES[1:]] for c in score.cases()])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.isnan(expected).any()
    assert (expected == 0).any()

    means = score.compute()
    per_class = np.nanmean(expected, axis=0)
    assert means["n_cases"] == 30
    assert means["dsc"] == pytest.approx(per_class[:, 0].mean())
    assert means["asd"] == pytest.approx(per_class[:, 1].mean())
    assert means["asd/ring"] == pytest.approx(per_class[1, 1])


def test_matches_monai():
    from monai.metrics import DiceMetric  # here, as each process of the distributed test imports this file
    from monai.metrics.utils import get_edge_surface_distance

    prediction, target = random_maps(20, 2), random_maps(20, 3)
    score = SegmentationScore(NAMES)
    score.update(prediction, target, range(20))
    cases = score.cases()

    def one_hot(maps):
        return torch.nn.functional.one_hot(maps, 3).movedim(-1, 1).float()

    dice = DiceMetric(include_background=False, reduction="none", ignore_empty=False)
    dice = dice(one_hot(prediction), one_hot(target))
    compared = 0
    for i, case in enumerate(cases):
        for k, name in enumerate(NAMES[1:], start=1):
            p, g = prediction[i] == k, target[i] == k
            if p.any() and g.any():
                _, (forth, back), _ = get_edge_surface_distance(p, g, symmetric=True)
                assert case[f"asd/{name}"] == pytest.approx(0.5 * float(forth.mean() + back.mean()), rel=1e-5)
                assert case[f"dsc/{name}"] == pytest.approx(100 * float(dice[i, k - 1]), rel=1e-5)
                compared += 1
    assert compared > 10


def block(label: int = 1, size: tuple[int, int] = (30, 40)) -> torch.Tensor:
    maps = torch.zeros((1, *size), dtype=torch.int64)
    maps[:, 5:9, 6:10] = label
    return maps


def test_perfect():
    score = SegmentationScore(NAMES)
    score.update(block(), block(), [0])
    means = score.compute()
    assert (means["dsc"], means["asd"]) == (100.0, 0.0)


def test_class_absent_in_both_is_skipped():
    score = SegmentationScore(NAMES)
    score.update(block(1), block(1), [0])
    (case,) = score.cases()
    assert math.isnan(case["dsc/ring"])
    assert math.isnan(case["asd/ring"])
    assert score.compute()["dsc"] == 100.0  # over the one class that is scored


@pytest.mark.parametrize(("spacing", "diagonal"), [(None, 50.0), ((2.0, 2.0), 100.0)])
@pytest.mark.parametrize("empty_side", ["prediction", "target"])
def test_one_side_empty(spacing, diagonal, empty_side):
    pair = [block(), torch.zeros_like(block())]
    prediction, target = pair[::-1] if empty_side == "prediction" else pair
    score = SegmentationScore(NAMES, spacing)
    score.update(prediction, target, [0])
    means = score.compute()
    assert (means["dsc"], means["asd"]) == (0.0, diagonal)


def test_directions_weigh_the_same():
    prediction, target = block(), block()
    prediction[0, 5, 30] = 1  # a stray pixel 21 from the block's edge
    score = SegmentationScore(NAMES)
    score.update(prediction, target, [0])
    assert score.compute()["asd"] == pytest.approx(0.5 * 21 / 13)  # 12 edge pixels at 0 and the stray one


def test_mean_over_classes_of_means_over_cases():
    score = SegmentationScore(NAMES)
    empty = torch.zeros_like(block())
    score.update(torch.cat([block(1), empty, block(2)]), torch.cat([block(1), block(1), block(2)]), [0, 1, 2])
    means = score.compute()
    assert means["dsc/disc"] == 50.0
    assert means["dsc/ring"] == 100.0
    assert means["dsc"] == 75.0  # not 66.7, the mean over scored masks


def test_repeated_ids_count_once():
    prediction, target = random_maps(6, 4), random_maps(6, 5)
    once, padded = SegmentationScore(NAMES), SegmentationScore(NAMES)
    once.update(prediction, target, range(6))
    padded.update(prediction, target, range(6))
    padded.update(prediction[:2], target[:2], [0, 1])
    assert padded.compute() == once.compute()
    assert len(padded.cases()) == 6


def test_merged_states_are_the_whole():
    prediction, target = random_maps(9, 6), random_maps(9, 7)
    whole, even, odd = (SegmentationScore(NAMES) for _ in range(3))
    whole.update(prediction, target, range(9))
    even.update(prediction[::2], target[::2], range(0, 9, 2))
    odd.update(prediction[1::2], target[1::2], range(1, 9, 2))
    odd.update(prediction[:1], target[:1], [0])  # as a padded sampler repeats it
    even.merge_state(odd)
    assert even.compute() == whole.compute()
    np.testing.assert_equal(even.cases(), whole.cases())


def _score_a_share(rank: int, world: int, address: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    prediction, target = random_maps(5, 8), random_maps(5, 9)
    for shares in (
        [range(0, 5, 2), range(1, 5, 2)],
        [range(5), range(0)],
    ):  # at last, one process has no case
        score, whole = SegmentationScore(NAMES), SegmentationScore(NAMES)
        mine = list(shares[rank])
        if mine:
            score.update(prediction[mine], target[mine], mine)
        whole.update(prediction, target, range(5))
        # the whole, gathered from both processes, repeats every id
        assert score.compute() == whole.compute()
        assert [case["id"] for case in score.cases()] == list(range(5))
    _score_volumes(rank, world)
    torch.distributed.destroy_process_group()


def _score_volumes(rank: int, world: int) -> None:
    """Two volumes and an image, their slices dealt out in turn, so that neither process has a volume."""
    prediction, target = random_maps(9, 10), random_maps(9, 11)
    of_x, of_y = (
        [Volume(name, k, depth, None) for k in range(depth)] for name, depth in (("x", 5), ("y", 3))
    )
    volumes = [*of_x[:2], *of_y, *of_x[2:], None]
    share = list(DistributedSampler(range(9), world, rank, shuffle=False))
    assert len(share) == 5  # the sampler pads: one sample comes twice
    for protocol, count in (("nnunet", 3), ("transunet", 3), ("paper", 9)):
        for mine in (share, list(range(9 - 9 * rank))):  # at last, one process has no case
            score, whole = (SegmentationScore(NAMES, protocol=protocol, volumes=volumes) for _ in range(2))
            whole.sync_on_compute = False
            whole.update(prediction, target, range(9))
            if mine:
                score.update(prediction[mine], target[mine], mine)
            means = score.compute()
            np.testing.assert_equal(means, whole.compute())
            assert means["n_cases"] == count
            assert "n_incomplete" not in means
            names = {score.case_name(case["id"]) for case in score.cases()}
            assert names == ({None} if protocol == "paper" else {"x", "y", None})


def test_distributed_is_the_whole(tmp_path):
    spawn(_score_a_share, args=(2, f"file://{tmp_path}/rendezvous"), nprocs=2)


def test_surface_within_the_tolerance_does_not_depend_on_the_place():
    """At 0.4 mm five pixels are the 2 mm of the tolerance."""
    protocol, found = PROTOCOLS["nnunet"], set()
    for start in range(0, 40, 3):
        target, prediction = (np.zeros((64, 64), bool) for _ in range(2))
        target[start : start + 6, 10:30] = True
        prediction[start + 5 : start + 11, 10:30] = True
        scores = mask_scores(prediction, target, (0.4, 0.4), protocol)
        found.add(scores[protocol.measures.index("nsd")])
    assert len(found) == 1


def test_nothing_scored_is_nan_without_warnings():
    score = SegmentationScore(NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score.update(torch.zeros(1, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8, dtype=torch.int64), [3])
        means = score.compute()
    assert means.pop("n_cases") == 1
    assert all(math.isnan(v) for v in means.values())
    score.reset()
    assert score.cases() == []
    assert score.compute()["n_cases"] == 0


def test_protocol_names_the_unit():
    assert SegmentationScore(NAMES).protocol == {**PROTOCOL, "asd unit": "px"}
    assert "(1.5, 2.0)" in SegmentationScore(NAMES, (1.5, 2)).protocol["asd unit"]


def test_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="foreground"):
        SegmentationScore(["background"])
    with pytest.raises(ValueError, match="spacing"):
        SegmentationScore(NAMES, (1.0, 0.0))
    with pytest.raises(ValueError, match="ids"):
        SegmentationScore(NAMES).update(block(), block(), [0, 1])
    with pytest.raises(ValueError, match="spacing"):
        SegmentationScore(NAMES, (1.0, math.nan))


@pytest.mark.parametrize(
    ("prediction", "target", "i", "message"),
    [
        (block(7), block(), 0, "prediction has labels from 0 to 7, and the classes are 0 to 2"),
        (block(), block(255), 0, "target has labels from 0 to 255"),
        (block(), block() - 1, 0, "target has labels from -1 to 0"),
        (block() * 0.7, block(), 0, "prediction is of type torch.float32"),
        (block(), block(), -1, "id -1: must be at least 0 and below 16777216"),
        (block(), block(), 2**24, "id 16777216: must be"),
    ],
)
def test_refuses_labels_and_ids_out_of_range(prediction, target, i, message):
    score = SegmentationScore(NAMES)
    with pytest.raises(ValueError, match=message):
        score.update(prediction, target, [i])
    assert score.compute()["n_cases"] == 0
    score.update(block()[:0], block()[:0], [])
