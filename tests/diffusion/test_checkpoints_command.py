import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion.backbones import ControlLDM, SiameseDiff
from diffusion.checkpoints import read_folder
from diffusion.checkpoints.__main__ import main
from errors import InputError
from networks.pretrained import load_pretrained, save_pretrained
from networks.weight_files import read_weights
from original import checkpoint


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
    assert "0 weights missing, 0 unexplained" in said
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
