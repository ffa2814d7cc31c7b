"""Read the folder of a run: settings, test scores, synthetic sets, training curves."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from errors import InputError

REAL = "real"
"""Name of the arm that is trained on real images alone."""

TEST_KEYS = ("dataset", "segmenter", "n_real", "n_synthetic", "protocol", "test_sets")
SET_KEYS = (
    *("method", "backbone", "seed", "n", "adversariality", "reward", "fid", "fid_extractor"),
    *("seconds_per_image", "kl"),
)
"""What ``synthetic.json`` must hold, beside the ``values`` of each sample, and ``report.json`` repeats."""

MORE_SET_KEYS = (
    *("kid", "precision", "recall", "diversity", "vendi", "mask_fidelity", "judge", "rewards", "modes"),
    "calls_per_image",
)
"""What it may hold beside."""

CURVE_POINTS = 150
"""Most points drawn of a training curve, spread evenly over it; first and last always."""


def arm_name(method: str, budget: float) -> str:
    """Return what tables and figures call an arm."""
    return method if method == REAL or not budget else f"{method} {budget:g}×"


@dataclass(frozen=True)
class Arm:
    """One training of the segmenter: on real images, plus ``budget``·N synthetic ones of a method.

    Budget 0 is on real images alone; the method then says how.
    """

    method: str
    budget: float
    seed: int

    @property
    def folder(self) -> str:
        """Folder of the arm inside the run."""
        leaf = f"{self.method}/{self.budget:g}x" if self.budget else self.method
        return f"seed{self.seed}/{leaf}"


@dataclass(frozen=True)
class Row:
    """Scores of one arm on one test set; ``dsc`` in percent, None where undefined."""

    dataset: str
    test_set: str
    backbone: str
    segmenter: str
    method: str
    budget: float
    seed: int
    dsc: float | None
    asd: float | None
    n_real: int
    n_synthetic: int


@dataclass(frozen=True)
class Curve:
    """One scalar of one training; ``seed`` is None where the stage has no seed of its own."""

    stage: str
    tag: str
    arm: str
    seed: int | None
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """What lies in the folder of a run.

    Attributes:
        folder: the folder.
        experiment: settings of the experiment, ``experiment.yaml``.
        tests: every arm with its ``test.json``, seed by seed, real first.
        sets: every ``synthetic.json`` by method and seed, seed by seed.
    """

    folder: Path
    experiment: dict[str, Any]
    tests: list[tuple[Arm, dict[str, Any]]]
    sets: dict[tuple[str, int], dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run.

        Raises:
            InputError: a file of the run is missing, cannot be read, or lacks a key.
        """
        experiment = _read(folder, "experiment.yaml", yaml.safe_load, ("name", "backbone", "segmenter"))
        for key, kind in (("budgets", int | float), ("seeds", int)):
            values = experiment.get(key)
            if not isinstance(values, list) or not values or not all(isinstance(v, kind) for v in values):
                raise InputError(f"{folder / 'experiment.yaml'}: {key} must be a list; write {key}: [...]")
        if experiment.get("highlight") not in (None, *(experiment.get("methods") or ())):
            raise InputError(f"{folder / 'experiment.yaml'}: highlight must be one of the methods")
        if not isinstance(experiment.get("methods"), dict) or not experiment["methods"]:
            raise InputError(f"{folder / 'experiment.yaml'}: methods must name at least one; write methods:")
        methods, budgets, seeds = list(experiment["methods"]), experiment["budgets"], experiment["seeds"]
        arms = [
            arm
            for seed in seeds
            for arm in (
                *(Arm(name, 0, seed) for name in (REAL, *(experiment.get("real_arms") or ()))),
                *(Arm(m, b, seed) for m in methods for b in budgets),
            )
        ]
        return cls(
            folder,
            experiment,
            [(arm, _read(folder, f"{arm.folder}/test.json", json.loads, TEST_KEYS)) for arm in arms],
            {
                (m, s): _read(folder, f"seed{s}/{m}/synthetic.json", json.loads, (*SET_KEYS, "values"))
                | {"method": m}
                for s in seeds
                for m in methods
            },
        )

    @property
    def methods(self) -> list[str]:
        """Names of the methods that made a synthetic set."""
        return list(self.experiment["methods"])

    @property
    def arms(self) -> list[str]:
        """Names of all that is compared with ``real``: its variants, then the methods."""
        return [*(self.experiment.get("real_arms") or ()), *self.methods]

    @property
    def mined(self) -> str:
        """The method that the page puts first: the ``highlight``, the miner, or else the last one."""
        if "highlight" in self.experiment:
            return self.experiment["highlight"]
        return "miner" if "miner" in self.methods else self.methods[-1]

    @property
    def protocol(self) -> dict[str, str]:
        """How the scores count."""
        return self.tests[0][1]["protocol"]

    @property
    def asd_unit(self) -> str:
        """Unit of ASD."""
        return self.protocol["asd unit"]

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes."""
        keys = (key for _, test in self.tests for scores in test["test_sets"].values() for key in scores)
        return list(dict.fromkeys(k.removeprefix("dsc/") for k in keys if k.startswith("dsc/")))

    @property
    def rows(self) -> list[Row]:
        """A row per arm, seed and test set; the test sets one after the other."""
        test_sets = dict.fromkeys(name for _, test in self.tests for name in test["test_sets"])
        return [
            Row(
                dataset=test["dataset"],
                test_set=name,
                backbone=self.experiment["backbone"] if arm.budget else "none",
                segmenter=test["segmenter"],
                method=arm.method,
                budget=arm.budget,
                seed=arm.seed,
                dsc=finite(test["test_sets"][name]["dsc"]),
                asd=finite(test["test_sets"][name]["asd"]),
                n_real=test["n_real"],
                n_synthetic=test["n_synthetic"],
            )
            for name in test_sets
            for arm, test in self.tests
            if name in test["test_sets"]
        ]

    def cap(self) -> float | None:
        """Return the cap κ of the reward that the miner was trained with; None without a miner."""
        name = f"seed{self.experiment['seeds'][0]}/{self.mined}_training/tensorboard/config.yaml"
        if not (self.folder / name).is_file():
            return None
        return _read(self.folder, name, yaml.safe_load, ("model",))["model"]["init_args"].get("kappa_up")

    def curves(self) -> list[Curve]:
        """Return every scalar that the trainings logged."""
        places: list[tuple[str, str, str, int | None]] = [
            ("Backbone", "backbone", "backbone", None),
            ("Reference segmenter", "reference", "reference", None),
        ]
        places += [
            (f"Network of {m}", f"seed{s}/{m}_training", m, s)
            for m in self.methods
            for s in self.experiment["seeds"]
        ]
        for arm, _ in self.tests:
            budgets = [arm.budget] if arm.budget else self.experiment["budgets"]
            places += [(f"Segmenter, budget {b:g}×", arm.folder, arm.method, arm.seed) for b in budgets]
        return [
            Curve(stage, tag, arm, seed, steps, values)
            for stage, folder, arm, seed in places
            for tag, steps, values in _scalars(self.folder / folder / "tensorboard")
        ]


def finite(value: Any) -> Any:
    """Return None for a NaN or infinite number, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` items, spread evenly, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def _read(folder: Path, name: str, parse: Callable[[str], Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return the mapping in a file of the run, which must have the keys."""
    path = folder / name
    command = f"make experiment NAME={folder.resolve().name}"
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; make it with: {command}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({problem}); delete it and run: {command}") from None
    missing = [k for k in keys if not isinstance(content, dict) or k not in content]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}; delete it and run: {command}")
    return content


def _scalars(logs: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return tag, steps and values of every scalar in a folder of TensorBoard files."""
    if not logs.is_dir():
        return []
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    series = []
    for tag in events.Tags()["scalars"]:
        if tag not in ("epoch", "hp_metric"):
            points = evenly(events.Scalars(tag), CURVE_POINTS)
            series.append((tag, np.array([p.step for p in points]), np.array([p.value for p in points])))
    return series
