from types import SimpleNamespace

import pytest
import torch

from callbacks import EMA, ExportWeights
from conftest import keep_last, make_controlldm, make_trainer
from datamodules import SegDataModule
from datamodules.sources import PhantomSource
from errors import InputError
from lightning_modules import AutoencoderLitModule, DiffusionLitModule
from lightning_modules.latents import LatentCache
from networks.autoencoder import Autoencoder
from networks.pretrained import load_pretrained


def make_autoencoder(**changes):
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return Autoencoder(**settings | changes)


def adam(params):
    return torch.optim.Adam(params, lr=3e-3)


def test_it_learns_and_hands_on_the_scale_of_its_latents(source, tmp_path):
    module = AutoencoderLitModule(make_autoencoder(), adam, warmup_steps=0)
    before = module.autoencoder.fingerprint()
    trainer = make_trainer(tmp_path, max_steps=60, callbacks=[EMA(), ExportWeights()])
    data = SegDataModule(source, batch_size=4, steps_per_epoch=20, augmentation="flip")
    trainer.fit(module, data)
    errors = trainer.callback_metrics
    assert errors["autoencoder/val_error"] < 0.25
    trained = load_pretrained(tmp_path / "weights", Autoencoder)
    assert trained.fingerprint() != before
    images = torch.stack([source.dataset("val")[i]["image"] for i in range(len(source.dataset("val")))])
    with torch.no_grad():
        latents = trained.vae.encode(images).latent_dist.mean
    scale = trained.config.scaling_factor
    assert scale == trained.vae.config.scaling_factor
    assert (latents * scale).var(correction=0).item() == pytest.approx(1, abs=0.02)


def test_a_finished_run_that_is_resumed_hands_on_the_same(source, tmp_path):
    """The average, and the scale of the latents: neither is in the network's own state."""

    def run(ckpt_path=None):
        keep = keep_last(tmp_path / "kept")
        callbacks = [EMA(), ExportWeights(), keep]
        trainer = make_trainer(tmp_path, max_steps=6, callbacks=callbacks, enable_checkpointing=True)
        module = AutoencoderLitModule(make_autoencoder(), adam, warmup_steps=0)
        trainer.fit(module, SegDataModule(source, batch_size=4, steps_per_epoch=3), ckpt_path=ckpt_path)
        handed_on = load_pretrained(tmp_path / "weights", Autoencoder)
        return handed_on.fingerprint(), handed_on.config.scaling_factor, handed_on.vae.config.scaling_factor

    first = run()
    assert first[1] != 1
    assert run(tmp_path / "kept" / "last.ckpt") == first


def test_the_scale_of_latents_in_half_precision(monkeypatch):
    """A batch of 131,072 values, twice as many as half precision can count."""
    source = PhantomSource("polyp", size=128, n_train=2, n_val=8, n_test=2)
    samples = [source.dataset("val")[i]["image"] for i in range(8)]
    batch = {"image": torch.stack(samples), "index": torch.arange(8)}
    scales = []
    for half in (False, True):
        module = AutoencoderLitModule(make_autoencoder())
        monkeypatch.setattr(module, "log", lambda *args, **options: None)
        module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda total, reduce_op: total))
        with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=half):
            module.validation_step(batch, 0)
            module.on_validation_epoch_end()
        scales.append(module.autoencoder.config.scaling_factor)
    assert scales[1] == pytest.approx(scales[0], rel=0.01)


def test_loss_is_absolute_error_and_divergence(source):
    module = AutoencoderLitModule(make_autoencoder(), kl_weight=0.1)
    samples = [source.dataset("train")[i] for i in range(3)]
    batch = {"image": torch.stack([s["image"] for s in samples]), "index": torch.tensor([0, 1, 2])}
    loss, error, mean = module._loss(batch, 300)
    again, *_ = module._loss(batch, 300)
    assert again.item() == loss.item()  # its noise depends on the items alone
    posterior = module.autoencoder.vae.encode(batch["image"]).latent_dist
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum((1, 2, 3)).mean()
    assert loss.item() == pytest.approx((error + 0.1 * divergence / (3 * 32 * 32)).item(), rel=1e-5)
    assert torch.equal(mean, posterior.mean)


def test_images_that_do_not_fit_are_refused():
    source = PhantomSource("polyp", size=34, n_train=2, n_val=2, n_test=2)
    module = AutoencoderLitModule(make_autoencoder(block_out_channels=(8, 8, 8)))
    with pytest.raises(InputError, match=r"sides that are multiples of 4.* 34 × 34"):
        module.check_data(source)


def test_latents_are_encoded_once():
    backbone = make_controlldm().eval()
    calls = []
    encode = backbone.encode
    backbone.encode = lambda image: calls.append(len(image)) or encode(image)
    cache = LatentCache(3)
    torch.manual_seed(0)
    images = torch.rand(4, 3, 16, 16)
    expected = encode(images).detach()
    for rows in ([0, 1], [1, 2], [0, 1, 2], [3, 0], [3, 2]):
        assert torch.allclose(cache.encode(backbone, images[rows]), expected[rows], atol=1e-6)
    assert calls == [2, 1, 1, 1]  # the fourth has no room, and is encoded again
    assert torch.allclose(LatentCache(0).encode(backbone, images), expected, atol=1e-6)


def test_a_latent_model_trains_on_kept_latents(source, tmp_path):
    runs = []
    for cache in (0, 100):
        module = DiffusionLitModule(make_controlldm(), adam, warmup_steps=0, cache=cache)
        trainer = make_trainer(tmp_path / str(cache), max_steps=6)
        trainer.fit(module, SegDataModule(source, batch_size=2, steps_per_epoch=3, augmentation="none"))
        runs.append(module)
    plain, kept = runs
    assert len(kept.latents.known) == 10  # six for training, four for validation
    for (name, a), b in zip(plain.backbone.named_parameters(), kept.backbone.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
