"""nnU-Net's patches and transforms against nnunetv2's trainer and loader."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from conftest import make_backbone, make_segmenter, make_trainer
from datamodules import SegDataModule
from datamodules.nnunet_augment import NNUNetAugmentation, corner, cut, first_patch, rotation, transforms
from datamodules.sources import PhantomSource
from datamodules.streams import StreamDataset, item_generator
from errors import InputError
from lightning_modules import DiffusionLitModule, SegLitModule
from networks import NNUNet, SwinUnet

Z_SCORE = [{"scheme": "zscore"}]
PATCHES = [(256, 256), (256, 224), (96, 160), (320, 128), (32, 48)]


def trainer_settings(patch):
    """What nnU-Net's trainer decides for a patch."""
    told = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *_, **__: None
    )
    return nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(told)


def described(value):
    """Class and settings of a transform, all the way down."""
    if isinstance(value, BasicTransform) or type(value).__name__ == "BGContrast":
        return type(value).__name__, {key: described(item) for key, item in vars(value).items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value


@pytest.mark.parametrize("patch", PATCHES)
def test_transforms_are_those_of_the_trainer(patch):
    """Class by class and setting by setting; only the clock's choice between two blurs is left out."""
    angles, dummy, first, axes = trainer_settings(patch)
    theirs = nnUNetTrainer.get_training_transforms(patch, angles, None, axes, dummy, [False])
    name, expected = described(theirs)
    assert name == "ComposeTransforms"
    blur = expected["transforms"][2][1]["transform"]
    assert blur[0] == "GaussianBlurTransform"
    assert blur[1].pop("benchmark") is True
    found = described(transforms(patch))[1]
    assert found["transforms"][2][1]["transform"][1].pop("benchmark") is False
    assert found == expected
    assert [entry[1].get("apply_probability") for entry in found["transforms"]] == [
        None, 0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3, None, None
    ]  # fmt: skip
    assert first_patch(patch) == tuple(first)
    assert rotation(patch) == pytest.approx(angles)


def test_long_patches_turn_less():
    assert first_patch((256, 256)) == tuple(get_patch_size((256, 256), *[(-np.pi, np.pi)] * 3, (0.85, 1.25)))
    assert rotation((300, 200))[1] == np.pi
    assert rotation((301, 200))[1] == pytest.approx(np.pi / 12)


def loader(first, patch):
    """As much of nnU-Net's loader as decides where to cut."""
    gap = np.array(first) - np.array(patch)
    return SimpleNamespace(need_to_pad=gap, patch_size=first, has_ignore=False, annotated_classes_key=None)


@pytest.mark.parametrize("size", [(40, 60), (30, 30), (20, 70)])
@pytest.mark.parametrize("patch", [(32, 32), (24, 40)])
def test_cuts_are_where_the_loader_makes_them(size, patch):
    first = first_patch(patch)
    theirs, rng = loader(first, patch), np.random.default_rng(0)
    empty = torch.zeros(size, dtype=torch.long)
    places = [corner(empty, first, patch, rng, False) for _ in range(1500)]
    np.random.seed(0)
    expected = [nnUNetDataLoader.get_bbox(theirs, np.array(size), False, None)[0] for _ in range(1500)]
    for axis in (0, 1):
        assert {place[axis] for place in places} == {place[axis] for place in expected}
    for row, column in ((0, 0), (size[0] - 1, 3), (11, size[1] - 1)):  # around a single pixel
        mask = empty.clone()
        mask[row, column] = 2
        found = corner(mask, first, patch, rng, True)
        where = {1: [], 2: [(0, row, column)]}
        assert list(found) == nnUNetDataLoader.get_bbox(theirs, np.array(size), True, where)[0]
    assert corner(empty, first, patch, rng, True) is not None  # no foreground: anywhere


def test_every_class_is_cut_around_equally_often():
    mask, rng = torch.zeros(64, 64, dtype=torch.long), np.random.default_rng(0)
    mask[:20, :20], mask[60, 60] = 1, 2
    rare = [corner(mask, (8, 8), (8, 8), rng, True) == (56, 56) for _ in range(400)]
    assert np.mean(rare) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("place", [(-5, 3), (2, 20), (-3, -4), (10, 25)])
def test_cut_pads_as_theirs(place):
    image = torch.arange(2 * 20 * 30).reshape(2, 20, 30).float()
    box = [[begin, begin + edge] for begin, edge in zip(place, (16, 24), strict=True)]
    assert torch.equal(cut(image, place, (16, 24), -1), crop_and_pad_nd(image, box, -1))
    assert torch.equal(image, torch.arange(2 * 20 * 30).reshape(2, 20, 30).float())


@pytest.fixture(scope="module")
def cardiac():
    return PhantomSource("cardiac", size=48, n_train=6, n_val=3, n_test=3)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "mask"))


def test_an_item_is_the_same_from_run_to_run(cardiac):
    data = cardiac.dataset("train")
    before = [data[i]["image"].clone() for i in range(6)]
    streams = [StreamDataset(data, 3, NNUNetAugmentation((32, 32), Z_SCORE)) for _ in range(2)]
    first = {n: streams[0][n] for n in range(40)}
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    for n in reversed(range(40)):
        assert same(streams[1][n], first[n])
        assert first[n]["image"].shape == (1, 32, 32)
        assert first[n]["mask"].dtype == torch.int64
        assert set(first[n]["mask"].unique().tolist()) <= {0, 1, 2, 3}
    assert (torch.rand(1), np.random.rand()) == expected  # the generators of everything else stand still
    assert all(torch.equal(data[i]["image"], before[i]) for i in range(6))
    images = torch.stack([first[n]["image"] for n in range(40)])
    assert abs(images.mean()) < 0.5
    assert 0.5 < images.std() < 1.5  # normalised
    assert len({first[n]["image"].sum().item() for n in range(40)}) == 40


def test_image_and_mask_stay_aligned():
    """An image that is brighter in every next class: so it is after any transform of space."""
    mask = torch.zeros(64, 64, dtype=torch.long)
    mask[10:40, 12:50], mask[20:30, 20:30] = 1, 2
    sample = {"image": (mask.float() - 1)[None], "mask": mask, "id": "a"}
    augment, seen = NNUNetAugmentation((48, 48), Z_SCORE), 0
    for n in range(30):
        out = augment(sample, item_generator(0, n))
        levels = [out["image"][0][out["mask"] == k].median() for k in out["mask"].unique()]
        seen += len(levels) > 1
        assert all(a < b for a, b in pairwise(levels))
    assert seen > 20


def test_share_of_cuts_around_foreground(cardiac):
    sample = cardiac.dataset("train")[0]
    sample["mask"] = torch.zeros_like(sample["mask"])
    sample["mask"][22:24, 22:24] = 1
    for share in (0.0, 1.0):
        augment = NNUNetAugmentation((16, 16), Z_SCORE, share)
        found = [bool(augment(sample, item_generator(0, n))["mask"].any()) for n in range(60)]
        assert (np.mean(found) > 0.95) if share else (np.mean(found) < 0.5)


# ------------------------------------------------------------------------------- in training


def planned(**changes):
    torch.manual_seed(0)
    settings = {"patch_size": (32, 32), "base_features": 4, "max_features": 8, "normalisation": Z_SCORE}
    return NNUNet(1, 4, **settings | changes)


def test_a_short_training_on_patches(cardiac, tmp_path):
    """Patches of 32² of images of 48², which are no multiple of the network's stride."""
    module = SegLitModule(planned(patch_size=(32, 32)), cutmix=0, inference="sliding_window")
    data = SegDataModule(
        cardiac, augmentation="nnunetv2", patch_size=(32, 32), batch_size=2, steps_per_epoch=2
    )
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data)
    assert module.normalised
    assert next(iter(data.train_dataloader()["real"]))["image"].shape == (2, 1, 32, 32)
    module.eval()
    image = torch.stack([cardiac.dataset("val")[k]["image"] for k in range(2)])
    with torch.no_grad():
        logits = module.predict_logits(image)
        assert logits.shape == (2, 4, 48, 48)
        tile = module.predict_logits(image[..., :32, :32])
        module.inference = "whole"
        assert not torch.allclose(tile, module.predict_logits(image[..., :32, :32]))  # mirrored
        whole = module.predict_logits(image)
        module.inference, module.mirror = "sliding_window", False
        assert (module.predict_logits(image).argmax(1) == whole.argmax(1)).float().mean() > 0.8
    trainer.test(module, data, verbose=False)
    assert module.test_scores[0].compute()["n_cases"] == 3


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: planned(normalisation=None), r"the network by None"),
        (
            lambda: planned(normalisation=[{"scheme": "ct", "mean": 0, "std": 1, "lower": -1, "upper": 1}]),
            "ct",
        ),
        (lambda: SwinUnet(1, 4, 48, 2, 8, (1, 1), (1, 2), 4), "the network by None"),
    ],
)
def test_the_network_must_normalise_alike(cardiac, tmp_path, network, reason):
    data = SegDataModule(cardiac, augmentation="nnunetv2", batch_size=2, steps_per_epoch=1)
    with pytest.raises(InputError, match=rf"augmentation nnunetv2.*{reason}"):
        make_trainer(tmp_path, max_steps=1).fit(SegLitModule(network()), data)


def test_patches_must_fit_the_network(cardiac, tmp_path):
    data = SegDataModule(cardiac, augmentation="nnunetv2", patch_size=(20, 24))
    with pytest.raises(InputError, match=r"data\.patch_size: cuts images of 20 × 24 pixels.*multiples of"):
        make_trainer(tmp_path, max_steps=1).fit(SegLitModule(planned()), data)
    windows = planned(patch_size=(18, 16), strides=[(1, 1), (2, 2), (2, 2)])
    with pytest.raises(InputError, match=r"model\.segmenter: its windows are images of 18 × 16 pixels"):
        SegLitModule(windows, inference="sliding_window").check_data(cardiac)


def test_backbones_do_not_learn_from_normalised_images(tmp_path, source):
    data = SegDataModule(source, augmentation="nnunetv2", batch_size=2, steps_per_epoch=1)
    module = DiffusionLitModule(make_backbone())
    with pytest.raises(InputError, match="augmentation nnunetv2"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


@pytest.mark.parametrize(
    "settings",
    [{"patch_size": (32, 32)}, {"normalisation": Z_SCORE}, {"patch_size": (32, 32), "augmentation": "flip"}],
)
def test_patches_need_their_augmentation(cardiac, settings):
    with pytest.raises(InputError, match="set augmentation to nnunetv2"):
        SegDataModule(cardiac, **settings)


def test_other_trainings_are_as_before(cardiac, tmp_path):
    module = SegLitModule(make_segmenter(in_channels=1, num_classes=4))
    data = SegDataModule(cardiac, batch_size=2, steps_per_epoch=1)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert not module.normalised
    assert data.normalisation is None
