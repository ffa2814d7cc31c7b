"""Measures against medpy and MONAI, presets on empty masks, volumes from slices."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from datamodules.sources import Volume
from evaluation.metrics import SegmentationScore
from evaluation.protocols import PROTOCOLS, Empty, Protocol
from evaluation.surfaces import score_case

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
ALL = ("dsc", "nsd", "asd", "assd", "hd", "hd95")
TOLERANCE = 1.37  # between two distances of any grid here
UNSCORED, WORST = Empty(None, None), Empty(0.0, "diagonal")
FORWARD = Protocol(
    "forward", "volume", True, ALL, UNSCORED, WORST, WORST, asd="forward", hd95="pooled", tolerance=TOLERANCE
)
HALF = replace(FORWARD, name="half", asd="half", hd95="larger")
NAMES = ("background", "a", "b", "c")


def random_case(seed: int, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A blobby class map and another one like it; some classes are absent, some touch the border."""
    rng = np.random.default_rng(seed)
    fields = np.stack([gaussian_filter(rng.normal(size=shape), 2.5) for _ in range(classes)])
    fields /= fields.std(axis=tuple(range(1, fields.ndim)), keepdims=True)
    fields[0] += 0.8
    fields[1:] += rng.choice([0.0, -9.0], size=(classes - 1, *(1,) * len(shape)), p=[0.9, 0.1])
    noise = np.stack([gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(classes)])
    return fields.argmax(0), (fields + 3 * noise).argmax(0)


def random_spacing(seed: int, dimensions: int, anisotropic: bool) -> tuple[float, ...]:
    rng = np.random.default_rng(seed)
    drawn = (*rng.uniform(3, 10, dimensions - 2), *rng.uniform(0.6, 1.9, 2))
    return tuple(map(float, drawn)) if anisotropic else (1.0,) * dimensions


def scored(protocol, classes, cases):
    """Score cases by the metric; volumes come slice by slice, shuffled, some of them twice."""
    volumes, slices = [], []
    for number, (p, g, spacing) in enumerate(cases):
        stacks = (p[None], g[None]) if p.ndim == 2 else (p, g)
        for k, pair in enumerate(zip(*stacks, strict=True)):
            volumes.append(Volume(str(number), k, len(stacks[0]), ((1.0, *spacing)[-3:])))
            slices.append([torch.from_numpy(maps)[None] for maps in pair])
    score = SegmentationScore(NAMES[:classes], protocol=protocol, volumes=volumes)
    order = np.random.default_rng(0).permutation(len(slices))
    for i in [*order, *order[:3]]:
        score.update(*slices[i], [i])
    assert score.distance_unit == "mm"
    return {int(score.case_name(case["id"]) or case["id"]): case for case in score.cases()}


def by_medpy(p, g, spacing):
    from medpy.metric import binary

    forth, back = (binary.asd(*pair, voxelspacing=spacing) for pair in ((p, g), (g, p)))
    forward = {
        "dsc": 100 * binary.dc(p, g),
        "asd": forth,
        "assd": binary.assd(p, g, voxelspacing=spacing),
        "hd": binary.hd(p, g, voxelspacing=spacing),
        "hd95": binary.hd95(p, g, voxelspacing=spacing),
    }
    return forward, {"asd": (forth + back) / 2}


def by_monai(p, g, spacing):
    from monai import metrics

    p, g = torch.from_numpy(p)[None, None].float(), torch.from_numpy(g)[None, None].float()

    def distance(function, *pair, **options):
        return function(*pair, include_background=True, spacing=spacing, **options).item()

    forth, back = (distance(metrics.compute_average_surface_distance, *pair) for pair in ((p, g), (g, p)))
    forward = {
        "dsc": 100 * metrics.compute_dice(p, g, include_background=True).item(),
        "nsd": 100 * distance(metrics.compute_surface_dice, p, g, class_thresholds=[TOLERANCE]),
        "asd": forth,
        "assd": distance(metrics.compute_average_surface_distance, p, g, symmetric=True),
        "hd": distance(metrics.compute_hausdorff_distance, p, g),
    }
    larger = distance(metrics.compute_hausdorff_distance, p, g, percentile=95)
    return forward, {"asd": (forth + back) / 2, "hd95": larger}


@pytest.mark.parametrize("anisotropic", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shape", [(28, 37), (7, 22, 19)])
def test_equals_medpy_and_monai(shape, classes, anisotropic):
    """25 random cases each, 200 in all, every measure, as the metric gives them."""
    pytest.importorskip("medpy", reason="medpy is in requirements-dev.txt")
    cases = []
    for i in range(25):
        seed = 1000 * len(shape) + 100 * classes + 50 * anisotropic + i
        cases.append((*random_case(seed, shape, classes), random_spacing(seed, len(shape), anisotropic)))
    unit = "slice" if len(shape) == 2 else "volume"
    got = [scored(replace(protocol, unit=unit), classes, cases) for protocol in (FORWARD, HALF)]
    compared = 0
    for number, (p, g, spacing) in enumerate(cases):
        for k, name in enumerate(NAMES[1:classes], start=1):
            if not (p == k).any() or not (g == k).any():
                continue
            compared += 1
            for reference in (by_medpy, by_monai):
                for scores, expected in zip(got, reference(p == k, g == k, spacing), strict=True):
                    for measure, value in expected.items():
                        found = scores[number][f"{measure}/{name}"]
                        # MONAI finds the place of the percentile in float32
                        rel = 1e-3 if reference is by_monai and measure == "hd95" else 1e-5
                        assert found == pytest.approx(value, rel=rel), (reference, measure)
    assert compared >= 18 * (classes - 1)


def test_the_random_cases_are_hard_ones():
    """The comparison covers bad and good overlap, unequal directions and both sides of the tolerance."""
    p, g = random_case(1, (7, 22, 19), 4)
    forward, half = (score_case(p, g, 4, (5.0, 0.7, 1.1), protocol) for protocol in (FORWARD, HALF))
    assert (forward[:, 0] > 20).all()
    assert (forward[:, 0] < 95).all()
    assert ((forward[:, 1] > 5) & (forward[:, 1] < 99)).all()
    assert (abs(forward[:, 2] - half[:, 2]) > 1e-3).all()
    assert (forward[:, 5] != half[:, 5]).any()


# ------------------------------------------------------------------------------------- empty masks

D2, D3 = math.hypot(30, 40), math.sqrt(4**2 + 30**2 + 40**2)
D3_MM = math.sqrt((4 * 5) ** 2 + 30**2 + (40 * 2) ** 2)
NOT = math.nan
# Both empty, only the prediction empty, only the reference empty; per measure, overlaps in percent.
EMPTY = {
    "paper": {"dsc": (NOT, 0, 0), "asd": (NOT, D2, D2)},
    "transunet": {"dsc": (0, 0, 100), "hd95": (0, 0, 0)},
    "nnunet": {"dsc": (NOT, 0, 0), "nsd": (NOT, 0, 0)}
    | dict.fromkeys(("asd", "assd", "hd95"), (NOT, D3_MM, D3_MM)),
    "acdc": {"dsc": (NOT, 0, 0)} | dict.fromkeys(("hd", "hd95", "asd"), (NOT, D3_MM, D3_MM)),
}


def stack(filled: bool, depth: int = 4) -> torch.Tensor:
    maps = torch.zeros((depth, 30, 40), dtype=torch.int64)
    maps[:, 5:9, 6:10] = int(filled)
    return maps


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("preset", PROTOCOLS)
def test_empty_masks_by_preset(preset, case):
    prediction, target = ((False, False), (False, True), (True, False))[case]
    volumes = [Volume("p", k, 4, (5.0, 1.0, 2.0)) for k in range(4)]
    score = SegmentationScore(("background", "a"), protocol=preset, volumes=volumes)
    score.update(stack(prediction), stack(target), range(4))
    means = score.compute()
    assert set(EMPTY[preset]) == set(PROTOCOLS[preset].measures)
    for measure, values in EMPTY[preset].items():
        assert means[measure] == pytest.approx(values[case], nan_ok=True), measure
    assert means["n_cases"] == (4 if preset == "paper" else 1)


@pytest.mark.parametrize("preset", PROTOCOLS)
def test_an_image_of_no_volume_is_a_case(preset):
    """Without spacing, in 2-D: the diagonal is that of the image, in pixels."""
    score = SegmentationScore(("background", "a"), protocol=preset)
    score.update(stack(True, 2), torch.stack([stack(False, 1)[0], stack(True, 1)[0]]), [0, 1])
    assert score.distance_unit == "px"
    first, second = score.cases()
    for measure, (_, _, value) in EMPTY[preset].items():
        expected = D2 if value == D3_MM else value
        assert first[f"{measure}/a"] == pytest.approx(expected), measure
        assert second[f"{measure}/a"] == (100 if measure in ("dsc", "nsd") else 0)


def test_presets_are_documented():
    """The table of docs/metrics.md has the rule of every preset, word for word."""
    rows = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in DOCS.read_text().splitlines()
    ]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PROTOCOLS and len(row) == 4}
    for name, protocol in PROTOCOLS.items():
        rules = protocol.rules()
        expected = [rules[key] for key in ("both empty", "only prediction empty", "only reference empty")]
        assert table[name] == expected


def test_rules_are_printed_in_full():
    score = SegmentationScore(NAMES, protocol="acdc", volumes=[Volume("p", 0, 1, (5.0, 1.0, 1.0))])
    rules = score.protocol
    assert rules["unit"].startswith("one case is one volume")
    assert rules["asd"] == "mean distance P→G over surface elements of P"
    assert "taken together" in rules["hd95"]
    assert rules["only prediction empty"].startswith("DSC 0; HD = diagonal")
    assert rules["asd unit"] == "mm"
    assert "2 of the other surface" in PROTOCOLS["nnunet"].rules()["nsd"]
    assert SegmentationScore(NAMES, protocol="transunet").protocol["distance unit"] == "px"


def test_dsc_of_nnunet_is_that_of_its_evaluation():
    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")

    class Arrays:
        def read_seg(self, array):
            return array, {}

    p, g = random_case(7, (6, 22, 19), 4)
    p[p == 2] = 0
    g[g == 2] = 0
    p[p == 3] = 0
    theirs = evaluation.compute_metrics(g, p, Arrays(), [1, 2, 3])["metrics"]
    volumes = [Volume("p", k, 6, (5.0, 1.0, 1.0)) for k in range(6)]
    score = SegmentationScore(NAMES, protocol="nnunet", volumes=volumes)
    score.update(torch.from_numpy(p), torch.from_numpy(g), range(6))
    ours = score.compute()
    for k, name in enumerate(NAMES[1:], start=1):
        assert ours[f"dsc/{name}"] == pytest.approx(100 * theirs[k]["Dice"], nan_ok=True)
    assert math.isnan(ours["dsc/b"])


# ----------------------------------------------------------------------------------------- volumes


def volume_cases(seed=0):
    """Two volumes of unequal depth and spacing, interleaved with an image of no volume."""
    rng = np.random.default_rng(seed)
    maps = [np.stack(random_case(int(rng.integers(99)), (depth, 22, 19), 4)) for depth in (5, 3)]
    volumes = [Volume("x", k, 5, (8.0, 1.5, 1.2)) for k in range(5)]
    volumes += [Volume("y", k, 3, (2.0, 0.5, 0.7)) for k in range(3)]
    order = rng.permutation(8)
    slices = np.concatenate(maps, axis=1)[:, order]
    prediction, target = torch.from_numpy(slices)
    return prediction, target, [volumes[i] for i in order], maps


def test_volumes_are_put_together():
    prediction, target, volumes, maps = volume_cases()
    score = SegmentationScore(NAMES, protocol="acdc", volumes=volumes)
    score.update(prediction, target, range(8))
    found = {score.case_name(case["id"]): case for case in score.cases()}
    assert set(found) == {"x", "y"}
    for name, (p, g), spacing in zip("xy", maps, ((8.0, 1.5, 1.2), (2.0, 0.5, 0.7)), strict=True):
        expected = score_case(p, g, 4, spacing, PROTOCOLS["acdc"])
        got = [[found[name][f"{m}/{c}"] for m in score.measures] for c in score.foreground]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    means = score.compute()
    assert means["n_cases"] == 2
    assert means["hd/a"] == pytest.approx(np.nanmean([found["x"]["hd/a"], found["y"]["hd/a"]]))


def test_spacing_is_taken_from_the_case_or_given():
    prediction, target, volumes, _ = volume_cases()
    in_mm = SegmentationScore(NAMES, protocol="acdc", volumes=volumes)
    doubled = [replace(v, spacing=tuple(2 * s for s in v.spacing)) for v in volumes]
    larger = SegmentationScore(NAMES, protocol="acdc", volumes=doubled)
    voxels = SegmentationScore(NAMES, protocol="transunet", volumes=volumes)
    given = SegmentationScore(NAMES, (1, 1, 1), replace(PROTOCOLS["acdc"], measures=("hd95",)), volumes)
    for score in (in_mm, larger, voxels, given):
        score.update(prediction, target, range(8))
    assert larger.compute()["hd95"] == pytest.approx(2 * in_mm.compute()["hd95"])
    assert larger.compute()["dsc"] == in_mm.compute()["dsc"]
    assert voxels.distance_unit == "px"
    assert given.compute()["hd95"] == pytest.approx(voxels.compute()["hd95"])
    assert "(1.0, 1.0, 1.0)" in given.distance_unit
    assert given.protocol["spacing"] == "(1.0, 1.0, 1.0), given for all cases"


def test_volumes_that_are_not_whole_are_left_out():
    prediction, target, volumes, _ = volume_cases()
    score = SegmentationScore(NAMES, protocol="nnunet", volumes=volumes)
    keep = [i for i in range(8) if volumes[i].case == "y" or volumes[i].slice != 2]
    score.update(prediction[keep], target[keep], keep)
    with pytest.warns(UserWarning, match="1 volumes have not come whole"):
        means = score.compute()
    assert (means["n_cases"], means["n_incomplete"]) == (1, 1)
    rest = [i for i in range(8) if i not in keep]
    score.update(prediction[rest], target[rest], rest)
    whole = score.compute()
    assert whole["n_cases"] == 2
    assert "n_incomplete" not in whole
    score.reset()
    assert score.compute()["n_cases"] == 0


def test_merged_slices_are_the_whole():
    prediction, target, volumes, _ = volume_cases()
    whole, even, odd = (SegmentationScore(NAMES, protocol="nnunet", volumes=volumes) for _ in range(3))
    whole.update(prediction, target, range(8))
    even.update(prediction[::2], target[::2], range(0, 8, 2))
    odd.update(prediction[1::2], target[1::2], range(1, 8, 2))
    odd.update(prediction[:1], target[:1], [0])
    even.merge_state(odd)
    np.testing.assert_equal(even.compute(), whole.compute())
    np.testing.assert_equal(even.cases(), whole.cases())


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("volumes", "fragment"),
    [
        ([Volume("p", 0, 3, None), Volume("p", 2, 3, None)], "case p has 2 of 3 slices"),
        ([Volume("p", 0, 2, None), Volume("p", 0, 2, None)], "slice 0 twice"),
        ([Volume("p", 0, 2, None), Volume("p", 2, 2, None)], "case p has 2 of 2 slices"),
        ([Volume("p", 0, 2, None), Volume("p", 1, 3, None)], "disagree"),
        ([Volume("p", 0, 2, (1, 1, 1)), Volume("p", 1, 2, (2, 1, 1))], "disagree"),
        ([Volume("p", 0, 1, (1, 1, 1)), Volume("q", 0, 1, None)], "sample 1 has none while sample 0"),
        ([Volume("p", 0, 1, (1, 1, 1)), None], "sample 1 has none"),
        ([Volume("p", 0, 1, (0, 1, 1))], "case p has the spacing .0, 1, 1.: give positive"),
        ([Volume("p", 0, 1, (1, math.nan, 1))], "case p has the spacing"),
    ],
)
def test_refuses_broken_volumes(volumes, fragment):
    with pytest.raises(ValueError, match=fragment):
        SegmentationScore(NAMES, protocol="nnunet", volumes=volumes)


def test_refuses_slices_that_do_not_fit_their_volume():
    score = SegmentationScore(NAMES, protocol="nnunet", volumes=[Volume("p", k, 2, None) for k in range(2)])
    with pytest.raises(ValueError, match="id 5: must be at least 0 and below 2"):
        score.update(stack(True, 1), stack(True, 1), [5])
    score.update(stack(True, 1), stack(True, 1), [0])
    score.update(stack(True, 1)[:, :20], stack(True, 1)[:, :20], [1])
    with pytest.raises(ValueError, match=r"slices of case p have several sizes, \[\(20, 40\), \(30, 40\)\]"):
        score.compute()


@pytest.mark.parametrize(
    "wrong", [{"unit": "volumes"}, {"hd95": "Larger"}, {"asd": "both"}], ids=lambda given: next(iter(given))
)
def test_refuses_unknown_choices(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{key} '{value}': choose "):
        replace(PROTOCOLS["acdc"], **wrong)


def test_slices_need_no_whole_volumes():
    """By slice, and without spacing, nothing is asked of the volumes."""
    SegmentationScore(NAMES, protocol="paper", volumes=[Volume("p", 2, 9, (1, 1, 1)), None])


def test_refuses_what_is_no_protocol():
    with pytest.raises(ValueError, match="'voc'; the presets are paper, transunet, nnunet, acdc"):
        SegmentationScore(NAMES, protocol="voc")
    with pytest.raises(ValueError, match="tolerance"):
        replace(PROTOCOLS["nnunet"], tolerance=None)
    with pytest.raises(ValueError, match="choose some of"):
        replace(PROTOCOLS["paper"], measures=("iou",))
    with pytest.raises(ValueError, match="three numbers"):
        SegmentationScore(NAMES, (1, 1), "transunet", [Volume("p", 0, 1, None)])
