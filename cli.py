"""The application: ``python cli.py fit|validate|test|predict --config …``."""

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

# Imported so that every class is known by its name alone.
import callbacks
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
import methods  # noqa: F401
from callbacks.paths import in_run
from errors import InputError

_ELSEWHERE = re.compile("(last|best|hpc|registry.*|.*://.*)$")
"""Checkpoints that Lightning finds by itself."""


class CLI(LightningCLI):
    """LightningCLI in which ``--trainer.default_root_dir`` names the folder of the run for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the logger write to the folder of the run, and a training end with its test."""
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test the weights that fit hands on."
        )

    def check_data(self) -> None:
        """Read the data and check it against the networks before anything is written."""
        checkpoint = self.config[str(self.subcommand)].ckpt_path
        if checkpoint and not Path(checkpoint).exists() and not _ELSEWHERE.match(str(checkpoint)):
            raise InputError(f"ckpt_path {checkpoint}: does not exist; give a checkpoint's path, or last")
        self.datamodule.setup(self.subcommand)
        if hasattr(self.model, "check_data"):
            self.model.check_data(self.datamodule.source)

    def before_test(self) -> None:
        """Check the data, and that there are weights to score or to predict with."""
        self.check_data()
        if hasattr(self.model, "check_trained"):
            self.model.check_trained(self.config[str(self.subcommand)].ckpt_path)

    before_validate = before_test

    def before_predict(self) -> None:
        """Check what a test needs, and that the predictions go somewhere where no other folder stands."""
        self.before_test()
        writers = [c for c in self.trainer.callbacks if isinstance(c, BasePredictionWriter)]  # type: ignore[attr-defined]
        if not writers:
            raise InputError(
                "trainer.callbacks: none of them writes what is predicted; take configs/stages/"
                "synthesis.yaml to fill a set, or configs/stages/prediction.yaml to segment images"
            )
        for writer in writers:
            if isinstance(writer, callbacks.FolderWriter):
                writer.check_folder(self.trainer)

    def before_fit(self) -> None:
        """Check the data, and that what is to be tested afterwards can be; say what is given up."""
        self.check_data()
        left = in_run(self.trainer, "tensorboard/checkpoints/last.ckpt")
        if left.exists() and not self.config.fit.ckpt_path:
            rank_zero_warn(
                f"{left}: an earlier training ended or was interrupted there, and this one starts anew in "
                "its folder; interrupt it now and add --ckpt_path=last to go on from there"
            )
        exporting = any(isinstance(c, callbacks.ExportWeights) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.config.fit.test_after_fit and not (exporting and hasattr(self.model, "take")):
            raise InputError(
                f"test_after_fit: {type(self.model).__name__} has no test, or no ExportWeights hands its "
                "weights on; leave it out"
            )

    def after_fit(self) -> None:
        """Test the weights that were handed on, if asked to: those of the best validation, say."""
        if self.config.fit.test_after_fit:
            self.trainer.strategy.barrier()  # until the first process has written them
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, callbacks.ExportWeights):
                    self.model.take(str(in_run(self.trainer, callback.folder)))
            self.trainer.test(self.model, datamodule=self.datamodule)


def main(args: ArgsType = None) -> LightningCLI:
    """Run one stage; ``args`` are those of the command line."""
    return CLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
