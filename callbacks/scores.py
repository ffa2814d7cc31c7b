"""Write the scores of the test sets where the report reads them."""

import csv
import io
import json
import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from callbacks.paths import in_run
from evaluation.metrics import SegmentationScore
from evaluation.protocols import LABELS, OVERLAPS
from files import finite, write_atomically


class ScoreWriter(Callback):
    """Write the scores of every test set, and the protocol they follow, to files.

    Args:
        path: JSON file of the means, relative to ``trainer.default_root_dir``.
        cases: CSV file with a line for every test set, case and class: their names, and each measure, empty
            where the class is not scored. Relative to ``trainer.default_root_dir``.
    """

    def __init__(self, path: str = "test.json", cases: str = "test_cases.csv") -> None:
        self.path = path
        self.cases = cases

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Collect the scores (on every rank) and write them (on the first)."""
        sets = dict(zip(pl_module.test_names, pl_module.test_scores, strict=True))
        means = {name: score.compute() for name, score in sets.items()}
        cases = {name: score.cases() for name, score in sets.items()}
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            report = {
                "dataset": data.source.name,
                "dataset_version": data.source.version,
                "segmenter": type(pl_module.segmenter).__name__,
                "segmenter_fingerprint": pl_module.segmenter.fingerprint(),
                **pl_module.training_facts,
                "protocol": pl_module.test_scores[0].protocol,
                "test_sets": finite(means),
            }
            write_atomically(in_run(trainer, self.path), json.dumps(report, indent=2) + "\n")
            lines = [
                line for name, score in sets.items() for line in case_lines(name, score, cases[name], data)
            ]
            write_atomically(in_run(trainer, self.cases), as_csv(pl_module.test_scores[0].measures, lines))
            for name, mean in means.items():
                print(f"{name}: {summary(sets[name], mean)}")
                if trainer.logger is not None:
                    trainer.logger.log_metrics({f"{name}/{key}": value for key, value in mean.items()})
            print("\n".join(f"{key}: {text}" for key, text in report["protocol"].items()))


def summary(score: SegmentationScore, means: dict[str, float]) -> str:
    """Return the means of a test set in one line."""
    parts = [
        f"{LABELS[m]} {means[m]:.2f} {'%' if m in OVERLAPS else score.distance_unit}" for m in score.measures
    ]
    incomplete = means.get("n_incomplete")
    return ", ".join(
        [
            *parts,
            f"{means['n_cases']} cases",
            *([f"{incomplete} incomplete, not scored"] if incomplete else []),
        ]
    )


def case_lines(
    split: str, score: SegmentationScore, cases: list[dict[str, float]], data: Any
) -> list[list[str | float]]:
    """Return test set, case, class and the measures of each case and class of a test set.

    Args:
        split: name of the test set.
        score: what scored it.
        cases: the scores by case.
        data: the data module, which knows the names of the samples.
    """
    lines: list[list[str | float]] = []
    for case in cases:
        index = int(case["id"])
        name = score.case_name(index) or data.sample_name(split, index)
        for label in score.foreground:
            values = [case[f"{measure}/{label}"] for measure in score.measures]
            lines.append([split, name, label, *("" if math.isnan(value) else value for value in values)])
    return lines


def as_csv(measures: tuple[str, ...], lines: list[list[str | float]]) -> str:
    """Return lines of scores as CSV with a header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["test set", "case", "class", *measures], *lines])
    return text.getvalue()
