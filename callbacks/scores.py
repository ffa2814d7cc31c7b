"""Write the scores of the test sets where the report reads them."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from callbacks.paths import in_run
from files import write_atomically


class ScoreWriter(Callback):
    """Write DSC and ASD of every test set, and the protocol they follow, to a JSON file.

    Args:
        path: the file to write, relative to ``trainer.default_root_dir``.
    """

    def __init__(self, path: str = "test.json") -> None:
        self.path = path

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect the scores (on every rank) and write them (on the first)."""
        scores = {
            name: score.compute()
            for name, score in zip(pl_module.test_names, pl_module.test_scores, strict=True)
        }
        if trainer.is_global_zero:
            source: Any = trainer.datamodule.source  # type: ignore[attr-defined]
            report = {
                "dataset": source.name,
                "dataset_version": source.version,
                "segmenter": type(pl_module.segmenter).__name__,
                "segmenter_fingerprint": pl_module.segmenter.fingerprint(),
                **pl_module.training_facts,
                "protocol": pl_module.test_scores[0].protocol,
                "test_sets": scores,
            }
            write_atomically(in_run(trainer, self.path), json.dumps(report, indent=2) + "\n")
            for name, score in scores.items():
                print(f"{name}: DSC {score['dsc']:.2f} %, ASD {score['asd']:.2f}, {score['n_cases']} cases")
                if trainer.logger is not None:
                    trainer.logger.log_metrics({f"{name}/{key}": value for key, value in score.items()})
