"""What every way to fill a set keeps: base's masks, the budget, samples of seed and index alone."""

import pytest
import torch

import methods
from callbacks import SynthesisCallback
from conftest import files_of, make_miner, make_trainer
from datamodules import ConditionDataModule
from datamodules.sources.synthetic import SyntheticSet
from lightning_modules import SynthesisLitModule
from methods import (
    CIG,
    GAL,
    P2P,
    AdvDiffuser,
    AdversarialGuidance,
    Base,
    BestOfN,
    DAFusion,
    DiffAug,
    DiffPGD,
    Hat,
    InitNO,
    Inpainting,
    Mined,
    Mixture,
    SDEdit,
    SeedScorer,
)
from networks.scorer import Scorer

N_TRAIN = 6


def scorer():
    torch.manual_seed(4)
    return Scorer(width=8, members=1, inputs="glance").eval()


METHODS = {
    "base": Base,
    "best_of_n": lambda: BestOfN(2),
    "glance": lambda: BestOfN(3, by="glance"),
    "miner": lambda: Mined(make_miner(trained=True).eval()),
    "seed_scorer": lambda: SeedScorer(scorer(), 3),
    "ag": lambda: AdversarialGuidance(scale=1.0),  # 3 makes rounding visible
    "advdiffuser": AdvDiffuser,
    "p2p": lambda: P2P(iterations=2),
    "diff_pgd": lambda: DiffPGD(iterations=2),
    "initno": lambda: InitNO(steps=2),
    "gal": lambda: GAL(tries=2),
    "cig": CIG,
    "da_fusion": DAFusion,
    "diffaug": DiffAug,
    "inpainting": Inpainting,
    "sdedit": SDEdit,
    "hat": lambda: Hat(SDEdit(), calibration=4),
    "mixture": lambda: Mixture([Base(), BestOfN(2)], [1.0, 1.0]),
}


def filled(method, weights, source, folder, budget, seed=0, batch_size=4):
    module = SynthesisLitModule(weights.backbone, weights.segmenter, METHODS[method](), steps=4, seed=seed)
    trainer = make_trainer(folder, callbacks=[SynthesisCallback()], inference_mode=False)
    data = ConditionDataModule(source, budget=budget, batch_size=batch_size, seed=seed)
    trainer.predict(module, data, return_predictions=False)
    return SyntheticSet(folder / "synthetic")


@pytest.fixture(scope="module")
def base(weights, source, tmp_path_factory):
    return filled("base", weights, source, tmp_path_factory.mktemp("base"), 2)


@pytest.mark.parametrize("method", METHODS)
def test_masks_budget_and_seeds(method, weights, source, base, tmp_path):
    made = filled(method, weights, source, tmp_path / "first", 2)
    assert len(made) == 2 * N_TRAIN
    for one, plain in zip(made.entries, base.entries, strict=True):
        assert (one["index"], one["source_mask"]) == (plain["index"], plain["source_mask"])
    for one, plain in zip(made, base, strict=True):
        assert torch.equal(one["mask"], plain["mask"])
        assert one["image"].isfinite().all()
    again = filled(method, weights, source, tmp_path / "again", 2)
    assert images(tmp_path / "again") == images(tmp_path / "first")
    assert [e["value"] for e in again.entries] == [e["value"] for e in made.entries]
    other = filled(method, weights, source, tmp_path / "other", 2, seed=1)
    assert any(not torch.equal(a["image"], b["image"]) for a, b in zip(made, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_is_the_head_of_a_large_one(method, weights, source, tmp_path):
    large = filled(method, weights, source, tmp_path / "large", 2)
    small = filled(method, weights, source, tmp_path / "small", 1)
    assert len(small) == N_TRAIN
    for one, same in zip(small.entries, large.entries[:N_TRAIN], strict=True):
        assert one["value"] == pytest.approx(same["value"], abs=1e-4)
    levels = [(a["image"] - b["image"]).abs().max().item() for a, b in zip(small, large, strict=False)]
    assert max(levels) <= 2 / 127.5  # another batch may round differently


def images(folder):
    return {
        name: content for name, content in files_of(folder / "synthetic").items() if name.endswith(".png")
    }


def test_every_method_is_among_them():
    known = {getattr(methods, name) for name in methods.__all__}
    assert {type(make()) for make in METHODS.values()} == {
        one for one in known if issubclass(one, methods.Method) and one is not methods.Method
    }
