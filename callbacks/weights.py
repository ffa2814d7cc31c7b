"""Hand a stage's result on: a folder of weights, config.json + safetensors."""

import math
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging

from callbacks.paths import in_run
from datamodules.streams import optimiser_steps
from errors import InputError
from files import beside, put_in_place
from networks.pretrained import save_pretrained


class ExportWeights(Callback):
    """Write ``module.trained`` to a folder when training ends, as the next stage reads it.

    Without a monitor, or without a validation, the weights are the last ones (the averaged ones where an
    averaging callback runs). With a monitor they are those of the best validation. ``training.json``
    beside them notes what they were trained on, and how they did on validation.

    Args:
        folder: where the weights go, relative to ``trainer.default_root_dir``; replaced as a whole.
        monitor: a logged metric to choose by, such as ``val/dsc``.
        mode: whether a larger or a smaller value is better.

    Raises:
        InputError: a monitor stands beside an averaging callback: the metric would be that of the average,
            the weights would not.
    """

    def __init__(
        self, folder: str = "weights", monitor: str | None = None, mode: Literal["max", "min"] = "max"
    ) -> None:
        self.folder = folder
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.best = -math.inf

    def _best_folder(self, trainer: L.Trainer) -> Path:
        final = in_run(trainer, self.folder)
        return final.with_name(f".{final.name}.best")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a choice among averages, gone when it is made, and steps that nothing validates."""
        if self.monitor is not None and any(
            isinstance(callback, WeightAveraging)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
        ):
            raise InputError(
                f"ExportWeights: monitor {self.monitor} would choose by the average and keep what is "
                "averaged; leave out the monitor, or the averaging callback"
            )

        batches = getattr(trainer.datamodule, "steps_per_epoch", 0)  # type: ignore[attr-defined]
        steps = optimiser_steps(trainer, batches)
        rest = trainer.max_steps % steps if steps and trainer.max_steps > steps else 0
        if self.monitor is not None and stage == "fit" and rest:
            raise InputError(
                f"trainer.max_steps {trainer.max_steps}: no validation would see the last {rest} steps, "
                f"with one every {steps}; make it a multiple of these, or change data.steps_per_epoch"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an earlier run left, unless this one resumes it; what it resumes may lie elsewhere."""
        kept = self._best_folder(trainer)
        if trainer.is_global_zero and trainer.ckpt_path is None:  # the step is not restored yet
            shutil.rmtree(kept, ignore_errors=True)
        elif not kept.exists():
            self.best = -math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the weights when the monitored metric is the best so far; NaN is worse than any number."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"ExportWeights: nothing logs {self.monitor!r}; logged are {known}")
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        kept = self._best_folder(trainer)
        if trainer.is_global_zero and (value > self.best or not kept.exists()):
            self._write(trainer, pl_module, kept)
        self.best = max(self.best, -math.inf if math.isnan(value) else value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Put the chosen weights in place."""
        if not trainer.is_global_zero:
            return
        folder, kept = in_run(trainer, self.folder), self._best_folder(trainer)
        if self.monitor is not None and kept.exists():
            partial = beside(folder)
            shutil.copytree(kept, partial)  # kept stays: a finished run that is resumed exports it again
            put_in_place(partial, folder)
        else:
            self._write(trainer, pl_module, folder)

    def _write(self, trainer: L.Trainer, pl_module: Any, folder: Path) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        facts = {
            "source": datamodule.source.name,
            "class_names": list(datamodule.source.class_names),
            "channels": datamodule.source.channels,
            "size": list(datamodule.source.size),
            "steps": int(trainer.estimated_stepping_batches),
            "chosen_step": trainer.global_step,
        }
        for part, keys in ((datamodule, ("n_real", "n_synthetic")), (pl_module, ("inference", "mirror"))):
            facts |= {key: getattr(part, key) for key in keys if hasattr(part, key)}
        logged = trainer.callback_metrics.items()
        found = {name: float(value) for name, value in logged if name.startswith("val/") or "/val_" in name}
        if found:
            facts["validation"] = {k: v if math.isfinite(v) else None for k, v in sorted(found.items())}
        save_pretrained(pl_module.trained, folder, facts)

    def state_dict(self) -> dict[str, Any]:
        """Keep the best value over a resumed run."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.best = state_dict["best"]
