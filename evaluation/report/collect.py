"""Read the folder of a run: settings, test scores, synthetic sets, training curves."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

from evaluation.report.inputs import read_features, read_mapping, read_scalars
from files import finite
from workflow.experiment import check_settings

REAL = "real"
"""Name of the arm that is trained on real images alone."""

NO_BACKBONE = "none"
"""What stands for the backbone where there is none."""

TEST_KEYS = ("dataset", "segmenter", "n_real", "n_synthetic", "protocol", "test_sets")
SET_KEYS = (
    *("method", "backbone", "seed", "n", "adversariality", "reward", "fid", "fid_extractor"),
    *("seconds_per_image", "kl"),
)
"""What ``synthetic.json`` must hold, beside the ``values`` of each sample, and ``report.json`` repeats."""

MORE_SET_KEYS = (
    *("kid", "precision", "recall", "diversity", "vendi", "mask_fidelity", "judge", "rewards", "modes"),
    *("calls_per_image", "noise", "precision_base_modes", "mask_fidelity_hardest"),
)
"""What it may hold; the last two are added by :func:`with_precision_like_base` and :func:`with_hardest`."""

GAIN_KEYS = (
    *("loss", "gamma", "n"),
    *(f"{part}.set.{key}" for part in ("all", "last") for key in ("norm_syn", "cosine", "gain")),
)
"""What ``gain.json`` must hold where there is one."""

MANY = 8
"""Beyond as many methods figures take the form that long comparisons need."""


def arm_name(method: str, budget: float) -> str:
    """Return what tables and figures call an arm."""
    return method if method == REAL or not budget else f"{method} {budget:g}×"


def arm_folder(method: str, budget: float) -> str:
    """Return the folder of an arm in that of its seed, as ``base/3x``."""
    return f"{method}/{budget:g}x" if budget else method


def own_budgets(method: dict[str, Any] | None, budgets: list[float]) -> list[float]:
    """Return the budgets at which a method is compared: those of the experiment, unless it names its own.

    A subset of another method's set is taken whole and stands at the largest.
    """
    settings = method or {}
    return settings.get("budgets", [max(budgets)] if "subset" in settings else budgets)


def with_hardest(one: dict[str, Any]) -> dict[str, Any]:
    """Return a set's figures with the mask fidelity of its hardest quarter, the ⌈N/4⌉ of largest ``values``.

    Whoever chooses hard samples gets those: where they no longer show their masks, hard is wrong.
    """
    fidelity = (one.get("samples") or {}).get("mask_fidelity")
    if not fidelity:
        return one
    hardest = np.argsort(np.negative(one["values"]), kind="stable")[: math.ceil(len(fidelity) / 4)]
    known = [fidelity[i] for i in hardest if fidelity[i] is not None]
    return one | {"mask_fidelity_hardest": float(np.mean(known))} if known else one


def with_precision_like_base(
    sets: Mapping[tuple[str, int], dict[str, Any]],
) -> dict[tuple[str, int], dict[str, Any]]:
    """Return sets with the precision that they would have with the appearances of their seed's base.

    Σ_m s_m p_m / Σ_m s_m over the modes that the set has, s_m the share of mode m in base's set and p_m the
    precision of the set's samples of that mode. Rare appearances lie in sparse regions, where precision is
    lower for real images as well: this tells being less native from being more varied.
    """

    def added(one: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
        within = {m: p for m, p in ((one.get("modes") or {}).get("precision") or {}).items() if p is not None}
        shares = {mode: (base.get("modes") or {}).get("histogram", {}).get(mode, 0) for mode in within}
        total = sum(shares.values())
        return {"precision_base_modes": sum(shares[m] * within[m] for m in within) / total} if total else {}

    return {(m, s): one | added(one, sets.get(("base", s), {})) for (m, s), one in sets.items()}


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
        return f"seed{self.seed}/{arm_folder(self.method, self.budget)}"


@dataclass(frozen=True)
class Row:
    """Scores of one arm on one test set; ``dsc`` in percent, None where undefined.

    Attributes:
        scores: all of them by the names of ``test.json``: other measures, and those of single classes
            (``dsc/liver``); {} in reports that were written without them.
    """

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
    scores: dict[str, float | None] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes."""
        return [key.removeprefix("dsc/") for key in self.scores if key.startswith("dsc/")]


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
        gains: every ``gain.json`` that there is, likewise.
    """

    folder: Path
    experiment: dict[str, Any]
    tests: list[tuple[Arm, dict[str, Any]]]
    sets: dict[tuple[str, int], dict[str, Any]]
    gains: dict[tuple[str, int], dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run.

        Raises:
            InputError: a file of the run is missing, cannot be read, or lacks a key.
        """
        name = "experiment.yaml"
        experiment = read_mapping(folder, name, yaml.safe_load, ("name", "segmenter"))
        check_settings(experiment, folder / name)
        methods, budgets, seeds = (
            list(experiment["methods"]),
            experiment.get("budgets", []),
            experiment["seeds"],
        )
        arms = [
            arm
            for seed in seeds
            for arm in (
                *(Arm(name, 0, seed) for name in (REAL, *(experiment.get("real_arms") or ()))),
                *(Arm(m, b, seed) for m in methods for b in own_budgets(experiment["methods"][m], budgets)),
            )
        ]
        made = {(m, s): f"seed{s}/{m}" for s in seeds for m in methods}
        return cls(
            folder,
            experiment,
            [(arm, read_mapping(folder, f"{arm.folder}/test.json", json.loads, TEST_KEYS)) for arm in arms],
            with_precision_like_base(
                {
                    (m, s): with_hardest(
                        read_mapping(folder, f"{place}/synthetic.json", json.loads, (*SET_KEYS, "values"))
                        | {"method": m}
                    )
                    for (m, s), place in made.items()
                }
            ),
            {
                key: read_mapping(folder, f"{place}/gain.json", json.loads, GAIN_KEYS)
                for key, place in made.items()
                if (folder / place / "gain.json").is_file()
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
        """The method that the page puts first: the ``highlight``, the miner, or else the last one.

        Without any method there is none.
        """
        if self.experiment.get("highlight"):
            return self.experiment["highlight"]
        return "miner" if "miner" in self.methods else self.methods[-1]

    def budgets_of(self, method: str) -> list[float]:
        """Return the budgets at which a method is compared."""
        return own_budgets(self.experiment["methods"][method], self.experiment["budgets"])

    @property
    def many(self) -> bool:
        """Whether there are more than :data:`MANY` methods."""
        return len(self.methods) > MANY

    @property
    def sweeps(self) -> dict[str, list[tuple[float, str]]]:
        """Methods that differ in one number, with that number, in its order; by the name of the number."""
        sweeps = self.experiment.get("sweeps") or {}
        return {label: sorted((float(x), m) for x, m in one.items()) for label, one in sweeps.items()}

    @property
    def protocol(self) -> dict[str, str]:
        """How the scores count."""
        return self.tests[0][1]["protocol"]

    @property
    def asd_unit(self) -> str:
        """Unit of ASD; a protocol need not measure it."""
        return self.protocol.get("asd unit", "not measured")

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes."""
        return list(dict.fromkeys(name for row in self.rows for name in row.classes))

    @property
    def rows(self) -> list[Row]:
        """A row per arm, seed and test set; the test sets one after the other."""
        test_sets = dict.fromkeys(name for _, test in self.tests for name in test["test_sets"])
        return [
            Row(
                dataset=test["dataset"],
                test_set=name,
                backbone=self.experiment["backbone"] if arm.budget else NO_BACKBONE,
                segmenter=test["segmenter"],
                method=arm.method,
                budget=arm.budget,
                seed=arm.seed,
                dsc=finite(test["test_sets"][name]["dsc"]),
                asd=finite(test["test_sets"][name].get("asd")),
                n_real=test["n_real"],
                n_synthetic=test["n_synthetic"],
                scores=finite(test["test_sets"][name]),
            )
            for name in test_sets
            for arm, test in self.tests
            if name in test["test_sets"]
        ]

    def cap(self) -> float | None:
        """Return the cap κ that the miner was trained with; None where the sets have other units."""
        name = f"seed{self.experiment['seeds'][0]}/{self.mined}_training/tensorboard/config.yaml"
        if not (self.folder / name).is_file():
            return None
        trained = read_mapping(self.folder, name, yaml.safe_load, ("model",))["model"]["init_args"]
        same = {one["reward"] for one in self.sets.values()} == {trained.get("reward")}
        if trained.get("reference") or trained.get("scorer") or not same:
            return None
        return trained.get("kappa_up")

    def features(self, method: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return features of real (R, D) and of synthetic (N, D) images of the first seed, if saved.

        Raises:
            InputError: the file is unusable.
        """
        name = f"seed{self.experiment['seeds'][0]}/{method}/features.npz"
        return read_features(self.folder, name) if (self.folder / name).is_file() else None

    def curves(self) -> list[Curve]:
        """Return every scalar that the trainings logged; with :attr:`many` methods, of the first seed."""
        seeds = self.experiment["seeds"][:1] if self.many else self.experiment["seeds"]
        places: list[tuple[str, str, str, int | None]] = [
            ("Backbone", "backbone", "backbone", None),
            ("Reference segmenter", "reference", "reference", None),
        ]
        places += [(f"Network of {m}", f"seed{s}/{m}_training", m, s) for m in self.methods for s in seeds]
        for arm, _ in self.tests:
            if arm.seed in seeds:
                budgets = [arm.budget] if arm.budget else self.experiment.get("budgets", [])
                stages = [f"Segmenter, budget {b:g}×" for b in budgets] or ["Segmenter"]
                places += [(stage, arm.folder, arm.method, arm.seed) for stage in stages]
        return [
            Curve(stage, tag, arm, seed, steps, values)
            for stage, folder, arm, seed in places
            for tag, steps, values in read_scalars(self.folder / folder / "tensorboard")
        ]
