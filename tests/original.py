"""Tiny checkpoints in the layout of the original repositories, and what their networks say of them.

``fixtures/*.json`` hold the name and shape of every weight of a tiny ``ControlLDM`` (32 features, two
levels, one layer, four heads; prompts of 12 × 64), built by the original code, and what that code returned
for weights and inputs that :func:`draw` and :func:`inputs` make anew from their names: ``controlldm.json``
by ControlNet's repository, whose networks FairDiff and DiffBoost share, ``siamesediff.json`` by
Siamese-Diffusion's.
"""

import json
import zlib
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("controlldm", "siamesediff")
SAMPLE = 97
"""Of large outputs every 97th value is kept."""


def normal(name, shape):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def draw(name, shape):
    """Return a weight that depends on its name alone."""
    if len(shape) == 1:
        return normal(name, shape) * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    fan_in = int(torch.tensor(shape[1:]).prod())
    return normal(name, shape) * (1.0 if "embedding" in name else fan_in**-0.5)


def inputs():
    """Return what the networks were given: three samples of 64 × 64 pixels."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = torch.stack(
        [(rows - 20 - 8 * k) ** 2 + (columns - 30) ** 2 < 150 + 90 * k for k in range(3)]
    ).long()
    return {
        "x": normal("x", (3, 4, 8, 8)),
        "t": torch.tensor([7, 150, 900]),
        "prompt": normal("prompt", (3, 12, 64)),
        "mask": mask,
        "image": normal("image", (3, 3, 64, 64)).clamp(-1, 1),
        "epsilon": normal("epsilon", (3, 4, 8, 8)),
        "ids": torch.arange(36).reshape(3, 12) + 5,
    }


def fixture(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def checkpoint(name):
    """Return the tiny checkpoint of a fixture, original names."""
    tables = fixture(name)["tables"]
    weights = {key: draw(key, shape) for key, shape in fixture(name)["shapes"].items()}
    for key, shape in tables.items():
        weights[key] = torch.arange(shape[-1])[None] if key.endswith("position_ids") else normal(key, shape)
    weights["betas"] = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).float()
    return weights


def write_tokenizer(folder):
    """Write a CLIP tokenizer of 64 tokens: letters, each also at the end of a word."""
    letters = "abcdefghijklmnopqrstuvwxyz,. "
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [f"<{k}>" for k in range(62 - len(tokens))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_published(folder, **changes):
    """Write a folder as the training code of Konz et al. does."""
    torch.manual_seed(4)
    unet = UNet2DModel(
        **{
            "sample_size": 16,
            "in_channels": 2,
            "out_channels": 1,
            "layers_per_block": 2,
            "block_out_channels": (8, 8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        }
        | changes
    )
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder / "scheduler")
    return unet


def edit(file, **settings):
    """Change settings in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
