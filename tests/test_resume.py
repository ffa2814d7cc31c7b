"""An interrupted stage that goes on ends with the weights of an uninterrupted one."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

import cli
from networks import Segmenter
from networks.pretrained import load_pretrained

ROOT = Path(__file__).parents[1]


class InterruptionError(Exception):
    pass


class InterruptAfterEpoch(Callback):
    """Fails in the epoch after ``epoch``, when the checkpoint of ``epoch`` is written."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch > self.epoch:
            raise InterruptionError


def fit(folder: Path, *more: str) -> None:
    layers = ("stages/segmenter", "data/phantom_longtail32", "segmenters/nnunet_rgb32")
    cli.main(
        [
            "fit",
            *(f"--config={ROOT}/configs/{layer}.yaml" for layer in layers),
            f"--trainer.default_root_dir={folder}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=6",
            "--data.steps_per_epoch=2",
            "--data.batch_size=4",
            "--data.source.init_args.n_val=4",
            "--ckpt_path=last",
            *more,
        ]
    )


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    fit(tmp_path / "whole")
    with pytest.raises(InterruptionError):
        fit(
            tmp_path / "parts",
            "--trainer.callbacks+=test_resume.InterruptAfterEpoch",
            "--trainer.callbacks.epoch=0",
        )
    assert not (tmp_path / "parts" / "weights").exists()
    fit(tmp_path / "parts")
    whole, parts = (load_pretrained(tmp_path / name / "weights", Segmenter) for name in ("whole", "parts"))
    assert parts.fingerprint() == whole.fingerprint()
