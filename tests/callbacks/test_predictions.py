"""Class maps of a trained segmenter, of test sets and of folders without masks."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from callbacks import PredictionWriter
from conftest import make_segmenter, make_trainer
from datamodules import SegDataModule
from datamodules.sources import FolderSource, PhantomSource
from errors import InputError
from evaluation.colours import palette
from lightning_modules import SegLitModule
from networks.pretrained import save_pretrained

SIZE = 32
PHANTOMS = PhantomSource("polyp", SIZE, n_train=1, n_val=1, n_test=5)
SHAPES = {"a": (48, 40), "b.2": (SIZE, SIZE), "c": (20, 64)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_pretrained(make_segmenter(), folder, {})
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """Three images of different sizes: RGB, grey, and one with an alpha channel."""
    folder, rng = tmp_path / "hospital", np.random.default_rng(0)
    folder.mkdir()
    for (name, shape), mode in zip(SHAPES.items(), ("RGB", "L", "RGBA"), strict=True):
        pixels = rng.integers(0, 256, (*shape, 4), np.uint8)
        Image.fromarray(pixels, "RGBA").convert(mode).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict(root, weights, batch_size=2, **settings):
    data = SegDataModule(PHANTOMS, batch_size=batch_size, **settings)
    trainer = make_trainer(root, callbacks=[PredictionWriter()])
    trainer.predict(SegLitModule(make_segmenter(1), weights), data, return_predictions=False)
    return root / "predictions"


@torch.no_grad()
def expected(image, shape):
    logits = make_segmenter().eval()(image[None])
    return F.interpolate(logits, shape, mode="bilinear", align_corners=False)[0].argmax(0).numpy()


def test_test_sets(tmp_path, weights):
    folder = predict(tmp_path, weights)
    assert sorted(p.name for p in folder.iterdir()) == ["predictions.json", *sorted(PHANTOMS.test_splits)]
    for split in PHANTOMS.test_splits:
        dataset = PHANTOMS.dataset(split)
        assert len(list((folder / split).iterdir())) == 5
        for i in range(5):
            image = Image.open(folder / split / f"{dataset[i]['id']}.png")
            assert np.array_equal(image, expected(dataset[i]["image"], (SIZE, SIZE)))
            assert np.array_equal(image.convert("RGB"), palette(2)[np.asarray(image)])
    made = json.loads((folder / "predictions.json").read_text())
    assert made["sets"] == dict.fromkeys(PHANTOMS.test_splits, 5)
    assert made["class_names"] == list(PHANTOMS.class_names)
    assert made["segmenter_fingerprint"] == make_segmenter().fingerprint()


def test_images_without_masks_at_their_own_size(tmp_path, images, weights):
    """As read with masks, segmented, and interpolated back; whatever the batch size."""
    folder = predict(tmp_path / "run", weights, images=f"{images}/")
    assert sorted(p.name for p in (folder / "hospital").iterdir()) == [f"{name}.png" for name in SHAPES]
    (tmp_path / "pairs" / "masks").mkdir(parents=True)
    (tmp_path / "pairs" / "images").symlink_to(images)
    for name, (height, width) in SHAPES.items():
        Image.new("L", (width, height), 255).save(tmp_path / "pairs" / "masks" / f"{name}.png")
    source = FolderSource(
        str(tmp_path / "pairs"), size=SIZE, fractions={"train": 0.4, "val": 0.3, "test": 0.3}
    )
    samples = {s["id"]: s for part in source.splits for s in [source.dataset(part)[0]]}
    assert samples.keys() == SHAPES.keys()
    seen = set()
    for name, shape in SHAPES.items():
        found = np.asarray(Image.open(folder / "hospital" / f"{name}.png"))
        assert found.shape == shape
        assert np.array_equal(found, expected(samples[name]["image"], shape))
        seen |= set(np.unique(found))
    assert seen == {0, 1}
    again = predict(tmp_path / "one", weights, batch_size=1, images=str(images))
    for name in SHAPES:
        one, other = (Image.open(f / "hospital" / f"{name}.png") for f in (folder, again))
        assert np.array_equal(one, other)


def test_predicting_again_replaces_what_is_of_the_same_images(tmp_path, images, weights):
    folder = predict(tmp_path / "run", weights, images=str(images))
    (images / "c.png").unlink()
    predict(tmp_path / "run", weights, images=f"{images}/../{images.name}")
    assert sorted(path.name for path in (folder / "hospital").iterdir()) == ["a.png", "b.2.png"]
    other = tmp_path / "elsewhere" / "hospital"
    shutil.copytree(images, other)
    with pytest.raises(InputError, match=rf"holds what was predicted for {images}; name another .* {other}"):
        predict(tmp_path / "run", weights, images=str(other))
    with pytest.raises(InputError, match="name another folder for test sets of phantom-polyp"):
        predict(tmp_path / "run", weights)
    assert sorted(path.name for path in folder.iterdir()) == ["hospital", "predictions.json"]


def test_bad_input_leaves_what_was_there(tmp_path, images, weights):
    folder = predict(tmp_path, weights)
    (images / "d.png").write_bytes((images / "a.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"d\.png cannot be decoded"):
        predict(tmp_path, weights, images=str(images))
    with pytest.raises(InputError, match=r"nowhere is not a folder: check the argument data\.images"):
        predict(tmp_path, weights, images=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"model\.weights: is not given"):
        predict(tmp_path, None)
    assert len(list((folder / "test").iterdir())) == 5
    (tmp_path / "other" / "predictions").mkdir(parents=True)
    (tmp_path / "other" / "predictions" / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match="exists and is no folder of predictions"):
        predict(tmp_path / "other", weights)
