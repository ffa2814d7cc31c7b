import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_miner, make_segmenter
from diffusion.backbones import Backbone, SegDiff
from errors import InputError
from networks import Miner, NNUNet, Segmenter
from networks.pretrained import load_pretrained, save_pretrained, training_facts


@pytest.fixture
def folder(weights, tmp_path):
    """A copy of a good folder, to be spoilt."""
    return Path(shutil.copytree(weights.segmenter, tmp_path / "net"))


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


def remove_folder(folder):
    shutil.rmtree(folder)


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text('{"_class_name": "NNUNet", ')


def rename_class(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Miner"}))


def remove_weights(folder):
    weights_file(folder).unlink()


def truncate_weights(folder):
    data = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(data[: len(data) // 2])


def empty_weights(folder):
    weights_file(folder).write_bytes(b"")


def widen_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_features": 5}))


def drop_a_weight(folder):
    state = load_file(weights_file(folder))
    state.pop(min(state))
    save_file(state, weights_file(folder))


def add_a_weight(folder):
    save_file(load_file(weights_file(folder)) | {"extra.weight": torch.ones(2)}, weights_file(folder))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (remove_folder, "no such weights folder"),
        (remove_config, "has no config.json"),
        (break_config, "not valid JSON"),
        (rename_class, "holds a Miner, not a Segmenter"),
        (remove_weights, "no *.safetensors weights"),
        (truncate_weights, "do not fit"),
        (empty_weights, "do not fit"),
        (widen_config, "do not fit"),
        (drop_a_weight, "another architecture"),
        (add_a_weight, "another architecture"),
    ],
)
def test_a_spoilt_folder_is_named(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(InputError, match=f"{re.escape(str(folder))}.*{re.escape(reason)}.*cli.py fit"):
        load_pretrained(folder, Segmenter)


def test_weights_that_the_architecture_does_not_have(weights, folder):
    """The weights file of one network beside the configuration of another."""
    shutil.copy(weights_file(Path(weights.miner)), weights_file(folder))
    with pytest.raises(InputError, match=re.escape(str(folder))):
        load_pretrained(folder, Segmenter)


def test_any_subclass_is_found(weights):
    assert type(load_pretrained(weights.segmenter, Segmenter)) is NNUNet
    assert type(load_pretrained(weights.backbone, Backbone)) is SegDiff
    assert type(load_pretrained(weights.miner, Miner)) is Miner


def test_frozen_networks_stay_in_eval_mode():
    segmenter = make_segmenter().freeze()
    assert not any(p.requires_grad for p in segmenter.parameters())
    segmenter.train()
    parent = nn.ModuleDict({"frozen": segmenter, "free": make_segmenter()})
    parent.train()
    assert not any(module.training for module in segmenter.modules())
    assert all(module.training for module in parent["free"].modules())
    nn.ModuleList([parent]).train()
    assert not any(module.training for module in segmenter.modules())


def test_fingerprint_sees_every_weight_and_the_configuration():
    first = make_miner().fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert make_miner().fingerprint() == first
    assert make_miner(variance_bound=0.9).fingerprint() != first
    miner = make_miner()
    for parameter in miner.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        assert miner.fingerprint() != first
        first = miner.fingerprint()


def test_fingerprint_of_half_precision():
    halves = [make_segmenter(seed=seed).to(torch.bfloat16).fingerprint() for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]
    assert halves[0] != make_segmenter(seed=0).fingerprint()


def test_fingerprint_leaves_out_what_is_as_usual():
    """Weights written before an argument was added keep their fingerprint."""
    miner = make_miner()
    before = miner.fingerprint()
    assert miner.config["variance_bound"] == 0.95
    miner._internal_dict = {k: v for k, v in miner.config.items() if k != "variance_bound"}
    assert miner.fingerprint() == before


@pytest.mark.parametrize("name", ["backbone", "segmenter", "miner"])
def test_fingerprint_is_stable_over_save_load_and_freeze(weights, tmp_path, name):
    kind = {"backbone": Backbone, "segmenter": Segmenter, "miner": Miner}[name]
    loaded = load_pretrained(getattr(weights, name), kind)
    first = loaded.fingerprint()
    save_pretrained(loaded, tmp_path / "again", {})
    assert load_pretrained(tmp_path / "again", kind).freeze().fingerprint() == first


def test_fingerprint_of_what_was_built_and_what_was_loaded(tmp_path):
    built = make_segmenter(seed=5)
    save_pretrained(built, tmp_path / "net", {})
    assert load_pretrained(tmp_path / "net", Segmenter).fingerprint() == built.fingerprint()


def test_saving_replaces_the_folder_as_a_whole(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "stale.txt").write_text("from another run")
    save_pretrained(make_miner(), folder, {"steps": 7})
    assert training_facts(folder) == {"steps": 7}
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert training_facts(tmp_path) == {}
