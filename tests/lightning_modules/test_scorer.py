import json

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import ExportWeights, PreviewGrid, SynthesisCallback
from conftest import make_controlldm, make_segmenter, make_trainer
from datamodules import ConditionDataModule, GlanceDataModule, ScoredDataModule
from datamodules.sources.synthetic import SyntheticSet
from diffusion.sampler import Sampler
from errors import InputError
from lightning_modules import ScorerLitModule, SynthesisLitModule
from methods import Base
from methods.method import PROBE
from networks import Scorer
from networks.pretrained import load_pretrained, save_pretrained
from objectives.rewards import ce


@pytest.fixture(scope="module")
def plain(weights, source, tmp_path_factory):
    """Three hundred plain samples, of seed 7."""
    root = tmp_path_factory.mktemp("plain")
    module = SynthesisLitModule(weights.backbone, weights.segmenter, Base(), steps=2, seed=7)
    data = ConditionDataModule(source, budget=50, seed=7, batch_size=50)
    make_trainer(root, callbacks=[SynthesisCallback()]).predict(module, data, return_predictions=False)
    return root / "synthetic"


def scoring(weights, **changes):
    torch.manual_seed(0)
    settings = {"scorer": Scorer(width=8, members=2), "steps": 2}
    return ScorerLitModule(weights.backbone, weights.segmenter, **settings | changes)


def fitted(module, source, plain, root, steps=60, **changes):
    data = ScoredDataModule(source, str(plain), batch_size=16, steps_per_epoch=20)
    callbacks = [ExportWeights(monitor="scorer/val_pearson")]
    trainer = make_trainer(root, max_steps=steps, callbacks=callbacks, **changes)
    trainer.fit(module, data)
    return trainer


class Planted(ScorerLitModule):
    """The target is the object's brightness, which the noise alone decides."""

    def target(self, image, mask):
        inside = mask.unsqueeze(1)
        return 40 * (image * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3))) + 3


def test_learns_what_the_noise_decides(weights, source, plain, tmp_path):
    module = Planted(weights.backbone, weights.segmenter, Scorer(width=8, members=2), steps=2)
    trainer = fitted(module, source, plain, tmp_path, steps=200)
    assert trainer.callback_metrics["scorer/val_pearson"] > 0.8
    assert trainer.callback_metrics["scorer/val_spearman"] > 0.7
    assert 0.6 < trainer.callback_metrics["scorer/val_slope"] < 1.5
    assert trainer.callback_metrics["scorer/val_top_eighth"] > 0.7
    scorer = load_pretrained(tmp_path / "weights", Scorer)
    known = [module.known[i] for i in range(300)]
    response, target = (torch.stack(values) for values in zip(*known, strict=True))
    mask = torch.stack([SyntheticSet(plain)[i]["mask"] for i in range(300)])
    with torch.no_grad():
        predicted = scorer.predict(response.float(), mask)
    assert (predicted - target).abs().mean() < 0.5 * target.std()  # in units of the target, offset and all


def test_learns_from_glances_what_the_noise_decides(weights, source, tmp_path):
    """One glance a noise, none seen twice; what it chooses has what it learnt to foretell."""
    scorer = Scorer(width=8, members=2)
    module = Planted(weights.backbone, weights.segmenter, scorer, steps=2, glance=1, flip=False, n=8)
    data = GlanceDataModule(source, budget=4, batch_size=32, steps_per_epoch=50, n_val=64)
    callbacks = [ExportWeights(monitor="scorer/val_pearson"), SynthesisCallback()]
    trainer = make_trainer(tmp_path, max_steps=100, callbacks=callbacks)
    trainer.fit(module, data)
    assert trainer.callback_metrics["scorer/val_pearson"] > 0.4
    assert trainer.callback_metrics["scorer/val_within"] > 0.3  # and not by which masks have bright objects
    assert module.known == {}
    trainer.predict(module, data, return_predictions=False)
    samples = SyntheticSet(tmp_path / "synthetic")
    chosen = [samples[i] for i in range(len(samples))]
    target = torch.cat([module.target(s["image"][None], s["mask"][None]) for s in chosen])
    assert ((target - scorer.offset) / scorer.scale).mean() > 0.3  # of plain draws it is 0


def test_a_glance_is_that_of_the_noise_that_is_read(weights, source):
    settings = {"scorer": Scorer(inputs="noise", width=8, members=1), "glance": 2, "flip": False}
    module = scoring(weights, signal=0.1, **settings)
    sampler = Sampler(module.backbone, signal=0.1)
    data = GlanceDataModule(source, n_val=8)
    data.setup("fit")
    batch = data.preview(3)
    x_T, target, image = module._glanced(batch, 5)
    request = module.request(batch, 5)
    assert torch.equal(x_T, request.noise.draw(PROBE))
    expected = module.backbone.decode(sampler.glance(x_T, request.condition, 2)).clamp(-1, 1)
    assert torch.equal(image, expected)
    assert torch.allclose(target, (ce(module.anchor(expected), batch["mask"]) + 1e-3).log(), rtol=1e-5)


@pytest.mark.parametrize("glance", [0, 2])
def test_reads_latents_and_shows_images(weights, source, glance, tmp_path):
    """With a latent backbone noise is half as wide as the images; an estimate is shown as it will look."""
    save_pretrained(make_controlldm().eval(), tmp_path / "backbone", {})
    parts = (str(tmp_path / "backbone"), weights.segmenter)
    if glance:
        data = GlanceDataModule(source, batch_size=4, steps_per_epoch=2, n_val=8)
    else:
        filling = SynthesisLitModule(*parts, Base(), steps=2, seed=7)
        masks = ConditionDataModule(source, budget=10, seed=7, batch_size=30)
        trainer = make_trainer(tmp_path, callbacks=[SynthesisCallback()])
        trainer.predict(filling, masks, return_predictions=False)
        data = ScoredDataModule(source, str(tmp_path / "synthetic"), batch_size=4, steps_per_epoch=2)
    scorer = Scorer(channels=4, inputs="noise" if glance else "estimate", width=8, members=1)
    module = ScorerLitModule(*parts, scorer, steps=2, glance=glance)
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    trainer = make_trainer(tmp_path, max_steps=2, logger=logger, callbacks=[PreviewGrid(count=2)])
    trainer.fit(module, data)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    events.Reload()
    picture = events.Images(f"mask/response/{'glance' if glance else 'sample'}")[-1]
    assert (picture.width, picture.height) == (3 * 34 + 2, 2 * 34 + 2)
    if not glance:
        batch = data.preview(2)
        response = torch.stack([module.known[i][0] for i in batch["sample"].tolist()]).float()
        assert response.shape == (2, 4, 16, 16)
        with torch.no_grad():
            assert torch.equal(module.preview(batch)["response"], module.backbone.decode(response))


def test_targets_and_data_must_agree(weights, source, plain, tmp_path):
    glanced, finished = GlanceDataModule(source), ScoredDataModule(source, str(plain))
    with pytest.raises(InputError, match="ScoredDataModule does not give; take data GlanceD"):
        make_trainer(tmp_path, max_steps=1).fit(scoring(weights, glance=2), finished)
    with pytest.raises(InputError, match="finished images, which GlanceDataModule does not give"):
        make_trainer(tmp_path, max_steps=1).fit(scoring(weights), glanced)
    with pytest.raises(InputError, match=r"model\.glance -1"):
        scoring(weights, glance=-1)
    with pytest.raises(InputError, match=r"model\.signal 1"):
        scoring(weights, glance=1, signal=1)
    with pytest.raises(InputError, match="n_val 7"):
        GlanceDataModule(source, n_val=7)


def test_responses_are_those_of_the_samples_own_noise(weights, source, plain, tmp_path):
    """Finishing the sampler from the noise that the scorer read gives the image on disk."""
    module = scoring(weights, scorer=Scorer(inputs="noise", width=8, members=1))
    fitted(module, source, plain, tmp_path, steps=1)
    samples = SyntheticSet(plain)
    for i in (0, 11, 299):
        mask = samples[i]["mask"][None]
        x_T = module.known[i][0][None].float()
        image = module.sampler.sample(x_T, module.backbone.condition(mask))
        assert (image - samples[i]["image"]).abs().mean() < 0.02  # noise is kept with 16 bits, images with 8
        expected = (ce(module.anchor(samples[i]["image"][None]), mask) + 1e-3).log()
        assert module.known[i][1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_reducible_target_takes_the_reference_off(weights, source, plain, tmp_path):
    save_pretrained(make_segmenter(seed=5).eval(), tmp_path / "reference", {})
    settings = {"reference": str(tmp_path / "reference"), "reducible": 0.5, "transform": "none"}
    module = scoring(weights, **settings)
    sample = SyntheticSet(plain)[3]
    image, mask = sample["image"][None], sample["mask"][None]
    expected = ce(module.anchor(image), mask) - 0.5 * ce(make_segmenter(seed=5).eval()(image), mask)
    assert module.target(image, mask).item() == pytest.approx(expected.item(), rel=1e-4)


def test_resumed_training_is_the_same(weights, source, plain, tmp_path):
    whole = scoring(weights)
    fitted(whole, source, plain, tmp_path / "whole", steps=40)
    half, rest = scoring(weights), scoring(weights)
    fitted(half, source, plain, tmp_path / "half", steps=20).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"method.scorer.{name}" for name in half.scorer.state_dict()}
    data = ScoredDataModule(source, str(plain), batch_size=16, steps_per_epoch=20)
    trainer = make_trainer(tmp_path / "rest", max_steps=40)
    trainer.fit(rest, data, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.scorer.state_dict().items():
        assert torch.allclose(rest.scorer.state_dict()[name], value, atol=1e-6), name


def test_refuses_other_sets(weights, source, plain, tmp_path):
    made = json.loads((plain / "dataset.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in plain.iterdir():
        (other / file.name).symlink_to(file)
    (other / "dataset.json").unlink()
    (other / "dataset.json").write_text(json.dumps(made | {"method": "miner"}))
    with pytest.raises(InputError, match=r"made by miner.*Base"):
        ScoredDataModule(source, str(other)).setup("fit")
    with pytest.raises(InputError, match="holdout 1"):
        ScoredDataModule(source, str(plain), holdout=1)
    with pytest.raises(InputError, match="300 samples are too few"):
        ScoredDataModule(source, str(plain), holdout=0.01).setup("fit")


def test_refuses_a_scorer_for_other_noise(weights):
    with pytest.raises(InputError, match="1 channels"):
        scoring(weights, scorer=Scorer(channels=1))
