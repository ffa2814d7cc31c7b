import copy
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import make_segmenter
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.batches import batches
from evaluation.gain import LOSSES, decompose, main, mean_gradient, measure_gain
from networks.pretrained import save_pretrained
from objectives.segmentation import dice_ce

PHANTOM = {"family": "polyp", "size": 32, "n_train": 6, "n_val": 4, "n_test": 5}
N = 3


@pytest.fixture(scope="module")
def anchor():
    """A segmenter away from its start, where biases are 0; one with heads that only training uses."""
    network = make_segmenter(seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@pytest.fixture
def made(tmp_path, anchor, source):
    """A synthetic set of training phantoms with noise, the anchor's folder, and a config."""
    folder = tmp_path / "synthetic"
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N):
        sample = source.dataset("train")[i]
        files = {kind: f"{kind}s/{i:06d}.png" for kind in ("image", "mask")}
        image = ((sample["image"] + 1) * 127.5).permute(1, 2, 0).numpy() + rng.normal(0, 20, (32, 32, 3))
        arrays = image.clip(0, 255).astype(np.uint8), sample["mask"].numpy().astype(np.uint8)
        for file, array in zip(files.values(), arrays, strict=True):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / file)
        lines.append(json.dumps({"index": i, "value": 0.1, **files}) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "dataset.json").write_text(json.dumps({"method": "miner", "backbone": "SegDiff", "seed": 3}))
    save_pretrained(anchor, tmp_path / "anchor", {})
    config = tmp_path / "config.yaml"
    given = {"class_path": "PhantomSource", "init_args": PHANTOM}
    config.write_text(yaml.safe_dump({"data": {"init_args": {"source": given}}}))
    return SimpleNamespace(set=folder, anchor=tmp_path / "anchor", config=config)


def test_decomposition_of_known_vectors():
    found = decompose(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), gamma=0.1)
    assert found == pytest.approx({"norm_syn": 5, "norm_real": 2, "cosine": 0.8, "gain": 0.8})
    opposed = decompose(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]), gamma=0.5)
    assert opposed == pytest.approx({"norm_syn": 1, "norm_real": 2, "cosine": -1, "gain": -1})


def real_loss(network, dataset, loss):
    with torch.no_grad():
        values = [
            LOSSES[loss](network(dataset[i]["image"][None].double()), dataset[i]["mask"][None])
            for i in range(len(dataset))
        ]
    return float(torch.cat(values).double().mean())


def stepped(network, gradients, gamma, names):
    moved = copy.deepcopy(network)
    for (name, parameter), gradient in zip(moved.named_parameters(), gradients, strict=True):
        if name in names:
            parameter.data -= gamma * gradient
    return moved


@pytest.mark.parametrize("loss", ["ce", "dice", "dice_ce"])
@pytest.mark.parametrize("part", ["all", "last"])
def test_gain_is_what_a_small_step_brings(made, anchor, source, loss, part):
    """The step is taken with gradients that plain autograd gives, in double precision."""
    synthetic, real = SyntheticSet(made.set), source.dataset("val")
    figures = measure_gain(synthetic, real, anchor, loss, gamma=1.0)
    network = copy.deepcopy(anchor).double()
    network.frozen = False
    network.requires_grad_(True)
    names = [name for name, _ in network.named_parameters()]
    names = names if part == "all" else [n for n in names if n.startswith("network.decoder.seg_layers.2.")]
    for i in range(N):
        value = LOSSES[loss](network(synthetic[i]["image"][None].double()), synthetic[i]["mask"][None]).sum()
        gradients = torch.autograd.grad(value, list(network.parameters()), materialize_grads=True)
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        gamma = 1e-4 / norm
        low, high = (stepped(network, gradients, sign * gamma, names) for sign in (1, -1))
        change = (real_loss(low, real, loss) - real_loss(high, real, loss)) / 2
        assert change == pytest.approx(-gamma * figures[part]["samples"]["gain"][i], rel=0.01)


def test_figures_hang_together(made, anchor, source):
    figures = measure_gain(SyntheticSet(made.set), source.dataset("val"), anchor, gamma=0.02)
    assert (figures["loss"], figures["gamma"], figures["n"]) == ("dice_ce", 0.02, N)
    for part in ("all", "last"):
        whole, samples, means = figures[part]["set"], figures[part]["samples"], figures[part]["mean"]
        for key, column in samples.items():
            assert len(column) == N
            assert means[key] == pytest.approx(np.mean(column))
        for norm, cosine, gain in zip(samples["norm_syn"], samples["cosine"], samples["gain"], strict=True):
            assert gain == pytest.approx(0.02 * norm * whole["norm_real"] * cosine, rel=1e-4)
        assert whole["gain"] == pytest.approx(means["gain"], rel=1e-4)
        assert whole["norm_syn"] < means["norm_syn"]
    assert figures["last"]["set"]["norm_real"] < figures["all"]["set"]["norm_real"]


def test_training_on_the_real_images_themselves_is_the_best_direction(made, anchor, source):
    """A set whose gradient is the real one has cos ζ = 1 and the gain γ‖g‖²."""
    synthetic = SyntheticSet(made.set)
    whole = measure_gain(synthetic, synthetic, anchor, "ce", gamma=0.1)["all"]["set"]
    assert whole["cosine"] == pytest.approx(1, abs=1e-5)
    assert whole["gain"] == pytest.approx(0.1 * whole["norm_real"] ** 2, rel=1e-4)


def test_mean_gradient_does_not_depend_on_the_batches(made, anchor, source, monkeypatch):
    real = source.dataset("test")
    together = mean_gradient(anchor, real, LOSSES["dice_ce"])
    monkeypatch.setattr("evaluation.gain.batches", partial(batches, size=2))  # two, two and one
    apart = mean_gradient(anchor, real, LOSSES["dice_ce"])
    assert float((apart - together).norm()) < 1e-5 * float(together.norm())


def test_loss_of_a_sample_alone_is_that_of_training():
    logits = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = (logits[:, 0] > 0.3).long()
    expected = [float(dice_ce(logits[i : i + 1], mask[i : i + 1])) for i in range(3)]
    assert LOSSES["dice_ce"](logits, mask).tolist() == pytest.approx(expected)


def test_command_writes_the_figures(made, anchor, source, tmp_path, capsys):
    output = tmp_path / "gain.json"
    arguments = {
        "set": made.set,
        "config": made.config,
        "anchor": made.anchor,
        "loss": "ce",
        "output": output,
    }
    main([f"--{key}={value}" for key, value in arguments.items()])
    figures = json.loads(output.read_text())
    expected = measure_gain(SyntheticSet(made.set), source.dataset("val"), anchor, "ce", 0.01)
    facts = {"method": "miner", "backbone": "SegDiff", "seed": 3, "split": "val"}
    assert figures == facts | {"anchor": f"NNUNet {anchor.fingerprint()[:8]}"} | expected
    assert "miner seed 3: 3 samples, gain " in capsys.readouterr().out


def test_command_refuses_an_anchor_of_other_images(made, tmp_path):
    save_pretrained(make_segmenter(num_classes=3).eval(), tmp_path / "other", {})
    arguments = {"set": made.set, "config": made.config, "anchor": tmp_path / "other"}
    with pytest.raises(InputError, match="is for 3 channels and 3 classes, phantom-polyp"):
        main([f"--{key}={value}" for key, value in (arguments | {"output": tmp_path / "x.json"}).items()])


def test_what_cannot_be_measured(made, anchor, source):
    synthetic, real = SyntheticSet(made.set), source.dataset("val")
    with pytest.raises(InputError, match="loss 'mse': is unknown; choose dice_ce, ce"):
        measure_gain(synthetic, real, anchor, "mse")
    with pytest.raises(InputError, match="the image set is empty"):
        measure_gain(synthetic, torch.utils.data.Subset(real, []), anchor)
    with pytest.raises(InputError, match="anchor: reads 1 channels"):
        measure_gain(synthetic, real, make_segmenter(in_channels=1))
