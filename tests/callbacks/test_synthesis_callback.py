import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import SynthesisCallback
from conftest import files_of, make_miner, make_trainer
from datamodules import ConditionDataModule
from datamodules.sources.synthetic import SyntheticSet
from diffusion.noise import NoiseStream
from errors import InputError
from lightning_modules import MinerLitModule, SynthesisLitModule
from methods import Base, DiffAug, Mined
from methods.method import PROBE
from objectives import rewards

KEYS = {
    "calls",
    "index",
    "seed",
    "source_mask",
    "method",
    "reward",
    "value",
    "kl",
    "seconds",
    "image",
    "mask",
    "weights",
}


@pytest.fixture
def synthesize(weights, source, tmp_path):
    """Return a function that fills a set and returns its folder."""

    def run(name, method=None, batch_size=4, budget=1.0, seed=0, module=None, callback=None, **settings):
        method = Base() if method is None else method
        module = module or SynthesisLitModule(
            weights.backbone, weights.segmenter, method, steps=3, seed=seed, **settings
        )
        trainer = make_trainer(tmp_path / name, callbacks=[callback or SynthesisCallback()])
        data = ConditionDataModule(source, budget=budget, batch_size=batch_size)
        trainer.predict(module, data, return_predictions=False)
        return tmp_path / name / "synthetic"

    return run


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pictures(folder):
    return {name: data for name, data in files_of(folder).items() if name.endswith(".png")}


def assert_same_pictures(folder, expected, n):
    """The first n samples agree, images to the rounding of float32 sums, whose order follows the batch's
    shape: one 8-bit level, in less than one value of a thousand."""
    for i in range(n):
        masks, images = (
            [np.asarray(Image.open(root / f"{kind}/{i:06d}.png")).astype(int) for root in (folder, expected)]
            for kind in ("masks", "images")
        )
        assert np.array_equal(*masks)
        difference = np.abs(images[0] - images[1])
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def without_time(folder):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in manifest(folder)]


@pytest.mark.parametrize("name", ["base", "miner"])
def test_what_is_written(synthesize, weights, source, name):
    method = Base() if name == "base" else Mined(weights.miner)
    folder = synthesize(name, method, seed=5)
    stems = [f"{i:06d}.png" for i in range(6)]
    assert set(files_of(folder)) == {
        "manifest.jsonl",
        "dataset.json",
        *(f"{kind}/{stem}" for kind in ("images", "masks") for stem in stems),
    }
    entries = manifest(folder)
    assert [entry["index"] for entry in entries] == list(range(6))
    for entry in entries:
        assert set(entry) == KEYS
        assert (entry["method"], entry["seed"], entry["reward"]) == (name, 5, "bounded_ce")
        assert 0 <= entry["value"] <= 1
        assert entry["calls"] == (3 if name == "base" else 4)
        assert (entry["kl"] > 0) == (name == "miner")
        assert entry["seconds"] > 0
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["n"] == 6
    assert (facts["method"], facts["steps"], facts["seed"]) == (name, 3, 5)
    assert (facts["source"], facts["class_names"]) == (source.name, list(source.class_names))
    assert facts["weights"] == entries[0]["weights"]
    assert set(facts["weights"]) == {"backbone", "segmenter"} | ({"miner"} if name == "miner" else set())


@pytest.mark.parametrize("name", ["base", "miner", "diffaug"])
def test_noise_that_was_started_from_is_written_on_request(synthesize, weights, name):
    method = {"base": Base(), "miner": Mined(weights.miner), "diffaug": DiffAug()}[name]
    folder = synthesize(name, method, seed=5, callback=SynthesisCallback(noise=12))
    files = sorted((folder / "noise").iterdir())
    if name == "base":
        less = synthesize("less", method, seed=5, callback=SynthesisCallback(noise=11))
        assert not list((less / "noise").iterdir())
    if name == "diffaug":
        assert not files
        return
    assert [file.name for file in files] == [f"{i:06d}.npy" for i in range(6)]
    probe = NoiseStream(5, [3], (3, 32, 32)).draw(PROBE)[0].numpy()
    assert (np.load(files[3]) == probe).all() == (name == "base")
    assert np.load(files[3]).shape == (3, 32, 32)


def test_files_are_what_the_backbone_made_and_what_was_scored(synthesize, weights, source):
    folder = synthesize("base")
    module = SynthesisLitModule(weights.backbone, weights.segmenter, Base(), steps=3)
    data = ConditionDataModule(source, batch_size=6)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    with torch.no_grad():
        noise = torch.stack([module.noise(batch).draw(0)[i] for i in range(6)])
        images = module.sampler.sample(noise, module.backbone.condition(batch["mask"]))
    written = SyntheticSet(folder)
    for i, entry in enumerate(manifest(folder)):
        assert (written[i]["image"] - images[i]).abs().max() <= 0.5 / 127.5 + 1e-4
        assert torch.equal(written[i]["mask"], batch["mask"][i])
        assert entry["source_mask"] == batch["source_mask"][i] == source.dataset("train")[i]["id"]
        with torch.no_grad():
            logits = module.anchor(written[i]["image"][None])
        expected = rewards.bounded_ce(logits, batch["mask"][i : i + 1]).item()
        assert entry["value"] == pytest.approx(expected, rel=1e-4)
    with Image.open(folder / "masks/000000.png") as mask:
        assert (mask.mode, set(np.unique(mask))) == ("L", {0, 1})
    with Image.open(folder / "images/000000.png") as image:
        assert image.mode == "RGB"


def test_untrained_miner_in_paired_mode_writes_the_images_of_base(synthesize, weights):
    base = synthesize("base")
    paired = synthesize("paired", Mined(weights.untrained_miner, noise="paired"))
    fresh = synthesize("fresh", Mined(weights.untrained_miner, noise="fresh"))
    assert pictures(paired) == pictures(base)
    assert {entry["kl"] for entry in manifest(paired)} == {0.0}
    images = [{n: d for n, d in pictures(f).items() if n.startswith("images")} for f in (base, fresh)]
    assert all(images[0][name] != images[1][name] for name in images[0])


def test_trained_miner_changes_the_images(synthesize, weights):
    base, mined = (
        pictures(synthesize("base")),
        pictures(synthesize("mined", Mined(weights.miner, noise="paired"))),
    )
    assert all((base[name] == mined[name]) == name.startswith("masks") for name in base)


def test_seed_decides_the_images_and_not_the_masks(synthesize):
    one, other = pictures(synthesize("one")), pictures(synthesize("other", seed=1))
    assert all((one[name] == other[name]) == name.startswith("masks") for name in one)


@pytest.mark.parametrize("name", ["base", "miner"])
def test_contents_do_not_depend_on_the_batch_size(synthesize, weights, name):
    method = Base() if name == "base" else Mined(weights.miner)
    folders = [synthesize(f"by{size}", method, batch_size=size) for size in (1, 4, 6)]
    for folder in folders[1:]:
        assert_same_pictures(folder, folders[0], 6)
        for entry, expected in zip(without_time(folder), without_time(folders[0]), strict=True):
            for key in ("value", "kl"):
                assert entry.pop(key) == pytest.approx(expected[key], rel=1e-4)
            assert entry == {key: value for key, value in expected.items() if key not in ("value", "kl")}


def test_a_small_budget_is_the_head_of_a_large_one(synthesize):
    one, two = synthesize("one", budget=1.0), synthesize("two", budget=2.0)
    small, large = pictures(one), pictures(two)
    assert (len(small), len(large)) == (12, 24)
    assert_same_pictures(two, one, 6)
    for entry, expected in zip(without_time(two)[:6], without_time(one), strict=True):
        assert entry.pop("value") == pytest.approx(expected.pop("value"), rel=1e-4)
        assert entry == expected
    late = {large[f"images/{i:06d}.png"] for i in range(6, 12)}
    assert not late & {small[f"images/{i:06d}.png"] for i in range(6)}


class Interrupted(Base):
    """Fails at its second batch."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def synthesize(self, request):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("power cut")
        return super().synthesize(request)


def test_an_interrupted_run_leaves_no_folder(synthesize, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        synthesize("run", Interrupted(), batch_size=2)
    assert not (tmp_path / "run" / "synthetic").exists()
    again = synthesize("run", seed=1)  # what was left does not get into the next set
    assert set(files_of(again)) == set(files_of(synthesize("other", seed=1)))
    assert pictures(again) == pictures(synthesize("other", seed=1))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["synthetic"]


def test_an_interrupted_run_leaves_the_set_before_untouched(synthesize, weights):
    before = files_of(synthesize("run", budget=2.0))
    with pytest.raises(RuntimeError, match="power cut"):
        synthesize("run", Interrupted(), batch_size=2, seed=1)
    folder = synthesize("other").parent.parent / "run" / "synthetic"
    assert files_of(folder) == before
    smaller = synthesize("run", Mined(weights.miner))  # and a whole run replaces it as a whole
    assert len(manifest(smaller)) == 6
    assert len(files_of(smaller)) == 14


@pytest.mark.parametrize("content", ["folder", "file"])
def test_a_foreign_folder_is_refused(synthesize, tmp_path, content):
    foreign = tmp_path / "run" / "synthetic"
    if content == "folder":
        foreign.mkdir(parents=True)
        (foreign / "thesis.txt").write_text("years of work")
    else:
        foreign.parent.mkdir(parents=True)
        foreign.write_text("years of work")
    before = files_of(tmp_path / "run")
    with pytest.raises(InputError, match=re.escape(str(foreign))):
        synthesize("run")
    assert files_of(tmp_path / "run") == before


def test_miner_module_predicts_as_the_mined_method_does(synthesize, weights):
    from networks.miner import Miner
    from networks.pretrained import load_pretrained

    module = MinerLitModule(
        weights.backbone, weights.segmenter, load_pretrained(weights.miner, Miner), steps=3, truncate=2
    )
    assert pictures(synthesize("module", module=module)) == pictures(
        synthesize("method", Mined(weights.miner))
    )


def test_one_callback_may_write_two_sets(synthesize, weights, tmp_path):
    """Each set notes the networks that it was made with."""
    callback, prints = SynthesisCallback(), []
    for seed in (0, 1):
        miner = make_miner(seed=seed, trained=True).eval()
        folder = synthesize(f"run{seed}", Mined(miner), callback=callback)
        prints.append(
            (json.loads((folder / "dataset.json").read_text())["weights"]["miner"], miner.fingerprint())
        )
    assert all(noted == true for noted, true in prints)


def test_images_that_are_no_numbers_are_refused(synthesize, tmp_path, capsys):
    class Diverged(Base):
        def synthesize(self, request):
            image, notes = super().synthesize(request)
            image[1, 0, 2, 3] = torch.nan
            return image, notes

    with pytest.raises(InputError, match=r"samples 1: base .* no numbers.*--trainer\.precision"):
        synthesize("diverged", Diverged())
    assert not (tmp_path / "diverged" / "synthetic").exists()


def test_rewards_are_named_and_applied(synthesize):
    values = {}
    for reward in ("ce", "bounded_ce"):
        entries = manifest(synthesize(reward, reward=reward))
        assert {entry["reward"] for entry in entries} == {reward}
        values[reward] = np.array([entry["value"] for entry in entries])
    assert np.allclose(values["bounded_ce"], 1 - np.exp(-values["ce"]), rtol=1e-4)
