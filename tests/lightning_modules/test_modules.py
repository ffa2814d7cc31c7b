import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.distributions import Normal, kl_divergence

from callbacks import EMA, ExportWeights
from conftest import keep_last, make_backbone, make_miner, make_segmenter, make_trainer
from datamodules import ConditionDataModule, SegDataModule
from datamodules.sources import PhantomSource
from diffusion.backbones import SegDiff
from errors import InputError
from lightning_modules import DiffusionLitModule, MinerLitModule, SegLitModule, SynthesisLitModule
from methods import Base
from networks import Segmenter, SwinUnet
from networks.pretrained import load_pretrained, save_pretrained, training_facts
from objectives.segmentation import dice_ce


def adam(params):
    return torch.optim.AdamW(params, lr=1e-3)


def mining(folders, **changes):
    settings = {"miner": make_miner(), "steps": 4, "truncate": 2, "optimizer": adam}
    return MinerLitModule(folders.backbone, folders.segmenter, **settings | changes)


def conditions(source, **changes):
    return ConditionDataModule(source, **{"batch_size": 2, "steps_per_epoch": 2} | changes)


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def unchanged(network, before):
    return all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ------------------------------------------------------------------------------------------ mining


@pytest.fixture
def batch(source):
    samples = [source.dataset("train")[i] for i in range(3)]
    pair = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "mask")}
    return pair | {"index": torch.tensor([0, 5, 9]), "source_mask": ["a", "b", "c"]}


@pytest.mark.parametrize("mode", ["fresh", "paired"])
@pytest.mark.parametrize("kappa_up", [0.3, 10.0])
def test_objective_and_its_gradient_written_out(weights, batch, mode, kappa_up):
    module = mining(
        weights, miner=make_miner(trained=True), noise=mode, kappa_up=kappa_up, truncate=3, steps=50
    )
    used, draw = [], module.noise
    module.noise = lambda *args: used.append(draw(*args)) or used[-1]
    module.training_step(batch, 0).backward()
    ours = torch.cat([p.grad.flatten() for p in module.miner.parameters()])
    loss = module.training_step(batch, 0)

    unet, mask = module.backbone.unet, batch["mask"]
    alpha = module.backbone.alphas_cumprod[torch.tensor([980, 960, 940, 920])].tolist()
    y = F.one_hot(mask, 2)[..., 1:].permute(0, 3, 1, 2).float()
    probe, fresh = used[0].draw(0), used[0].draw(1)
    with torch.no_grad():
        score = -unet(torch.cat([probe, y], 1), 980).sample / math.sqrt(1 - alpha[0])
    module.miner.zero_grad()
    shifted = module.miner(score)
    x_T = shifted.mean + shifted.variance.sqrt() * (probe if mode == "paired" else fresh)
    x = x_T.detach()
    with torch.no_grad():
        for i, t in enumerate((980, 960, 940)):
            eps = unet(torch.cat([x, y], 1), t).sample
            x_0 = (x - math.sqrt(1 - alpha[i]) * eps) / math.sqrt(alpha[i])
            x = math.sqrt(alpha[i + 1]) * x_0.clamp(-1, 1) + math.sqrt(1 - alpha[i + 1]) * eps
    x_0.requires_grad_()
    log_p = module.anchor(x_0.clamp(-1, 1)).log_softmax(1).gather(1, mask[:, None])
    reward = 1 - torch.exp(log_p.flatten(1).mean(1))
    kl = kl_divergence(Normal(shifted.mean, shifted.variance.sqrt()), Normal(0.0, 1.0)).sum((1, 2, 3))
    capped = torch.minimum(reward, torch.tensor(kappa_up)).mean()
    assert -loss.item() == pytest.approx((capped - 1e-3 * kl.mean()).item(), rel=1e-4)
    assert kl.mean() > 1
    if kappa_up == 0.3:
        assert (reward > kappa_up).any()  # the cap matters

    (at_image,) = torch.autograd.grad(capped, x_0)
    x_T.backward(-at_image / math.sqrt(alpha[0]), retain_graph=True)
    (1e-3 * kl.mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in module.miner.parameters()])
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_untrained_miner_in_paired_mode_scores_the_base_rollout(weights, batch):
    module = mining(weights, noise="paired", kappa_up=10.0)
    noise = module.noise(batch, 0)
    condition = module.backbone.condition(batch["mask"])
    expected = module.reward(module.sampler.rollout(noise.draw(0), condition, 2).clamp(-1, 1), batch["mask"])
    module.noise = lambda *args: noise
    assert -module.training_step(batch, 0).item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_noise_of_mining_is_not_that_of_synthesis(weights, batch):
    """Not for any of the first items, in any stream that is in use."""
    module, shape = mining(weights), batch["mask"].shape[-2:]
    seen, draw = [], module.noise
    module.noise = lambda *args: seen.append(draw(*args)) or seen[-1]
    items = {"mask": batch["mask"][:1].expand(12, *shape), "image": batch["image"][:1].expand(12, -1, *shape)}
    items["index"] = torch.arange(12)
    module.training_step(items, 0)
    mined = torch.cat([seen[0].draw(k).flatten(1) for k in (0, 1)])
    synthesis = torch.cat([draw(items).draw(k).flatten(1) for k in (0, 1)])
    correlation = torch.corrcoef(torch.cat([mined, synthesis]))[:24, 24:]
    assert correlation.abs().max() < 0.2


class Watch(Callback):
    """Notes the mode of the frozen networks while training."""

    def __init__(self):
        self.frozen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = (pl_module.backbone, pl_module.anchor)
        self.frozen += [not m.training for part in parts for m in part.modules()]
        self.frozen += [not p.requires_grad for part in parts for p in part.parameters()]


def test_mining_changes_the_miner_alone(weights, source, tmp_path):
    module, watch = mining(weights), Watch()
    before = [snapshot(net) for net in (module.backbone, module.anchor, module.miner)]
    prints = module.fingerprints()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[watch])
    trainer.fit(module, conditions(source))
    assert trainer.global_step == 4
    assert watch.frozen
    assert all(watch.frozen)
    for part, kept in ((module.backbone, before[0]), (module.anchor, before[1])):
        assert unchanged(part, kept)
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
        assert not any(m.training for m in part.modules())
    moved = {
        name for name, value in module.miner.state_dict().items() if not torch.equal(value, before[2][name])
    }
    assert moved == set(before[2])
    after = module.fingerprints()
    assert {key for key in prints if prints[key] != after[key]} == {"miner"}


def test_checkpoints_hold_the_miner_alone_and_load_back(weights, source, tmp_path):
    first, second = mining(weights), mining(weights, miner=make_miner(seed=9))
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(first, conditions(source))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {"log_beta", *(f"method.miner.{name}" for name in first.miner.state_dict())}
    again = make_trainer(tmp_path, max_steps=2)
    again.fit(second, conditions(source), ckpt_path=tmp_path / "half.ckpt")  # nothing is left to do
    assert again.global_step == 2
    assert unchanged(second.miner, first.miner.state_dict())


class Items(Callback):
    """Notes the items of every batch, and may fail before one."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.fail_at:
            raise RuntimeError("power cut")
        self.seen[trainer.global_step] = batch.get("real", batch)["index"].tolist()


@pytest.mark.parametrize("stage", ["miner", "segmenter"])
def test_an_interrupted_run_resumes_exactly(weights, source, tmp_path, stage):
    """Cut in its second epoch, resumed from ``last.ckpt``: the same items, bit for bit the same weights."""

    def run(name, fail_at=None, ckpt_path=None):
        items, folder = Items(fail_at), tmp_path / name
        keep = keep_last(folder)
        trainer = make_trainer(tmp_path, max_steps=8, callbacks=[items, keep], enable_checkpointing=True)
        if stage == "miner":
            module, data = mining(weights), conditions(source, steps_per_epoch=3)
        else:
            module, data = (
                SegLitModule(make_segmenter(), optimizer=adam),
                SegDataModule(source, batch_size=2, steps_per_epoch=3),
            )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return items.seen, module.trained

    expected, straight = run("straight")
    assert [expected[step] for step in range(8)] == [[2 * step, 2 * step + 1] for step in range(8)]
    with pytest.raises(RuntimeError, match="power cut"):
        run("cut", fail_at=5)
    seen, resumed = run("resumed", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert seen == {step: expected[step] for step in range(3, 8)}
    assert unchanged(resumed, straight.state_dict())


@pytest.mark.parametrize("changes", [{"base_width": 16}, {"multipliers": (1, 2, 2)}, {"head_width": 4}])
def test_checkpoint_of_another_miner(weights, source, tmp_path, changes):
    other = mining(weights, miner=make_miner(**changes))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(other, conditions(source))
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="another miner"):
        make_trainer(tmp_path, max_steps=2).fit(
            mining(weights), conditions(source), ckpt_path=tmp_path / "other.ckpt"
        )


def test_default_miner_is_the_published_one(weights):
    module = MinerLitModule(weights.backbone, weights.segmenter)
    assert sum(p.numel() for p in module.miner.parameters()) == 8_387_822


def test_mining_can_start_from_trained_weights(weights):
    module = mining(weights, miner=None, weights=weights.miner)
    assert module.fingerprints()["miner"] == load_pretrained(weights.miner, type(module.miner)).fingerprint()
    assert all(p.requires_grad for p in module.miner.parameters())


def test_a_backbone_can_start_from_trained_weights(weights):
    trained = load_pretrained(weights.backbone, SegDiff)
    module = DiffusionLitModule(make_backbone(seed=9), weights=weights.backbone)
    assert module.backbone.fingerprint() == trained.fingerprint()
    assert module.backbone.training
    assert all(p.requires_grad for p in module.backbone.parameters())
    with pytest.raises(InputError, match="another architecture"):
        DiffusionLitModule(make_backbone(block_out_channels=(8, 8)), weights=weights.backbone)


def test_parts_that_do_not_fit(weights, source, tmp_path):
    save_pretrained(make_segmenter(in_channels=1), tmp_path / "grey", {})
    with pytest.raises(InputError, match=r"model\.anchor.*grey.*1 channels"):
        MinerLitModule(weights.backbone, str(tmp_path / "grey"))
    with pytest.raises(InputError, match=r"model\.miner.*4 channels"):
        mining(weights, miner=make_miner(channels=4))
    with pytest.raises(InputError, match="bounded_lce"):
        mining(weights, reward="bounded_lce")
    with pytest.raises(InputError, match=weights.miner):
        MinerLitModule(weights.miner, weights.segmenter)
    save_pretrained(make_segmenter(num_classes=3), tmp_path / "three", {})
    module = MinerLitModule(weights.backbone, str(tmp_path / "three"), make_miner())
    with pytest.raises(InputError, match=r"model\.anchor.*3 classes"):
        make_trainer(tmp_path, max_steps=1).fit(module, conditions(source))
    cardiac = PhantomSource("cardiac", size=32, n_train=2, n_val=1, n_test=1)
    with pytest.raises(InputError, match=r"model\.backbone.*3 channels"):
        make_trainer(tmp_path, max_steps=1).fit(mining(weights), conditions(cardiac))


@pytest.mark.parametrize("truncate", [0, 5])
def test_impossible_truncation_is_refused_before_training(weights, truncate):
    with pytest.raises(InputError, match="truncate"):
        mining(weights, steps=4, truncate=truncate)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_steps_are_refused(weights, steps):
    with pytest.raises(InputError, match="steps"):
        SynthesisLitModule(weights.backbone, weights.segmenter, Base(), steps=steps)


# -------------------------------------------------------------------------------------- segmenters


def test_segmentation_loss_weighs_streams_by_their_share(source):
    module = SegLitModule(make_segmenter(), cutmix=0.0)
    samples = [source.dataset("train")[i] for i in range(4)]
    image, mask = (torch.stack([sample[key] for sample in samples]) for key in ("image", "mask"))
    streams = {
        "real": {"image": image[:3], "mask": mask[:3], "index": torch.arange(3)},
        "synthetic": {"image": image[3:], "mask": mask[3:], "index": torch.arange(1)},
    }
    loss = module.training_step(streams, 0)
    parts = [dice_ce(module.segmenter(image[part]), mask[part]) for part in (slice(0, 3), slice(3, 4))]
    assert loss.item() == pytest.approx((0.75 * parts[0] + 0.25 * parts[1]).item(), rel=1e-4)


def fit_segmenter(root, data, max_epochs=2, **changes):
    module = SegLitModule(make_segmenter(), optimizer=adam, **changes)
    trainer = make_trainer(root, max_epochs=max_epochs, callbacks=[ExportWeights()])
    trainer.fit(module, data)
    return trainer, module


@pytest.fixture
def synthetic(weights, source, tmp_path):
    from callbacks import SynthesisCallback

    module = SynthesisLitModule(weights.backbone, weights.segmenter, Base(), steps=2)
    trainer = make_trainer(tmp_path / "synthesis", callbacks=[SynthesisCallback()])
    trainer.predict(module, conditions(source, budget=1.5), return_predictions=False)
    return str(tmp_path / "synthesis" / "synthetic")


def test_union_training_takes_as_many_steps(source, synthetic, tmp_path):
    settings = {"batch_size": 4, "steps_per_epoch": 3}
    alone, _ = fit_segmenter(tmp_path / "real", SegDataModule(source, **settings))
    union, _ = fit_segmenter(tmp_path / "union", SegDataModule(source, synthetic, **settings))
    assert alone.global_step == union.global_step == 6
    facts = [training_facts(tmp_path / name / "weights") for name in ("real", "union")]
    assert [f["n_synthetic"] for f in facts] == [0, 9]
    assert [(f["n_real"], f["steps"]) for f in facts] == [(6, 6), (6, 6)]


def test_segmenter_starts_from_given_weights(weights, source, tmp_path):
    module = SegLitModule(make_segmenter(seed=4), weights=weights.segmenter)
    assert module.segmenter.fingerprint() == load_pretrained(weights.segmenter, Segmenter).fingerprint()
    assert all(p.requires_grad for p in module.segmenter.parameters())
    with pytest.raises(InputError, match=weights.backbone):
        SegLitModule(make_segmenter(), weights=weights.backbone)
    with pytest.raises(InputError, match=f"{weights.segmenter}.*another architecture"):
        SegLitModule(make_segmenter(base_features=8), weights=weights.segmenter)


def test_weights_say_their_network_and_how_they_were_validated(source, tmp_path):
    data = SegDataModule(source, batch_size=2, steps_per_epoch=1)
    _, first = fit_segmenter(tmp_path, data, 1, inference="sliding_window", mirror=False)
    weights = str(tmp_path / "weights")
    told = SegLitModule(weights=weights)
    assert told.segmenter.fingerprint() == first.segmenter.fingerprint()
    assert (told.inference, told.mirror) == ("sliding_window", False)
    image = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(told.eval().predict_logits(image), first.eval().predict_logits(image))
    changed = SegLitModule(weights=weights, inference="whole", mirror=True)
    assert (changed.inference, changed.mirror) == ("whole", True)
    untold = SegLitModule(make_segmenter())
    assert (untold.inference, untold.mirror) == ("whole", True)
    with pytest.raises(InputError, match=r"model\.segmenter: is not given, nor are model\.weights"):
        SegLitModule()


def test_training_goes_on_in_training_mode(weights, source, tmp_path):
    """Loaded networks come in eval mode, where nnU-Net has no deep supervision."""
    modes = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append([module.training for module in pl_module.trained.modules()])

    segmenter = SegLitModule(make_segmenter(), weights=weights.segmenter)
    data = SegDataModule(source, batch_size=2, steps_per_epoch=1)
    make_trainer(tmp_path, max_epochs=2, callbacks=[Modes()]).fit(segmenter, data)
    miner = mining(weights, miner=None, weights=weights.miner)
    make_trainer(tmp_path, max_steps=1, callbacks=[Modes()]).fit(miner, conditions(source))
    assert [all(mode) for mode in modes] == [True, True, True]


def test_segmenter_that_does_not_fit_the_images(source, tmp_path):
    for changes, word in (({"in_channels": 1}, "1 channels"), ({"num_classes": 5}, "5 classes")):
        module = SegLitModule(make_segmenter(**changes))
        with pytest.raises(InputError, match=rf"model\.segmenter.*{word}"):
            make_trainer(tmp_path, max_steps=1).fit(module, SegDataModule(source))


@pytest.mark.parametrize("inference", ["whole", "sliding_window"])
def test_segmenter_of_another_image_size(tmp_path, inference):
    """Windows have the network's own size; training sees whole images."""
    source = PhantomSource("polyp", size=40, n_train=2, n_val=1, n_test=1)
    swin = SwinUnet(3, 2, 32, 2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    for segmenter, wanted in ((swin, "32 × 32 alone"), (make_segmenter(), "multiples of 8 × 8")):
        size = 40 if segmenter is swin else 36
        source.size = (size, size)
        module = SegLitModule(segmenter, inference=inference)
        with pytest.raises(InputError, match=rf"model\.segmenter.*{size} × {size} pixels.*takes {wanted}"):
            make_trainer(tmp_path, max_steps=1).fit(module, SegDataModule(source))
        if inference == "sliding_window":
            module.check_data(source)


def test_validation_does_not_depend_on_the_batch_size(source, tmp_path):
    scores = []
    for size in (1, 3):
        trainer = make_trainer(tmp_path)
        scores.append(
            trainer.validate(
                SegLitModule(make_segmenter()), SegDataModule(source, batch_size=size), verbose=False
            )[0]
        )
    assert scores[0]["val/dsc"] == pytest.approx(scores[1]["val/dsc"], rel=1e-5)


# ------------------------------------------------------------------------------------------ export


class Given(SegLitModule):
    """Logs the ``val/dsc`` that the test wants after each epoch; the weights tell the epoch."""

    def __init__(self, values):
        super().__init__(make_segmenter(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        self.values = values

    def on_validation_epoch_end(self):
        with torch.no_grad():
            self.segmenter.network.decoder.seg_layers[-1].bias.fill_(self.current_epoch)
        self.log("val/dsc", self.values[self.current_epoch])


def exported_epoch(root):
    net = load_pretrained(root / "weights", Segmenter)
    return net.network.decoder.seg_layers[-1].bias[0].item()


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([1.0, 3.0, 2.0], "max", 1),
        ([1.0, 3.0, 0.5], "min", 2),
        ([math.nan, 1.0, math.nan], "max", 1),
        ([math.nan, math.nan, math.nan], "max", 0),
    ],
)
def test_best_weights_are_exported(source, tmp_path, values, mode, best):
    export = ExportWeights(monitor="val/dsc", mode=mode)
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[export])
    trainer.fit(Given(values), SegDataModule(source, batch_size=2, steps_per_epoch=1))
    assert exported_epoch(tmp_path) == best
    assert sorted(p.name for p in tmp_path.iterdir()) == [".weights.best", "weights"]


def test_a_resumed_run_exports_the_best_of_both_parts(source, tmp_path):
    """Cut after its best epoch, and resumed once more when all is done."""

    def run(root=tmp_path, fail_at=None, ckpt_path=None):
        keep = keep_last(root / "kept")
        callbacks = [Items(fail_at), ExportWeights(monitor="val/dsc"), keep]
        trainer = make_trainer(root, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        data = SegDataModule(source, batch_size=2, steps_per_epoch=2)
        trainer.fit(Given([0.5, 0.9, 0.6, 0.7]), data, ckpt_path=ckpt_path)
        return exported_epoch(root)

    with pytest.raises(RuntimeError, match="power cut"):
        run(fail_at=5)
    last = (tmp_path / "kept" / "last.ckpt").resolve()
    assert run(tmp_path / "elsewhere", ckpt_path=last) == 3  # the best that it has seen
    for _ in range(2):
        assert run(ckpt_path=tmp_path / "kept" / "last.ckpt") == 1


def test_steps_that_no_validation_would_see_are_refused(source, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[ExportWeights(monitor="val/dsc")])
    with pytest.raises(InputError, match="max_steps 5: no validation would see the last 1 steps"):
        trainer.fit(Given([1.0] * 3), SegDataModule(source, batch_size=2, steps_per_epoch=2))
    assert not list(tmp_path.iterdir())


def test_batches_that_are_gathered_are_one_step(source, tmp_path):
    def run(max_steps):
        trainer = make_trainer(
            tmp_path,
            max_steps=max_steps,
            accumulate_grad_batches=2,
            callbacks=[ExportWeights(monitor="val/dsc")],
        )
        trainer.fit(Given([1.0] * 4), SegDataModule(source, batch_size=2, steps_per_epoch=3))
        return trainer.global_step

    assert run(4) == 4  # two epochs of 2 + 1 batches
    with pytest.raises(InputError, match="no validation would see the last 1 steps, with one every 2"):
        run(3)


def test_a_run_that_is_resumed_for_longer_learns_on(source, tmp_path):
    """The learning rate decays to the end of the longer run; that of the shorter one had come to 0."""

    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    def run(steps, ckpt_path=None):
        rates, keep = Rates(), keep_last(tmp_path / "kept")
        trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[rates, keep], enable_checkpointing=True)
        module = SegLitModule(make_segmenter(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        data = SegDataModule(source, batch_size=2, steps_per_epoch=2)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return rates.seen

    assert run(4) == pytest.approx([0.1 * (1 - step / 4) ** 0.9 for step in range(4)])
    longer = run(8, tmp_path / "kept" / "last.ckpt")
    assert longer == pytest.approx([0.1 * (1 - step / 8) ** 0.9 for step in range(4, 8)])


def test_the_average_follows_the_model_to_its_device(tmp_path):
    module, average = Given([]), EMA()
    average.setup(make_trainer(tmp_path), module, "fit")  # while the model is still on the CPU
    module.to("meta")
    average.on_fit_start(make_trainer(tmp_path), module)
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}


def test_a_monitor_beside_an_average_is_refused(source, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[EMA(), ExportWeights(monitor="val/dsc")])
    with pytest.raises(InputError, match="monitor val/dsc would choose by the average"):
        trainer.fit(Given([1.0]), SegDataModule(source, batch_size=2, steps_per_epoch=1))


def test_export_takes_no_leftover_of_an_interrupted_run(source, tmp_path):
    """The other run's best network must not pass for this run's."""
    left = make_segmenter(seed=8)
    save_pretrained(left, tmp_path / ".weights.best", {})
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[ExportWeights(monitor="val/dsc")])
    trainer.fit(Given([math.nan]), SegDataModule(source, batch_size=2, steps_per_epoch=1))
    assert load_pretrained(tmp_path / "weights", Segmenter).fingerprint() != left.fingerprint()


def test_a_run_without_validation_still_hands_weights_on(source, tmp_path):
    """``max_steps`` below ``steps_per_epoch``: no validation comes round."""
    export = ExportWeights(monitor="val/dsc")
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[export])
    trainer.fit(SegLitModule(make_segmenter()), SegDataModule(source, batch_size=2, steps_per_epoch=5))
    assert training_facts(tmp_path / "weights")["steps"] == 2


def test_unknown_monitor(source, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[ExportWeights(monitor="val/nothing")])
    with pytest.raises(ValueError, match=r"val/nothing.*val/dsc"):
        trainer.fit(SegLitModule(make_segmenter()), SegDataModule(source, batch_size=2, steps_per_epoch=1))


# ---------------------------------------------------------------------------------------- backbone


def test_backbone_training_takes_timesteps_and_noise_of_its_items(source, tmp_path):
    module, other = (DiffusionLitModule(make_backbone(), adam) for _ in range(2))
    samples = [source.dataset("train")[i] for i in range(3)]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in ("image", "mask")}
    item = {**stacked, "index": torch.tensor([4, 5, 6])}
    loss = module.training_step({"real": item}, 0)
    torch.manual_seed(99)
    parts = [
        other.training_step({"real": {key: value[i : i + 1] for key, value in item.items()}}, 0)
        for i in range(3)
    ]
    assert loss.item() == pytest.approx(sum(parts).item() / 3, rel=1e-4)
    assert len({round(part.item(), 4) for part in parts}) == 3


def test_backbone_training_moves_it_and_hands_it_on(source, tmp_path):
    module = DiffusionLitModule(make_backbone(), adam, warmup_steps=0)
    before = module.backbone.fingerprint()
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[ExportWeights()])
    trainer.fit(module, SegDataModule(source, batch_size=2, steps_per_epoch=2, augmentation="flip"))
    after = load_pretrained(tmp_path / "weights", type(module.backbone)).fingerprint()
    assert after == module.backbone.fingerprint() != before
