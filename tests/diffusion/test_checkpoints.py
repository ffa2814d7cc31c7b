import json
import os
import pickle
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.backbones import ControlLDM, SiameseDiff
from diffusion.checkpoints import (
    original_weights,
    read_folder,
    read_model,
    read_original,
    write_folder,
)
from diffusion.checkpoints.layout import UNET
from diffusion.checkpoints.model import local, schedule_tables
from errors import InputError
from networks.weight_files import read_weights, write_weights
from original import KINDS, SAMPLE, checkpoint, fixture, inputs

CLASSES = {"controlldm": ControlLDM, "siamesediff": SiameseDiff}


def backbone(kind, start, tokenizer, **changes):
    return CLASSES[kind](start=str(start), tokenizer=str(tokenizer), **changes).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_answers_as_the_original_code(kind, originals, tokenizer, tmp_path):
    """ε, latents, images and prompts are those that the original repositories' networks returned."""
    told, given = fixture(kind), inputs()
    write_folder(read_original(originals[kind], heads=4), tmp_path / "folder", tokenizer)
    network = backbone(kind, tmp_path / "folder", tokenizer, guidance=1)
    with torch.no_grad():
        condition = network.condition(given["mask"]) | {"prompt": given["prompt"]}
        found = {
            "epsilon": network.epsilon(given["x"], given["t"], condition).flatten(),
            "encoded": network.encode(given["image"]).flatten(),
            "decoded": network.decode(given["x"]).flatten()[::SAMPLE],
        }
    for name, values in found.items():
        assert torch.allclose(values, torch.tensor(told[name]), atol=1e-5), name
    model = read_folder(tmp_path / "folder")
    text = CLIPTextModel(CLIPTextConfig(**model.configs["text_encoder"])).eval()
    assert text.config.num_attention_heads == 1
    with torch.no_grad():
        written = CLIPTextModel.from_pretrained(tmp_path / "folder" / "text_encoder").eval()
        values = written(given["ids"]).last_hidden_state.flatten()[::SAMPLE]
    assert torch.allclose(values, torch.tensor(told["text"]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_changes_no_bit(kind, dtype, tmp_path):
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in checkpoint(kind).items()}
    write_weights(weights, tmp_path / "model.safetensors")
    write_folder(read_original(tmp_path / "model.safetensors", heads=4), tmp_path / "folder")
    write_weights(original_weights(read_folder(tmp_path / "folder")), tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("wrapper", ["bare", "lightning", "deepspeed"])
@pytest.mark.parametrize("suffix", ["ckpt", "pth"])
def test_every_wrapper_and_prefix_is_read(wrapper, suffix, tmp_path):
    weights = checkpoint("siamesediff")
    write_weights(weights, tmp_path / f"model.{suffix}", wrapper)
    read = read_weights(tmp_path / f"model.{suffix}")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], value) for key, value in weights.items())


def test_the_prefix_of_parallel_training_is_taken_off(tmp_path):
    weights = checkpoint("controlldm")
    for prefix in ("module.", "module._forward_module.", "_forward_module.module.", "model."):
        torch.save({"module": {f"{prefix}{k}": v for k, v in weights.items()}}, tmp_path / "model.pth")
        assert read_weights(tmp_path / "model.pth").keys() == weights.keys()


def test_names_agree_with_those_of_diffusers(originals):
    """diffusers has its own conversion of the U-Net, the plain ControlNet and the VAE."""
    weights = checkpoint("controlldm")
    model = read_original(originals["controlldm"], heads=4)
    theirs = {
        "unet": convert_ldm_unet_checkpoint(weights, model.configs["unet"]),
        "controlnet": convert_controlnet_checkpoint(weights, model.configs["controlnet"]),
        "vae": convert_ldm_vae_checkpoint(dict(weights), model.configs["vae"]),
    }
    for part, expected in theirs.items():
        assert model.weights[part].keys() == expected.keys()
        assert all(torch.equal(model.weights[part][key], value) for key, value in expected.items())


def test_tables_of_the_schedule_are_those_of_the_original_code():
    told = fixture("controlldm")
    tables = schedule_tables("scaled_linear", 0.00085, 0.012, 1000)
    assert tables.keys() == {k for k in told["tables"] if "position_ids" not in k}
    for name, values in told["table_values"].items():
        assert tables[name][[0, 1, 500, 999]].tolist() == values, name


def test_a_model_without_a_controlnet_starts_from_its_encoder(originals, tokenizer, tmp_path):
    weights = {k: v for k, v in checkpoint("controlldm").items() if not k.startswith("control_model")}
    write_weights(weights, tmp_path / "sd.safetensors")
    write_folder(read_original(tmp_path / "sd.safetensors", heads=4), tmp_path / "sd", tokenizer)
    for start in (tmp_path / "sd.safetensors", tmp_path / "sd"):
        network = ControlLDM(start=str(start), tokenizer=str(tokenizer))
        for name, value in network.controlnet.named_parameters():
            if name in network.unet.state_dict():
                assert torch.equal(value, network.unet.state_dict()[name]), name
            elif name.startswith("controlnet_"):
                assert not value.any()


def old_names(weights, four):
    """Return the VAE's weights as old folders name them, some of them 1 × 1 convolutions."""
    new, renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, {}
    for key, value in weights.items():
        for name, old in new.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{old}.")
        convolution = four and key.endswith(("query.weight", "key.weight"))
        renamed[key] = value[..., None, None] if convolution else value
    return renamed


@pytest.mark.parametrize("four", [False, True])
def test_a_vae_with_the_old_names_of_its_attention_decodes_as_ever(four, originals, tokenizer, tmp_path):
    write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "folder", tokenizer)
    before, z = backbone("controlldm", tmp_path / "folder", tokenizer), inputs()["x"]
    file = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = old_names(load_file(file), four)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, file)
    after = backbone("controlldm", tmp_path / "folder", tokenizer)
    with torch.no_grad():
        assert torch.equal(after.decode(z), before.decode(z))
        if not four:
            theirs = AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae")
            assert torch.equal(after.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample)


@pytest.mark.parametrize("kind", ["bin", "fp16.safetensors", "fp16.bin"])
def test_other_files_of_weights_are_read_where_there_is_no_usual_one(kind, originals, tmp_path):
    write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "folder")
    expected = read_folder(tmp_path / "folder").weights["unet"]
    usual = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    write_weights(expected, usual.with_name(f"diffusion_pytorch_model.{kind}"))
    usual.unlink()
    found = read_folder(tmp_path / "folder").weights["unet"]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    usual.with_name(f"diffusion_pytorch_model.{kind}").unlink()
    with pytest.raises(InputError, match=r"unet: holds no weights \(\*.safetensors, "):
        read_folder(tmp_path / "folder")


def test_the_hub_is_asked_for_other_files_where_it_has_no_usual_ones(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")

    def download(name, allow_patterns, ignore_patterns):
        asked.append("*.bin" in ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("diffusion.checkpoints.model.snapshot_download", download)
    assert local("someone/old") == tmp_path
    assert asked == [True, False]
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").touch()
    local("someone/new")
    assert asked == [True, False, True]


def broken(tmp_path, change):
    weights = checkpoint("controlldm")
    change(weights)
    write_weights(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: [w.pop(k) for k in list(w)[::2]], "lacks|has no|not whole|is missing"),
        (
            lambda w: w.pop("control_model.zero_convs.1.0.bias"),
            r"the controlnet is not whole: 1 .*is missing",
        ),
        (
            lambda w: w.update({"lora.up": torch.zeros(2)}),
            r"1 weights belong to nothing that is known \(lora.up",
        ),
        (
            lambda w: w.update({"model.diffusion_model.out.2.bias": torch.zeros(3)}),
            r"the unet is not whole: 1 .*conv_out.bias is \(3,\), not \(4,\)",
        ),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("first_stage")], "has no first_stage_model"),
        (
            lambda w: w.update(betas=torch.linspace(0.1, 0.2, 1000) ** 3),
            "another rule than scaled_linear and",
        ),
        *[
            (lambda w, betas=betas: w.update(betas=betas), "betas .* another rule than scaled_linear")
            for betas in (torch.zeros(1), torch.tensor(1.0), torch.ones(1000), torch.ones(2, 2))
        ],
        (
            lambda w: w.update(scale_factor=torch.ones(4)),
            "has a weight of another name or shape .*4 elements",
        ),
        (
            lambda w: w.update(scale_factor=torch.tensor(torch.nan)),
            "another name or shape .*scale_factor nan",
        ),
        (lambda w: w.update({f"{UNET}out.2.bias": torch.full((4,), torch.nan)}), "conv_out.bias holds NaN"),
        (lambda w: w.update({f"{UNET}out.2.bias": torch.ones(4).int()}), "conv_out.bias is torch.int32, not"),
        (
            lambda w: w.update({f"{UNET}input_blocks.x.0.weight": torch.ones(4)}),
            "another name or shape .*'x'",
        ),
        (lambda w: w.update({f"{UNET}input_blocks.0.0.weight": torch.ones(())}), "another name or shape"),
        (
            lambda w: w.update({f"{UNET}input_blocks.1.0.in_layers.2.weight": torch.ones(48, 32, 3, 3)}),
            r"the unet describes no network \(ValueError",
        ),
        (lambda w: (w.clear(), w.update({"conv.weight": torch.zeros(2)})), "it is no whole model of latent"),
    ],
    ids=[
        "half the keys",
        "one missing",
        "one too many",
        "other channels",
        "no vae",
        "other schedule",
        *("no schedule: one β", "no schedule: a number", "no schedule: ones", "no schedule: a matrix"),
        *("scales of the latents", "no scale", "no number", "whole numbers"),
        *("odd name", "a number for a convolution", "odd width"),
        "another network",
    ],
)
def test_a_broken_checkpoint_says_what_is_wrong(change, said, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        read_original(broken(tmp_path, change), heads=4)
    assert str(tmp_path / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_with_code_is_refused_without_running_it(wrapped, tmp_path):
    class Marks:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    content = {"state_dict": checkpoint("controlldm"), "callbacks": Marks()}
    file = tmp_path / "model.ckpt"
    if wrapped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(Marks(), protocol=2))
    with pytest.raises(InputError, match=r"was refused: it holds more than weights.*mkdir"):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_an_old_lightning_file_is_read_without_its_objects(tmp_path, monkeypatch):
    """They name the classes of callbacks, which are not imported."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    weights = {"a": torch.ones(2)}
    content = {"state_dict": weights, "callbacks": {module.ModelCheckpoint: {"best": 1}}}
    torch.save(content, tmp_path / "old.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_weights(tmp_path / "old.ckpt")["a"], weights["a"])
    assert module.__name__ not in sys.modules


def test_settings_and_numbers_in_a_lightning_file_are_not_looked_at(tmp_path, monkeypatch):
    """Settings as omegaconf pickles them: they name their own classes and those of what they hold."""
    import sys
    import types

    kinds = {"listconfig": "ListConfig", "nodes": "AnyNode", "base": "ContainerMetadata"}
    made = {}
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    for where, name in kinds.items():
        module = types.ModuleType(f"omegaconf.{where}")
        made[name] = type(name, (), {"__module__": module.__name__})
        setattr(module, name, made[name])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    settings, node, facts = (made[name]() for name in kinds.values())
    facts.__dict__ |= {"object_type": list, "key_type": int, "ref_type": Any, "flags": defaultdict(dict)}
    settings.__dict__ |= {"_metadata": facts, "_content": [node]}
    callback = {"best": np.float64(0.5), "step": np.int64(3), "seen": defaultdict(list, {"a": [1]})}
    weights = {"a": torch.ones(2)}
    content = {"state_dict": weights, "hyper_parameters": {"size": settings}, "callbacks": {"x": callback}}
    torch.save(content, tmp_path / "old.ckpt")
    for name in ("omegaconf", *(f"omegaconf.{where}" for where in kinds)):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_weights(tmp_path / "old.ckpt")["a"], weights["a"])
    assert not any(name.startswith("omegaconf") for name in sys.modules)


def test_files_are_read_by_what_they_hold(tmp_path):
    weights = {"a": torch.ones(2)}
    save_file(weights, tmp_path / "model.ckpt")
    torch.save(weights, tmp_path / "model.safetensors")
    for name in ("model.ckpt", "model.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], weights["a"])
    (tmp_path / "page.ckpt").write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"page.ckpt: is damaged or no .* \(it begins with b'<html>404"):
        read_weights(tmp_path / "page.ckpt")
    with pytest.raises(InputError, match="is a folder, no checkpoint file"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match=r"page.ckpt: is a file; give the folder"):
        read_folder(tmp_path / "page.ckpt")


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_truncated_file_says_so(suffix, tmp_path):
    file = tmp_path / f"model.{suffix}"
    write_weights(checkpoint("controlldm"), file)
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(InputError, match=r"is damaged or no .*; fetch it again"):
        read_model(file)


def test_what_is_no_model_says_so(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint file"):
        read_weights(tmp_path / "nowhere.ckpt")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no weights by name, but a list"):
        read_weights(tmp_path / "list.pth")
    torch.save({1: torch.ones(2)}, tmp_path / "numbered.pth")
    with pytest.raises(InputError, match="holds no weights by name, but a dict"):
        read_weights(tmp_path / "numbered.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no unet/"):
        read_model(tmp_path / "empty")
    with pytest.raises(InputError, match="safetensors file has no wrapper"):
        write_weights({"a": torch.ones(1)}, tmp_path / "x.safetensors", "lightning")


def test_a_folder_with_another_unet_than_its_config_says_so(originals, tmp_path):
    write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "folder")
    config = tmp_path / "folder" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(InputError, match=r"the unet is not whole.*conv_in.weight is \(32, 4, 3, 3\)"):
        read_folder(tmp_path / "folder")
    with pytest.raises(InputError, match="exists; remove it"):
        write_folder(read_original(originals["controlldm"], heads=4), tmp_path / "folder")
    stored = tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({}, stored.with_name("another.safetensors"))
    with pytest.raises(InputError, match="holds 2 safetensors files"):
        read_folder(tmp_path / "folder")


def test_a_checkpoint_of_another_class_says_so(originals, tokenizer):
    with pytest.raises(InputError, match=r"reads hints by another encoder than ControlLDM"):
        ControlLDM(start=str(originals["siamesediff"]), tokenizer=str(tokenizer))
    with pytest.raises(InputError, match=r"reads hints by another encoder than SiameseDiff"):
        SiameseDiff(start=str(originals["controlldm"]), tokenizer=str(tokenizer))
