import logging
import os
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import cli
import original
from callbacks import SynthesisCallback
from datamodules import ConditionDataModule
from datamodules.sources import PhantomSource
from diffusion.backbones import ControlLDM, SegDiff
from lightning_modules import SynthesisLitModule
from methods import Base
from networks import Miner, NNUNet
from networks.pretrained import save_pretrained
from networks.weight_files import write_weights

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start: as many run at once as there are cores
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_backbone(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "image_channels": 3,
        "num_classes": 2,
        "mask_encoding": "onehot",
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_levels": (),
        "norm_num_groups": 4,
    }
    return SegDiff(**settings | changes)


def make_controlldm(seed=0, kind=ControlLDM, **changes):
    """A tiny latent model for images that the VAE halves once; what starts at zero is not left there."""
    torch.manual_seed(seed)
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    settings = {
        "unet_config": blocks
        | {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 6,
            "attention_head_dim": 2,
        },
        "vae_config": blocks
        | {
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "scaling_factor": 0.5,
        },
        "hint_channels": (4, 8),
        "tokens": 2,
        "learn": "all",
    }
    backbone = kind(**settings | changes)
    for part in (backbone.controlnet, backbone.hint_encoder):
        for weight in part.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    torch.nn.init.normal_(backbone.contexts)
    return backbone


def latent_batch(backbone, t):
    """What a training loss needs of a batch for ``make_controlldm``, beside the progress."""
    torch.manual_seed(0)
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    return {
        "image": image,
        "mask": torch.randint(0, 2, (4, 16, 16)),
        "x_0": backbone.encode(image).detach(),
        "epsilon": torch.randn(4, 4, 8, 8),
        "t": torch.tensor(t),
        "chance": torch.tensor([0.0, 0.3, 0.6, 0.9]),
    }


def make_segmenter(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "in_channels": 3,
        "num_classes": 2,
        "patch_size": (32, 32),
        "base_features": 4,
        "max_features": 8,
    }
    return NNUNet(**settings | changes)


def make_miner(seed=0, trained=False, **changes):
    """A small miner; ``trained`` gives its zeroed output layers small random weights."""
    torch.manual_seed(seed)
    settings = {"channels": 3, "base_width": 8, "multipliers": (1, 2), "pooled_levels": 1, "head_width": 8}
    miner = Miner(**settings | changes)
    if trained:
        for head in (miner.mean_head, miner.variance_head):
            torch.nn.init.normal_(head[-1].weight, std=0.05)
    return miner


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> SimpleNamespace:
    """Folders of tiny networks for 32 × 32 RGB images of two classes."""
    root = tmp_path_factory.mktemp("weights")
    networks = {
        "backbone": make_backbone().eval(),
        "segmenter": make_segmenter().eval(),
        "miner": make_miner(trained=True).eval(),
        "untrained_miner": make_miner().eval(),
    }
    for name, network in networks.items():
        save_pretrained(network, root / name, {})
    return SimpleNamespace(**{name: str(root / name) for name in networks})


@pytest.fixture(scope="session")
def source() -> PhantomSource:
    """Six training, four validation and five test images; polyps of 32 × 32 pixels."""
    return PhantomSource("polyp", size=32, n_train=6, n_val=4, n_test=5)


def files_of(folder) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    folder = Path(folder)
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def make_trainer(root, **settings) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=root, **quiet | defaults | settings)


def keep_last(folder) -> ModelCheckpoint:
    """The checkpoint callback of the stages' configs, writing to a folder."""
    return ModelCheckpoint(folder, save_last="link", save_top_k=1, enable_version_counter=False)


@pytest.fixture
def parsed(monkeypatch, capsys):
    """Return a function that parses a command line and neither builds nor runs anything."""
    monkeypatch.setattr(cli.CLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(cli.CLI, "_run_subcommand", lambda self, subcommand: None)

    def run(*argv):
        try:
            return cli.main(list(argv)).config[argv[0]]
        except SystemExit:
            pytest.fail(f"{' '.join(argv)}: {capsys.readouterr().err}", pytrace=False)

    return run


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a CLIP tokenizer of 64 tokens."""
    return original.write_tokenizer(tmp_path_factory.mktemp("clip") / "tokenizer")


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Tiny checkpoints in the layout of the original repositories, by kind."""
    folder = tmp_path_factory.mktemp("originals")
    found = {kind: folder / f"{kind}.safetensors" for kind in original.KINDS}
    for kind, file in found.items():
        write_weights(original.checkpoint(kind), file)
    return found


@pytest.fixture(scope="session")
def made_by(weights, source, tmp_path_factory):
    """Returns a function that makes a set of twelve samples with a schedule of two steps."""

    def make(method):
        folder = tmp_path_factory.mktemp(method.name)
        module = SynthesisLitModule(weights.backbone, weights.segmenter, method, steps=2, seed=4)
        trainer = make_trainer(folder, callbacks=[SynthesisCallback()])
        trainer.predict(module, ConditionDataModule(source, budget=2.0), return_predictions=False)
        return folder / "synthetic"

    return make


@pytest.fixture(scope="session")
def plain_samples(made_by):
    return made_by(Base())
