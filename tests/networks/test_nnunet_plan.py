"""Plans, networks and normalisation against those of nnunetv2 itself."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import InputError
from networks import NNUNet
from networks.nnunet_plan import Fingerprint, Intensities, plan_2d, stage_features
from networks.normalisation import check_channels, normalise, scheme_of

PLAIN = (999.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A function that lets nnU-Net's own planner plan for a fingerprint."""
    root = tmp_path_factory.mktemp("nnunet")
    kept = {key: os.environ.get(key) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for key in kept:
        os.environ[key] = str(root / key)
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    def plan(fingerprint, memory=8.0, suppress_transpose=False):
        raw, done = (root / kind / "Dataset001_Made" for kind in ("nnUNet_raw", "nnUNet_preprocessed"))
        for folder in (raw / "imagesTr", raw / "labelsTr", done):
            folder.mkdir(parents=True, exist_ok=True)
        for file in (raw / "imagesTr" / "a_0000.nii.gz", raw / "labelsTr" / "a.nii.gz"):
            file.touch()
        dataset = {
            "channel_names": {str(k): "MR" for k in range(fingerprint.channels)},
            "labels": {str(k): k for k in range(fingerprint.classes)},
            "numTraining": len(fingerprint.shapes),
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIO",
        }
        (raw / "dataset.json").write_text(json.dumps(dataset))
        found = {
            "spacings": fingerprint.spacings,
            "shapes_after_crop": fingerprint.shapes,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {},
        }
        (done / "dataset_fingerprint.json").write_text(json.dumps(found))
        planner = ExperimentPlanner(1, memory, suppress_transpose=suppress_transpose)
        return planner.plan_experiment()["configurations"]["2d"]

    yield plan
    for key, value in kept.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value


def assert_same(ours, reference):
    network = reference["architecture"]["arch_kwargs"]
    assert ours.patch_size == tuple(reference["patch_size"])
    assert ours.batch_size == reference["batch_size"]
    assert list(ours.spacing) == list(reference["spacing"])
    assert list(ours.median_shape) == list(reference["median_image_size_in_voxels"])
    for key, value in (("strides", ours.strides), ("kernel_sizes", ours.kernel_sizes)):
        assert [list(pair) for pair in network[key]] == [list(pair) for pair in value], key
    assert list(ours.features) == list(network["features_per_stage"])
    assert set(network["n_conv_per_stage"]) | set(network["n_conv_per_stage_decoder"]) == {ours.convs}


@pytest.mark.parametrize(
    ("size", "patch", "stages"),
    [((256, 216), (256, 224), 6), ((256, 256),) * 2 + (7,), ((352, 352), (384, 384), 7)],
)
def test_plan_and_network_of_three_sizes(theirs, size, patch, stages):
    """The same numbers, the same number of parameters, the same outputs for shared weights."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    fingerprint = Fingerprint(((1, *size),) * 400, (PLAIN,) * 400, 1, 4)
    reference, plan = theirs(fingerprint), plan_2d(fingerprint)
    assert_same(plan, reference)
    assert plan.patch_size == patch
    assert len(plan.strides) == stages

    ours = NNUNet(1, 4, patch, 32, 512, True, plan.strides, plan.kernel_sizes, [{"scheme": "zscore"}])
    design = reference["architecture"]
    network = get_network_from_plans(
        design["network_class_name"],
        design["arch_kwargs"],
        design["_kw_requires_import"],
        1,
        4,
        deep_supervision=True,
    )
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in ours.parameters())
    missing, unexpected = network.load_state_dict(ours.network.state_dict(), strict=False)
    loaded = {network.state_dict()[key].data_ptr() for key in ours.network.state_dict()}
    assert not unexpected
    assert all(network.state_dict()[key].data_ptr() in loaded for key in missing)  # second names
    image = torch.rand(1, 1, *patch, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = (image - image.mean()) / image.std(correction=0)
    with torch.no_grad():
        outputs = list(zip(ours.train()(image), network.train()(seen), strict=True))
    assert len(outputs) == stages - 1
    for mine, other in outputs:
        assert torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_plans_of_random_sets(theirs, seed):
    """Few and many, long and large images, other spacings and memories."""
    rng = np.random.default_rng(seed)
    count, base = int(rng.integers(1, 300)), rng.integers(20, 900, 2)
    spacing = (9.0, *rng.uniform(0.5, 2.5, 2)) if seed % 2 else PLAIN
    shapes = tuple((1, *(int(v) for v in base * rng.uniform(0.8, 1.2, 2))) for _ in range(count))
    spacings = tuple(tuple(float(v) for v in spacing * rng.uniform(0.9, 1.1, 3)) for _ in range(count))
    fingerprint = Fingerprint(shapes, spacings, int(rng.integers(1, 4)), int(rng.integers(2, 10)))
    memory = (1.0, 8.0, 8.0, 24.0)[seed % 4]
    assert_same(plan_2d(fingerprint, memory), theirs(fingerprint, memory, suppress_transpose=True))


def test_plan_of_volumes_with_thick_slices(theirs):
    """As ACDC's: the spacing across is far from the one within slices."""
    rng = np.random.default_rng(0)
    shapes = tuple(
        (int(rng.integers(6, 12)), *(int(v) for v in rng.integers(180, 300, 2))) for _ in range(20)
    )
    spacings = tuple((float(rng.choice([5.0, 10.0])), *[float(rng.uniform(1.3, 1.7))] * 2) for _ in range(20))
    fingerprint = Fingerprint(shapes, spacings, 1, 4)
    assert_same(plan_2d(fingerprint), theirs(fingerprint))


def test_features():
    assert stage_features(7) == (32, 64, 128, 256, 512, 512, 512)
    assert stage_features(4, 8, 32) == (8, 16, 32, 32)


# ------------------------------------------------------------------------------ grey values


def test_grey_values_are_what_drawing_from_every_case_tends_to():
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    rng = np.random.default_rng(0)
    found, drawn = Intensities(2), []
    for scale, edge in ((1.0, 40), (2.0, 20), (0.5, 12)):  # the larger case counts no more
        images, mask = rng.normal(scale, 1, (2, 3, edge, edge)), rng.integers(0, 3, (3, edge, edge))
        found.add(images, mask)
        drawn.append(
            DatasetFingerprintExtractor.collect_foreground_intensities(
                mask[None], images, num_samples=300_000
            )[0]
        )
    for k, summary in enumerate(found.summary()):
        values = np.concatenate([case[k] for case in drawn])
        lower, upper = np.percentile(values, (0.5, 99.5))
        expected = {"mean": values.mean(), "std": values.std(), "lower": lower, "upper": upper}
        assert summary == pytest.approx(expected, abs=0.02)


def test_grey_values_of_one_case_are_exact():
    values = np.linspace(-1, 1, 1001)[None]
    found = Intensities(1)
    found.add(values, np.ones((1001,), int))
    found.add(values, np.zeros((1001,), int))  # nothing to see here
    (summary,) = found.summary()
    assert summary == pytest.approx({"mean": 0, "std": values.std(), "lower": -0.99, "upper": 0.99}, abs=2e-3)
    with pytest.raises(ValueError, match="foreground"):
        Intensities(1).summary()


# ---------------------------------------------------------------------------- normalisation


def test_normalisation_is_theirs():
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import (
        CTNormalization,
        ZScoreNormalization,
    )

    values = {"mean": 0.1, "std": 0.3, "lower": -0.4, "upper": 0.7}
    properties = {
        "mean": 0.1,
        "std": 0.3,
        "percentile_00_5": -0.4,
        "percentile_99_5": 0.7,
    }
    image = torch.rand(2, 2, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = normalise(image, [{"scheme": "zscore"}, {"scheme": "ct", **values}])
    for case, expected in zip(ours.numpy(), image.numpy().copy(), strict=True):
        z_score = ZScoreNormalization(False, {}).run(expected[0])
        ct = CTNormalization(False, properties).run(expected[1])
        assert np.allclose(case, [z_score, ct], atol=1e-5)
    constant = normalise(torch.full((1, 4, 4), 0.3), [{"scheme": "zscore"}])
    assert constant.abs().max() < 100
    assert torch.isfinite(constant).all()


def test_schemes_follow_the_names_of_channels():
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
        get_normalization_scheme,
    )

    for name in ("CT", "ct", "MRI", "T1", "R", "zscore"):
        expected = get_normalization_scheme(name).__name__
        assert {"ct": "CTNormalization", "zscore": "ZScoreNormalization"}[scheme_of(name)] == expected
    with pytest.raises(InputError, match="channel rgb_to_0_1"):
        scheme_of("rgb_to_0_1")


@pytest.mark.parametrize(
    ("channels", "reason"),
    [
        ([], "tells of 0 channels, the images have 1"),
        ([{"scheme": "minmax"}], "channel 0 has the scheme minmax"),
        ([{"scheme": "ct", "mean": 0, "std": 1}], "channel 0 is ct and lacks lower, upper"),
    ],
)
def test_incomplete_normalisation(channels, reason):
    with pytest.raises(InputError, match=f"^error: here: {reason}"):
        check_channels(channels, 1, "here")
    with pytest.raises(InputError, match=f"^error: normalisation: {reason}"):
        NNUNet(1, 2, (32, 32), normalisation=channels)


def test_a_network_normalises_as_planned():
    torch.manual_seed(0)
    ct = {"scheme": "ct", "mean": 0.1, "std": 0.3, "lower": -0.4, "upper": 0.7}
    network = NNUNet(1, 2, (32, 32), 4, 8, normalisation=[ct]).eval()
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(network(image), network(image.clamp(-0.4, 0.7)))
        assert torch.equal(network(image), network.segment((image.clamp(-0.4, 0.7) - 0.1) / 0.3))
        assert torch.allclose(network.features(image), network.features(image.clamp(-0.4, 0.7)))
    assert network.patch_size == (32, 32)
    assert SimpleNamespace(**network.settings()).normalisation == [ct]
