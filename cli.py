"""The application: ``python cli.py fit|validate|test|predict --config …``."""

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Imported so that every class is known by its name alone.
import callbacks
import datamodules  # noqa: F401
import lightning_modules  # noqa: F401
import methods  # noqa: F401


class CLI(LightningCLI):
    """LightningCLI in which ``--trainer.default_root_dir`` names the folder of the run for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the logger write to the folder of the run."""
        parser.link_arguments("trainer.default_root_dir", "trainer.logger.init_args.save_dir")

    def check_data(self) -> None:
        """Read the data and check it against the networks before anything is written."""
        self.datamodule.setup(self.subcommand)
        if hasattr(self.model, "check_data"):
            self.model.check_data(self.datamodule.source)

    def before_predict(self) -> None:
        """Check the data, and that no folder stands where the synthetic set goes."""
        self.check_data()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.SynthesisCallback):
                callback.check_folder(self.trainer)

    before_fit = before_validate = before_test = check_data


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
