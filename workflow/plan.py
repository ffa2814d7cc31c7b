"""What an experiment makes, and what depends on what."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import InputError
from workflow.experiment import Settings

TAKES = {
    "autoencoder": "model.init_args.backbone.init_args.autoencoder",
    "pretrain": "model.init_args.weights",
}
"""The argument of a backbone that names what was trained before it."""

TRAINED = {"miner": "miner", "scorer": "scorer", "glance_scorer": "scorer"}
"""Stages that train a method's network, and the argument of the method that takes it."""

MEASURED_BY = ("fid_source", "fid_split", "gain_split", "mode_split", "inception")
"""Settings that a set's figures depend on."""

_ARM = re.compile(r"\{arms\}/([^\"{}]+)/weights")


class Plan:
    """The arms of an experiment.

    Args:
        settings: from :func:`workflow.experiment.resolved`.
        data: the fingerprint of the files that a stage reads, from its settings.

    Attributes:
        run: folder of all that is made.
        stages: settings of each stage.
        upstream: the stages that a stage's result depends on, beside its own settings.
        once: stages without a seed of the matrix, in the order in which they are trained.
        methods: settings of each method, complete.
        budgets: the budgets of all arms, by the name of their folder.
        subsets: the methods that take a part of another's set; ``made`` are all others.
        real_arms: variants of the training on real images alone, with their settings.

    Raises:
        InputError: the settings contradict each other.
    """

    def __init__(self, settings: Settings, data: Callable[[Settings], str] = lambda stage: "") -> None:
        self.settings = settings
        self.data = data
        self.name: str = settings["name"]
        self.run = f"{settings.get('runs', 'runs')}/{self.name}"
        self.stages: dict[str, Settings] = settings["stages"]
        self.seeds: list[int] = settings["seeds"]
        self.real_arms: dict[str, Settings] = {"real": {}} | (settings.get("real_arms") or {})
        backbone = [stage for stage in ("autoencoder", "pretrain", "backbone") if stage in self.stages]
        self.once = ("reference", *backbone)
        self.upstream: dict[str, list[str]] = {
            "reference": [],
            "autoencoder": [],  # of a latent model
            "pretrain": [stage for stage in backbone if stage == "autoencoder"],  # on smaller images, say
            "backbone": backbone[:-1],
            "segmenter": [],
            "plain": [*backbone, "segmenter"],
            "miner": [*backbone, "segmenter"],
            "scorer": [*backbone, "segmenter", "plain"],
            "glance_scorer": [*backbone, "segmenter"],
            "synthesis": [*backbone, "segmenter"],
        }
        self.methods = {
            name: self._complete(name, given or {}) for name, given in settings["methods"].items()
        }
        self.subsets = [name for name, method in self.methods.items() if method["subset"]]
        self.made = [name for name in self.methods if name not in self.subsets]
        self.budgets = {f"{budget:g}x": budget for m in self.methods.values() for budget in m["budgets"]}
        self._check()

    def _complete(self, name: str, given: Settings) -> Settings:
        """Return the settings of a method, with the file of its own name where it names none."""
        default, budgets = f"configs/methods/{name}.yaml", self.settings.get("budgets", [])
        if subset := given.get("subset"):
            default, budgets = "configs/methods/base.yaml", [max(budgets)]
            if {*subset} - {"control"} != {"of", "tau"}:
                raise InputError(
                    f"{self.name}: subset of method {name} needs of and tau, and may have control"
                )
            if len(given.get("budgets", budgets)) != 1:
                raise InputError(
                    f"{self.name}: method {name} is a subset, which is taken whole: give one budget"
                )
        if "configs" not in given and not Path(default).is_file():
            raise InputError(f"{self.name}: method {name} has no configs, and there is no {default}")
        stage = given.get("stage")
        if stage is not None and stage not in TRAINED:
            raise InputError(
                f"{self.name}: method {name} is trained by stage {stage}; choose {', '.join(TRAINED)}"
            )
        settings: Settings = {"configs": [default], "arguments": {}, "stage": None, "training": {}}
        settings |= {"network": name, "anchor": "real", "joined": [], "subset": None, "budgets": budgets}
        return settings | given

    def _check(self) -> None:
        """Raise unless all that the methods build on is there, and comes before them."""
        before: set[str] = set()
        for name, method in self.methods.items():
            before.add(name)
            if method["network"] != name and not self.methods.get(method["network"], {}).get("stage"):
                raise InputError(
                    f"{self.name}: method {name} takes the network of {method['network']}, which trains none"
                )
            if absent := sorted({*self.others(name)} - before):
                raise InputError(
                    f"{self.name}: method {name} builds on {', '.join(absent)}; list it before {name}"
                )
        if unknown := sorted({*self.stages} - {*self.upstream}):
            raise InputError(
                f"{self.name}: stages has {', '.join(unknown)}, which is none; choose among "
                f"{', '.join(self.upstream)}"
            )
        used = {"segmenter"}.union(*map(self.stages_of, self.methods))
        if absent := sorted(used - {*self.stages}):
            raise InputError(f"{self.name}: stages lacks {', '.join(absent)}")
        layers = {f"stages.{name}": stage for name, stage in self.stages.items()}
        layers |= {f"real_arms.{name}": arm for name, arm in self.real_arms.items()}
        for name, method in self.methods.items():
            layers |= {f"methods.{name}": method, f"methods.{name}.training": method["training"]}
        for name, layer in layers.items():
            for path in configs(layer):
                if not Path(path).is_file():
                    raise InputError(
                        f"{self.name}: {name} takes {path}, which does not exist; check its path"
                    )

    def needs(self, method: str) -> list[str]:
        """Return the arms and networks whose weights the arguments of a method name."""
        texts = json.dumps([self.methods[method]["arguments"], self.methods[method]["training"]])
        return list(dict.fromkeys(_ARM.findall(texts)))

    def others(self, method: str) -> list[str]:
        """Return the names of the methods that the settings of one build on."""
        settings = self.methods[method]
        arms = [arm.split("/")[0] for arm in (settings["anchor"], *self.needs(method))]
        named = [settings["subset"]["of"]] if settings["subset"] else []
        names = [name.removesuffix("_training") for name in [*arms, *settings["joined"], *named]]
        return [name for name in dict.fromkeys(names) if name not in (*self.real_arms, "plain")]

    def real_arms_of(self, method: str) -> list[str]:
        """Return the arms of real images, beside ``real``, whose segmenters a method works with."""
        named = [self.methods[method]["anchor"], *self.needs(method)]
        return [arm for arm in dict.fromkeys(named) if arm in self.real_arms and arm != "real"]

    def of_plain(self, method: str) -> bool:
        """Return whether a method's set is taken from the plain samples."""
        subset = self.methods[method]["subset"]
        return bool(subset) and subset["of"] == "plain"

    def stages_of(self, method: str) -> set[str]:
        """Return the stages that a method's set, its figures and its segmenter come from."""
        trained = self.trainer(method)
        own = {trained["stage"]} if trained else set()
        plain = {"plain"} if self.of_plain(method) or "scorer" in own else set()
        return {"reference", "backbone", "segmenter", "synthesis"} | own | plain

    def trainer(self, method: str) -> Settings | None:
        """Return the settings of the method that trains the network which a method uses; None without one."""
        settings = self.methods[self.methods[method]["network"]]
        return settings if settings["stage"] else None

    def training_layers(self, method: str) -> list[Any]:
        """Return all settings that a method's network depends on: those of what it builds on too."""
        settings = self.methods[method]
        facts = self._facts(method, "anchor")
        return [settings["stage"], settings["training"], *facts, *self._before(method)]

    def method_layers(self, method: str) -> list[Any]:
        """Return all settings that a method's synthetic set depends on."""
        settings, trained = self.methods[method], self.trainer(method)
        own = [settings, *([trained["stage"], trained["training"]] if trained else [])]
        own += ["plain"] if self.of_plain(method) else []
        return [*own, *self._facts(method, "anchor", "joined", "subset"), *self._before(method)]

    def _facts(self, method: str, *names: str) -> list[Settings]:
        """Return those of a method's settings, by name, that say what else it is made from."""
        given = {name: self.methods[method][name] for name in names}
        facts = {name: json.dumps(value) for name, value in given.items() if value not in ("real", [], None)}
        return [{"arguments": facts}] if facts else []

    def _before(self, method: str) -> list[Any]:
        """Return all settings of what a method builds on."""
        sets = [layer for other in self.others(method) for layer in self.method_layers(other)]
        return [*sets, *(self.real_arms[arm] for arm in self.real_arms_of(method))]

    def key(self, *layers: str | Settings) -> str:
        """Return the fingerprint of all settings and images that a network depends on.

        A checkpoint of others is no use.

        Args:
            layers: names of stages, and settings.
        """
        stages = {s for layer in layers if isinstance(layer, str) for s in [layer, *self.upstream[layer]]}
        settings = [layer for layer in layers if not isinstance(layer, str)]
        digest = hashlib.sha256()
        for stage in sorted(stages):
            digest.update(self.data(self.stages[stage]).encode())
        for layer in [*(self.stages[stage] for stage in sorted(stages)), *settings]:
            digest.update(arguments(layer).encode())
            for path in configs(layer):
                digest.update(Path(path).read_bytes())
        return digest.hexdigest()[:12]

    def share(self, base: Settings) -> None:
        """Link what is made alike to the run of the experiment that this one extends, where it is made once.

        Args:
            base: settings of that experiment, from :func:`workflow.experiment.read`.
        """
        folders = self._shared(base)
        for link in [path for pattern in ("*", "seed*/*") for path in Path(self.run).glob(pattern)]:
            if link.is_symlink() and str(link.relative_to(self.run)) not in folders:
                link.unlink()  # alike no more
        for folder in folders:
            link, target = (
                Path(self.run, folder),
                Path(self.settings.get("runs", "runs"), base["name"], folder),
            )
            target.mkdir(parents=True, exist_ok=True)
            (target / ".keep").touch()  # after a failure Snakemake removes empty folders, but links it cannot
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink() and link.resolve() != target.resolve():
                link.unlink()  # to what another experiment made, or to where the project once was
            if not link.exists():
                link.symlink_to(os.path.relpath(target, link.parent))

    def _shared(self, base: Settings) -> list[str]:
        """Return the folders that hold the same in the run of another experiment."""
        theirs = base["stages"]
        alike = {
            stage
            for stage in self.stages
            if all(self.stages.get(s) == theirs.get(s) is not None for s in [stage, *self.upstream[stage]])
        }
        folders = [stage for stage in self.once if stage in alike]
        known = {"real": {}} | (base.get("real_arms") or {}) if "segmenter" in alike else {}
        arms = [arm for arm, given in self.real_arms.items() if known.get(arm, "absent") == given]
        seeded = [*arms, *({"plain"} & alike)]
        measured_alike = all(self.settings.get(key) == base.get(key) for key in MEASURED_BY)
        shared: list[str] = []
        for name, method in self.methods.items():
            given = self.settings["methods"][name]
            if given != base["methods"].get(name, "absent") or not measured_alike:
                continue
            there = given.get("budgets", base.get("budgets", []))  # a set is as large as the largest
            same_size = max(method["budgets"]) == max(there) and {*method["budgets"]} <= {*there}
            parts = {*self.others(name), *self.real_arms_of(name), method["network"]} - {name}
            if self.stages_of(name) <= alike and same_size and parts <= {*shared, *arms}:
                shared.append(name)
                seeded += [name, *([f"{name}_training"] if method["stage"] else [])]
        folders += ["real"] if shared else []  # the images that their masks came from
        return folders + [f"seed{seed}/{folder}" for seed in self.seeds for folder in seeded]


def configs(*layers: Settings) -> list[str]:
    """Return the YAML files of settings, later ones over earlier ones."""
    return [path for layer in layers for path in layer.get("configs", [])]


def arguments(*layers: Settings, flags: str = "") -> str:
    """Return the command line of settings: the layered configs, the flags of the workflow, the overrides."""
    files = [f"--config {path}" for path in configs(*layers)]
    overrides = [
        f"--{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for layer in layers
        for key, value in layer.get("arguments", {}).items()
    ]
    return " ".join([*files, flags, *(f"'{override}'" for override in overrides)])
