import json

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from diffusion.backbones import ControlLDM, SiameseDiff
from diffusion.checkpoints import read_folder
from diffusion.checkpoints.__main__ import main
from errors import InputError
from networks.pretrained import load_pretrained, save_pretrained
from networks.weight_files import read_weights, write_weights
from original import checkpoint, fixture, write_published


@pytest.fixture
def config(tmp_path):
    """A file of configs/backbones, for either kind."""

    def write(kind, **arguments):
        file = tmp_path / f"{kind}.yaml"
        backbone = {"class_path": kind, "init_args": arguments}
        file.write_text(yaml.safe_dump({"model": {"init_args": {"backbone": backbone}}}))
        return str(file)

    return write


def test_there_and_back(originals, tmp_path, capsys):
    main(["to-diffusers", str(originals["siamesediff"]), str(tmp_path / "folder"), "--heads", "4"])
    said = capsys.readouterr().out
    assert "weights of hint" in said
    assert "14 that no network uses" in said
    main(["to-original", str(tmp_path / "folder"), str(tmp_path / "back.ckpt"), "--wrapper", "lightning"])
    back, expected = read_weights(tmp_path / "back.ckpt"), checkpoint("siamesediff")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["controlldm", "siamesediff"])
def test_a_checkpoint_becomes_weights_and_a_trained_backbone_a_checkpoint(
    kind, originals, tokenizer, config, tmp_path
):
    """What training has changed is in the file that the original code reads; the rest is as it was."""
    name = {"controlldm": "ControlLDM", "siamesediff": "SiameseDiff"}[kind]
    yaml_file = config(name, prompt="a cell", tokenizer=str(tokenizer), guidance=3.0)
    start = str(originals[kind])
    main(["import", start, str(tmp_path / "weights"), "--config", yaml_file, "--heads", "4"])
    backbone = load_pretrained(tmp_path / "weights", ControlLDM)
    assert type(backbone) is {"ControlLDM": ControlLDM, "SiameseDiff": SiameseDiff}[name]
    assert backbone.guidance == 3
    with torch.no_grad():
        backbone.unet.conv_out.bias += 1
        backbone.hint_encoder.state_dict()[min(backbone.hint_encoder.state_dict())].add_(1)
    save_pretrained(backbone, tmp_path / "trained", {})
    export = ["export", str(tmp_path / "trained"), str(tmp_path / "folder"), "--base", start]
    main([*export, "--tokenizer", str(tokenizer)])
    main(["export", str(tmp_path / "trained"), str(tmp_path / "bare"), "--base", start])
    assert not (tmp_path / "bare" / "tokenizer").exists()
    assert (tmp_path / "folder" / "tokenizer" / "vocab.json").is_file()
    main(["to-original", str(tmp_path / "folder"), str(tmp_path / "trained.safetensors")])
    trained, before = load_file(tmp_path / "trained.safetensors"), checkpoint(kind)
    assert trained.keys() == before.keys()
    changed = {key for key, value in before.items() if not torch.equal(trained[key], value)}
    assert len(changed) == 2
    assert "model.diffusion_model.out.2.bias" in changed
    assert any(key.startswith("control_model.input_hint_block.") for key in changed)
    again = type(backbone)(start=str(tmp_path / "folder"), prompt="a cell", guidance=3.0)
    assert torch.equal(again.unet.conv_out.bias, backbone.unet.conv_out.bias)


def test_a_base_without_tables_gets_them(originals, tokenizer, config, tmp_path):
    """A folder from the hub has none, and the original code asks for them."""
    main(["to-diffusers", str(originals["controlldm"]), str(tmp_path / "base"), "--heads", "4"])
    (tmp_path / "base" / "original.safetensors").unlink()
    model = read_folder(tmp_path / "base")
    assert not model.extras
    main(["to-original", str(tmp_path / "base"), str(tmp_path / "back.safetensors")])
    back, expected = load_file(tmp_path / "back.safetensors"), checkpoint("controlldm")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected if key.endswith("position_ids"))
    assert torch.allclose(back["betas"], expected["betas"])


def exported(backbone, base, folder):
    save_pretrained(backbone, folder / "trained", {})
    main(["export", str(folder / "trained"), str(folder / "folder"), "--base", str(base)])
    main(["to-original", str(folder / "folder"), str(folder / "back.ckpt")])
    return read_weights(folder / "back.ckpt"), read_folder(folder / "folder")


def test_an_exported_model_is_labelled_as_it_was_trained(originals, tokenizer, tmp_path):
    """Of the base nothing stays that does not go with the weights: averages, tables of another schedule."""
    weights = checkpoint("controlldm")
    averages = {"model_ema.diffusion_modelout2bias": torch.zeros(4)}
    base = tmp_path / "base.safetensors"
    write_weights(weights | averages, base)
    start = {"start": str(base), "heads": 4, "tokenizer": str(tokenizer)}
    back, _ = exported(ControlLDM(**start), base, tmp_path / "same")
    assert back.keys() == weights.keys()
    assert torch.equal(back["logvar"], weights["logvar"])
    tables = fixture("controlldm")["tables"]
    write_weights({k: v for k, v in weights.items() if k not in tables}, tmp_path / "x.ckpt")
    other = ControlLDM(**start | {"start": str(tmp_path / "x.ckpt")}, prediction="v", beta_end=0.0195)
    back, folder = exported(other, base, tmp_path / "other")
    assert back["betas"][-1].item() == pytest.approx(0.0195)
    assert folder.schedule["prediction"] == "v"
    assert folder.schedule["beta_end"] == 0.0195


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_published_pixel_model_there_and_back(dtype, tmp_path, capsys):
    unet = write_published(tmp_path / "konz", sample_size=256).to(dtype)
    unet.save_pretrained(tmp_path / "konz" / "unet")
    config = "configs/backbones/segdiff_konz.yaml"
    main(["import", str(tmp_path / "konz"), str(tmp_path / "weights"), "--config", config])
    assert f"all {len(unet.state_dict()):5d} weights of unet" in capsys.readouterr().out
    main(["export", str(tmp_path / "weights"), str(tmp_path / "back")])
    back = UNet2DModel.from_pretrained(tmp_path / "back" / "unet", torch_dtype=dtype)
    ours, theirs = (json.loads((tmp_path / f / "unet" / "config.json").read_text()) for f in ("back", "konz"))
    assert ours.keys() == theirs.keys()
    assert all(ours[key] == theirs[key] for key in ours)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in unet.state_dict().items())
    ours, theirs = (DDPMScheduler.from_pretrained(tmp_path / f / "scheduler") for f in ("back", "konz"))
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.config.clip_sample == theirs.config.clip_sample
    assert not (tmp_path / "back" / "model_index.json").exists()


def test_what_the_published_pixel_code_does_not_know_is_not_exported(weights, tmp_path):
    with pytest.raises(InputError, match="mask_encoding onehot: the published code has concat and"):
        main(["export", weights.backbone, str(tmp_path / "folder")])


@pytest.mark.parametrize("command", ["to-diffusers", "to-original", "import", "export"])
def test_nothing_is_written_over(command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    flags = ["--config", "x.yaml"] if command == "import" else []
    with pytest.raises(InputError, match=r"mine: exists; remove it, or give another name"):
        main([command, str(tmp_path / "mine"), str(tmp_path / "mine"), *flags])
    assert (tmp_path / "mine" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("kind", "arguments"), [("TrainingBatch", {}), ("ControlLDM", {"hint_chanels": [16, 32]})]
)
def test_a_config_of_another_class_or_with_a_misspelt_argument(kind, arguments, config, originals, tmp_path):
    start = str(originals["controlldm"])
    with pytest.raises(InputError, match=rf"{kind}.yaml: describes no backbone .*({kind}|hint_chanels)"):
        main(["import", start, str(tmp_path / "w"), "--config", config(kind, **arguments)])


def test_what_export_needs_of_a_latent_model(originals, tokenizer, tmp_path):
    start = str(originals["controlldm"])
    save_pretrained(ControlLDM(start=start, heads=4, tokenizer=str(tokenizer)), tmp_path / "weights", {})
    export = ["export", str(tmp_path / "weights"), str(tmp_path / "folder")]
    with pytest.raises(InputError, match=r"--base: give what .*weights was started from"):
        main(export)
    with pytest.raises(InputError, match=r"tokenizer /nope: is no folder"):
        main([*export, "--base", start, "--tokenizer", "/nope"])
    bare = {k: v for k, v in checkpoint("controlldm").items() if not k.startswith("cond_stage_model")}
    write_weights(bare, tmp_path / "bare.ckpt")
    with pytest.raises(InputError, match=r"bare.ckpt: has no text encoder"):
        main([*export, "--base", str(tmp_path / "bare.ckpt")])
    assert not (tmp_path / "folder").exists()


def test_a_file_that_describes_no_backbone(tmp_path, originals):
    (tmp_path / "x.yaml").write_text("model: {}")
    with pytest.raises(InputError, match=r"x.yaml: describes no backbone .*configs/backbones"):
        main(
            [
                "import",
                str(originals["controlldm"]),
                str(tmp_path / "w"),
                "--config",
                str(tmp_path / "x.yaml"),
            ]
        )
    assert not (tmp_path / "w").exists()
