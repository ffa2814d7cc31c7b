import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ConditionDataModule, SegDataModule
from datamodules.augment import Augmentation
from datamodules.conditions import ConditionDataset, vary
from datamodules.sources import PhantomSource
from datamodules.sources.synthetic import SyntheticSet
from datamodules.streams import StreamDataset, item_generator, stream_sampler
from errors import InputError


class Labelled(torch.utils.data.Dataset):
    """Samples whose three-channel image is their mask in other numbers."""

    VALUES = torch.tensor([-0.8, 0.1, 0.9])

    def __init__(self, n=5, size=32):
        self.n = n
        self.size = size

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        mask = torch.zeros(self.size, self.size, dtype=torch.long)
        mask[4 + i : 14 + i, 6:17], mask[20:27, 3 + i : 12 + i] = 1, 2
        return {"image": self.VALUES[mask].expand(3, -1, -1).clone(), "mask": mask, "id": f"case{i}"}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "mask"))


# -------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("transform", [None, Augmentation("full")])
def test_item_depends_on_its_number_alone(transform):
    first, again = (StreamDataset(Labelled(), 3, transform) for _ in range(2))
    items = {n: first[n] for n in range(12)}
    for n in reversed(range(12)):
        assert same(again[n], items[n])
        assert again[n]["index"] == n


def test_other_seeds_and_streams_differ():
    transform = Augmentation("full")
    base = StreamDataset(Labelled(), 3, transform)
    for other in (StreamDataset(Labelled(), 4, transform), StreamDataset(Labelled(), 3, transform, stream=1)):
        assert sum(same(base[n], other[n]) for n in range(12)) <= 2


def test_each_pass_takes_every_sample_once_in_an_order_of_its_own():
    data = Labelled(7)
    stream = StreamDataset(data, 0)
    orders = []
    for turn in range(6):
        images = [stream[turn * 7 + place]["image"] for place in range(7)]
        order = [next(i for i in range(7) if torch.equal(data[i]["image"], image)) for image in images]
        assert sorted(order) == list(range(7))
        orders.append(tuple(order))
    assert len(set(orders)) > 3


def test_sampler_starts_where_the_training_stands():
    trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, accumulate_grad_batches=1)
    sampler = stream_sampler(trainer, batch_size=2, steps=3)
    assert list(sampler) == list(range(6))
    trainer.global_step = 3
    assert list(sampler) == list(range(6, 12))
    trainer.global_step = 5  # resumed within an epoch
    assert list(sampler) == list(range(10, 16))
    assert len(sampler) == 6
    assert list(stream_sampler(None, batch_size=2, steps=3)) == list(range(6))


def test_every_batch_is_seen_where_several_make_a_step():
    trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0, accumulate_grad_batches=2)
    sampler = stream_sampler(trainer, batch_size=2, steps=5)  # steps of 2, 2 and 1 batches
    seen = list(sampler)
    trainer.global_step = 3
    assert [*seen, *sampler] == list(range(20))
    trainer.global_step = 4  # resumed within the second epoch
    assert next(iter(sampler)) == 14


# --------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("level", ["flip", "full", "nnunet"])
def test_same_generator_same_augmentation(level):
    augment, twin = Augmentation(level), Augmentation(level)
    torch.manual_seed(0)
    for n in range(10):
        first = augment(Labelled()[0], item_generator(0, n))
        np.random.seed(n)
        assert same(twin(Labelled()[0], item_generator(0, n)), first)


def test_none_changes_nothing():
    sample = Labelled()[1]
    assert Augmentation("none")(sample, item_generator(0, 0)) is sample


@pytest.mark.parametrize("level", ["full", "nnunet"])
def test_types_and_ranges_of_augmented_samples(level):
    augment, changed = Augmentation(level), 0
    for n in range(60):
        sample = Labelled()[n % 5]
        out = augment(sample, item_generator(0, n))
        assert out["image"].dtype == torch.float32
        assert out["mask"].dtype == torch.int64
        assert type(out["image"]) is type(out["mask"]) is torch.Tensor  # no MetaTensor
        assert out["image"].min() >= -1
        assert out["image"].max() <= 1
        assert set(out["mask"].unique().tolist()) <= {0, 1, 2}
        changed += not same(sample, out)
    assert changed > 40


def test_nnunets_list_has_its_probabilities():
    found = {type(t).__name__.removesuffix("d"): t.prob for t in Augmentation("nnunet").compose.transforms}
    assert found == {
        "RandAffine": 0.2,
        "RandZoom": 0.2,
        "RandGaussianNoise": 0.1,
        "RandGaussianSmooth": 0.2,
        "RandScaleIntensity": 0.15,
        "RandScaleIntensityFixedMean": 0.15,
        "RandSimulateLowResolution": 0.25,
        "RandAdjustContrast": 0.3,
        "RandFlip": 0.5,
    }


def test_nnunets_zoom_keeps_proportions_and_its_noise_is_small():
    square = {"image": torch.zeros(1, 64, 64), "mask": torch.zeros(64, 64, dtype=torch.long), "id": "a"}
    square["mask"][20:44, 20:44] = 1
    zoom, noise = (
        next(t for t in Augmentation("nnunet").compose.transforms if type(t).__name__ == name)
        for name in ("RandZoomd", "RandGaussianNoised")
    )
    zoom.prob = noise.prob = 1
    edges, deviations = [], []
    for seed in range(40):
        for transform in (zoom, noise):
            transform.set_random_state(seed)
        inside = zoom({"image": square["image"], "mask": square["mask"][None]})["mask"][0].nonzero()
        edges.append((inside.amax(0) - inside.amin(0) + 1).tolist())
        deviations.append(noise({"image": square["image"]})["image"].std().item())
    assert max(abs(height - width) for height, width in edges) <= 1
    assert min(edges)[0] < 0.8 * 24
    assert max(edges)[0] > 1.3 * 24
    assert max(deviations) < 0.1 * 0.4 * 1.05  # of images whose own deviation is 0.4


def test_flips_keep_image_and_mask_aligned():
    augment, seen = Augmentation("flip"), set()
    for n in range(24):
        sample = Labelled()[2]
        out = augment(sample, item_generator(0, n))
        assert torch.equal(out["image"], Labelled.VALUES[out["mask"]].expand(3, -1, -1))
        dims = next(d for d in ([], [0], [1], [0, 1]) if torch.equal(sample["mask"].flip(d), out["mask"]))
        seen.add(tuple(dims))
    assert len(seen) == 4


def test_rotation_and_scaling_keep_image_and_mask_aligned():
    """Image values are those of the mask but for the bilinear edge: compared by rank inside of regions."""
    augment, turned = Augmentation("full"), 0
    for n in range(40):
        out = augment(Labelled()[2], item_generator(1, n))
        mask, image = out["mask"], out["image"].mean(0)
        flips = [torch.equal(mask, Labelled()[2]["mask"].flip(d)) for d in ([], [0], [1], [0, 1])]
        if any(flips) or set(mask.unique().tolist()) != {0, 1, 2}:
            continue
        turned += 1
        means = [image[mask == k].mean() for k in (0, 1, 2)]
        assert means[0] < means[1] < means[2]
        nearest = torch.stack([(image - mean).abs() for mean in means]).argmin(0)
        assert (nearest == mask).float().mean() > 0.85
    assert turned > 5


# ------------------------------------------------------------------------------------ conditions


def picture_of(mask):
    """An image that shows the mask."""
    return mask[None].float() - 1


def test_vary_keeps_the_classes_and_the_image_aligned():
    mask, areas, agreement = Labelled()[3]["mask"], [], []
    mask[31, 31] = 2
    for n in range(40):
        varied, image = vary(mask, picture_of(mask), item_generator(0, n), flip=True, scale=0.5)
        assert varied.unique().tolist() == [0, 1, 2]
        assert varied.dtype == torch.int64
        assert image.shape == (1, *mask.shape)
        areas.append((varied == 1).sum().item())
        agreement.append(((image[0] + 1).round() == varied).float().mean().item())
    assert min(areas) < 0.8 * (mask == 1).sum()
    assert max(areas) > 1.3 * (mask == 1).sum()
    assert min(agreement) > 0.9


def test_vary_goes_on_at_the_border_in_mask_and_image_alike():
    mask = torch.zeros(32, 32, dtype=torch.long)
    mask[:12, 10:26] = 1  # an object that the picture cuts
    for n in range(30):
        varied, image = vary(mask, picture_of(mask), item_generator(0, n), flip=True, scale=0.3)
        assert varied[0].any()
        assert ((image[0] + 1).round() == varied).float().mean() > 0.95
        assert varied[0].sum() == varied[5].sum()


def test_vary_without_variation():
    mask = Labelled()[0]["mask"]
    image = picture_of(mask)
    flipped = [vary(mask, image, item_generator(0, n), flip=True, scale=0.0) for n in range(30)]
    assert {torch.equal(m, mask) for m, _ in flipped} == {True, False}
    assert all(torch.equal(m, mask) or torch.equal(m, mask.flip(-1)) for m, _ in flipped)
    assert all(torch.allclose(i, picture_of(m), atol=1e-5) for m, i in flipped)
    for n in range(5):
        assert torch.equal(vary(mask, image, item_generator(0, n), flip=False, scale=0.0)[0], mask)


def test_vary_that_loses_a_class_returns_the_pair():
    mask = torch.zeros(32, 32, dtype=torch.long)
    mask[0, 0], mask[10:20, 10:20] = 2, 1
    varied = [vary(mask, picture_of(mask), item_generator(0, n), flip=False, scale=1.0) for n in range(30)]
    assert all(m.unique().tolist() == [0, 1, 2] for m, _ in varied)
    assert any(torch.equal(m, mask) and torch.equal(i, picture_of(mask)) for m, i in varied)


def test_conditions_depend_on_their_index_alone():
    long, short = (ConditionDataset(Labelled(), n, 0, 0, True, 0.1) for n in (20, 4))
    for i in range(4):
        assert torch.equal(long[i]["mask"], short[i]["mask"])
    assert [long[i]["source_mask"] for i in range(10)] == [f"case{i % 5}" for i in range(10)]
    assert len(long) == 20
    mining = ConditionDataset(Labelled(), 20, 0, 1, True, 0.1)
    assert not all(torch.equal(mining[i]["mask"], long[i]["mask"]) for i in range(20))
    assert not all(torch.equal(long[i]["mask"], long[i + 5]["mask"]) for i in range(5))


@pytest.mark.parametrize(("budget", "count"), [(0.5, 3), (1.0, 6), (2.5, 15)])
def test_budget_of_conditions(source, budget, count):
    data = ConditionDataModule(source, budget=budget, batch_size=4)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(count))
    everything = ConditionDataModule(source, budget=3.0, batch_size=5)
    everything.setup("predict")
    head = torch.cat([batch["mask"] for batch in everything.predict_dataloader()])[:count]
    assert torch.equal(torch.cat([batch["mask"] for batch in batches]), head)


def test_mining_never_sees_the_masks_of_synthesis_and_few_real_ones_when_told(source):
    data = ConditionDataModule(source, max_real=2, batch_size=4, steps_per_epoch=3)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({name for batch in batches for name in batch["source_mask"]}) == 2
    assert data.preview(3)["index"].tolist() == [0, 1, 2]
    assert not torch.equal(data.preview(4)["mask"], batches[0]["mask"])


def test_conditions_refuse_nonsense(source):
    with pytest.raises(InputError, match="scale -1"):
        ConditionDataModule(source, scale=-1)
    data = ConditionDataModule(source, budget=0.01)
    with pytest.raises(InputError, match=r"budget 0\.01"):
        data.setup("predict")


# ------------------------------------------------------------------------- synthesised sets


def write_synthetic(folder, n=9, size=(32, 32), channels=3, top=1):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    lines = []
    for i in range(n):
        shape = (*size, 3) if channels == 3 else size
        mask = np.zeros(size, np.uint8)
        mask[3:9, 4 + i :] = top
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"images/{i:06d}.png")
        Image.fromarray(mask).save(folder / f"masks/{i:06d}.png")
        lines.append({"index": i, "image": f"images/{i:06d}.png", "mask": f"masks/{i:06d}.png"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "dataset.json").write_text(json.dumps({"n": n}))
    return folder


@pytest.fixture
def synthetic(tmp_path):
    return write_synthetic(tmp_path / "synthetic")


def refused(*fragments):
    return pytest.raises(InputError, match="(?s)" + ".*".join(re.escape(str(part)) for part in fragments))


def test_synthetic_samples_are_what_was_written(synthetic):
    data = SyntheticSet(synthetic)
    with Image.open(synthetic / "images/000004.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(data[4]["image"].numpy(), expected, atol=1e-6)
    assert torch.equal(data[4]["mask"][5], torch.tensor([0] * 8 + [1] * 24))
    assert data[4]["id"] == "000004"
    assert (len(data), data.highest_class) == (9, 1)
    assert [SyntheticSet(synthetic, 2)[i]["id"] for i in range(2)] == ["000000", "000001"]


def test_grey_synthetic_samples(tmp_path):
    data = SyntheticSet(write_synthetic(tmp_path / "grey", channels=1))
    assert data[0]["image"].shape == (1, 32, 32)


@pytest.mark.parametrize("name", ["dataset.json", "manifest.jsonl"])
def test_incomplete_sets_are_refused(synthetic, name):
    (synthetic / name).unlink()
    with refused(synthetic, "complete", "predict"):
        SyntheticSet(synthetic)


def test_absent_sets_are_refused(tmp_path):
    with refused(tmp_path / "nowhere"):
        SyntheticSet(tmp_path / "nowhere")


def test_too_small_sets_are_refused(synthetic):
    with refused(synthetic, "holds 9", "10 were asked"):
        SyntheticSet(synthetic, 10)


@pytest.mark.parametrize("name", ["images/000003.png", "masks/000005.png"])
@pytest.mark.parametrize("size", [None, 0, 60])
def test_unreadable_files_are_named(synthetic, name, size):
    file = synthetic / name
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    with refused(file):
        SyntheticSet(synthetic)


def test_broken_manifests_are_named(synthetic):
    file = synthetic / "manifest.jsonl"
    file.write_text(file.read_text()[:-20])
    with refused(file):
        SyntheticSet(synthetic)


# ----------------------------------------------------------------------------------- SegDataModule


def loaded(*args, stage="fit", **kwargs):
    data = SegDataModule(*args, **kwargs)
    data.setup(stage)
    return data


@pytest.mark.parametrize(("fraction", "real"), [(0.5, 4), (0.25, 2), (0.9, 7), (0.01, 1), (0.999, 7)])
def test_two_streams_share_the_batch(source, synthetic, fraction, real):
    data = loaded(source, str(synthetic), real_fraction=fraction, batch_size=8, steps_per_epoch=5)
    loaders = data.train_dataloader()
    assert list(loaders) == ["real", "synthetic"]
    for name, size in (("real", real), ("synthetic", 8 - real)):
        batches = list(loaders[name])
        assert [len(batch["image"]) for batch in batches] == [size] * 5
    assert (data.n_real, data.n_synthetic) == (6, 9)


def test_an_epoch_is_as_long_with_synthetic_data_as_without(source, synthetic):
    alone = loaded(source, batch_size=8, steps_per_epoch=5).train_dataloader()
    both = loaded(source, str(synthetic), batch_size=8, steps_per_epoch=5).train_dataloader()
    assert {len(loader) for loader in (*alone.values(), *both.values())} == {5}
    assert list(alone) == ["real"]
    assert [len(batch["image"]) for batch in alone["real"]] == [8] * 5


@pytest.mark.parametrize(("budget", "count"), [(None, 9), (0.5, 3), (1.0, 6), (1.5, 9)])
def test_budget_counts_multiples_of_the_real_samples(source, synthetic, budget, count):
    assert loaded(source, str(synthetic), budget=budget).n_synthetic == count


@pytest.mark.parametrize(("budget", "counts"), [(None, (9, 4)), (0.5, (2, 1)), (1.0, (3, 3))])
def test_several_sets_share_the_budget(source, synthetic, tmp_path, budget, counts):
    other = write_synthetic(tmp_path / "other", n=4)
    data = loaded(source, [str(synthetic), str(other)], budget=budget)
    joined = data.streams["synthetic"]
    assert data.n_synthetic == len(joined) == sum(counts)
    expected = [SyntheticSet(synthetic)[i] for i in range(counts[0])]
    expected += [SyntheticSet(other)[i] for i in range(counts[1])]
    for sample, same in zip([joined[i] for i in range(len(joined))], expected, strict=True):
        assert torch.equal(sample["image"], same["image"])


def test_a_set_too_small_for_its_share_is_named(source, synthetic, tmp_path):
    other = write_synthetic(tmp_path / "other", n=4)
    with refused(other, "5 were asked"):
        loaded(source, [str(synthetic), str(other)], budget=10 / 6)


def test_budget_follows_max_real(source, synthetic):
    data = loaded(
        source, str(synthetic), budget=2.0, max_real=3, augmentation="none", batch_size=4, steps_per_epoch=6
    )
    assert (data.n_real, data.n_synthetic) == (3, 6)
    images = torch.cat([batch["image"] for batch in data.train_dataloader()["real"]])
    assert len(torch.unique(images, dim=0)) == 3


def test_evaluation_sets_are_complete_and_numbered(source):
    data = loaded(source, stage="test", batch_size=1)
    for loader, name in zip(data.test_dataloader(), source.test_splits, strict=True):
        assert torch.cat([batch["index"] for batch in loader]).tolist() == list(range(5)), name
    data = loaded(source, stage="validate")
    masks = torch.cat([batch["mask"] for batch in data.val_dataloader()])
    assert torch.equal(masks, torch.stack([sample["mask"] for sample in source.dataset("val")]))
    assert torch.equal(data.preview(2)["mask"], masks[::2])
    assert len(data.preview(100)["mask"]) == 4


def test_contradictions_are_refused(source, synthetic):
    with refused("budget 1.0", "--data.synthetic"):
        SegDataModule(source, budget=1.0)
    for fraction in (0.0, 1.0, -0.5, 2.0):
        with refused(f"real_fraction {fraction}"):
            SegDataModule(source, str(synthetic), real_fraction=fraction)


def test_synthetic_sets_that_do_not_fit_are_refused(source, synthetic, tmp_path):
    with refused(synthetic, "12 were asked"):
        loaded(source, str(synthetic), budget=2.0)
    with refused(synthetic, "no synthetic sample"):
        loaded(source, str(synthetic), budget=0.01)
    for name, changes, word in (
        ("grey", {"channels": 1}, "(1, 32, 32)"),
        ("large", {"size": (64, 64)}, "(3, 64, 64)"),
        ("classes", {"top": 2}, "class 2"),
    ):
        folder = write_synthetic(tmp_path / name, n=2, **changes)
        with refused(folder, word, source.name):
            loaded(source, str(folder))


def test_negative_budget_is_refused(source, synthetic):
    with refused("budget -0.5"):
        loaded(source, str(synthetic), budget=-0.5)


def test_a_batch_too_small_for_two_streams_is_refused(source, synthetic):
    with refused("batch_size 1"):
        loaded(source, str(synthetic), batch_size=1).train_dataloader()


@pytest.mark.parametrize("module", [SegDataModule, ConditionDataModule])
def test_negative_seeds_are_refused(source, module):
    with pytest.raises(InputError, match=r"data\.seed -1: must not be negative"):
        module(source, seed=-1)


@pytest.mark.parametrize("max_real", [0, -1])
@pytest.mark.parametrize("module", [SegDataModule, ConditionDataModule])
def test_no_real_sample_is_refused(source, module, max_real):
    with refused(f"max_real {max_real}"):
        module(source, max_real=max_real).setup("fit")


def test_sets_without_a_test_split_are_refused():
    untested = PhantomSource("polyp", size=32, n_train=2, n_val=2, n_test=2)
    untested.splits = ("train", "val")
    with refused("test set"):
        loaded(untested, stage="test")


def test_synthetic_set_may_move(synthetic, tmp_path):
    """The manifest holds relative paths."""
    moved = shutil.move(synthetic, tmp_path / "elsewhere")
    assert len(SyntheticSet(moved)) == 9
