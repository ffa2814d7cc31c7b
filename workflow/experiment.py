"""Settings of an experiment: what it takes over from another one, and what its names stand for."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from errors import InputError

Settings = dict[str, Any]

METHODS = Path(__file__).with_name("methods.yaml")
"""What methods are where an experiment says no more than their names."""

SETTINGS = (
    {"name", "extends", "runs", "dataset", "backbone", "segmenter", "data", "stages", "side_by_side"}
    | {"methods", "real_arms", "budgets", "seeds", "highlight", "embedding", "sweeps"}
    | {"fid_source", "fid_split", "gain_split", "mode_split", "inception"}
)
"""What an experiment may set."""

_LAYER = {"configs", "arguments"}
PARTS = {
    "stages": _LAYER | {"data"},
    "real_arms": _LAYER,
    "methods": _LAYER | {"like", "stage", "training", "network", "anchor", "joined", "subset", "budgets"},
}
"""What each entry of these mappings of an experiment may set."""

PLAIN = "data.init_args.budget"
"""The argument of the stage ``plain`` that says how large the plain set is."""


def read(path: str | Path) -> Settings:
    """Return the settings in a file as the workflow runs them.

    Raises:
        InputError: see :func:`resolved`.
    """
    return resolved(_load(path))


def resolved(settings: Settings) -> Settings:
    """Return settings over those of the experiment that they extend, with nothing left to look up.

    Stages and methods are taken over one by one, and their settings too; null takes an argument of a stage
    back. A method that is new goes over what ``methods.yaml`` has under its name, or over the method that it
    names by ``like``. Of the methods in ``embedding``, ``highlight`` and ``sweeps``, taken over, those remain
    that the extension has. ``data`` is a config file, of all stages or of one; it comes after the first file
    of a stage, so that later ones go over it.

    ``{NAME}`` in an argument of a method is the folder of the segmenter that the arm NAME trains at its
    largest budget, ``{NAME_training}`` that of the network which the method NAME brings along.

    Raises:
        InputError: a file that is extended is absent, a setting is unknown, or names what there is not.
    """
    settings = _merged(settings)
    stages = {}
    for name, stage in settings["stages"].items():
        files, arguments = stage.get("configs", []), stage.get("arguments", {})
        data = stage.get("data", settings.get("data"))
        stages[name] = {
            "configs": [*files[:1], *([data] if data else []), *files[1:]],
            "arguments": arguments,
        }
    return settings | {"stages": stages, "methods": _filled(settings | {"stages": stages})}


def check_settings(experiment: Settings, where: str | Path) -> None:
    """Check the settings of an experiment that the report goes by.

    Args:
        experiment: the settings.
        where: the file they are in, or the name of the experiment.

    Raises:
        InputError: a setting is missing, of the wrong type, or names an unknown method.
    """
    methods = experiment.get("methods")
    if not isinstance(methods, dict):
        raise InputError(f"{where}: methods must be a mapping; write methods: {{}} for real images alone")
    for key, kind, needed in (("budgets", int | float, bool(methods)), ("seeds", int, True)):
        values = experiment.get(key, [])
        if (
            not isinstance(values, list)
            or not all(isinstance(v, kind) for v in values)
            or needed > len(values)
        ):
            raise InputError(f"{where}: {key} must be a list; write {key}: [...]")
    seeds = experiment.get("seeds", [])
    if len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise InputError(f"{where}: seeds {seeds}: each must be another one, and none negative")
    if any(budget <= 0 for budget in experiment.get("budgets", [])):
        raise InputError(f"{where}: budgets {experiment['budgets']}: must be positive, such as [1, 3]")
    if experiment.get("fid_source") not in (None, "backbone"):
        raise InputError(
            f"{where}: fid_source {experiment['fid_source']}: may be backbone, whose data the distances are "
            "taken to; leave it out for the segmenter's"
        )
    if methods and "backbone" not in experiment:
        raise InputError(f"{where} has no backbone; name the one that the methods use")
    if experiment.get("highlight") not in (None, *methods):
        raise InputError(f"{where}: highlight must be one of the methods")
    shown = experiment.get("embedding") or []
    if not isinstance(shown, list) or not all(m in methods for m in shown):
        raise InputError(f"{where}: embedding must be a list of methods; write embedding: [...]")
    sweeps = experiment.get("sweeps") or {}
    if not isinstance(sweeps, dict) or not all(_is_sweep(sweep, methods) for sweep in sweeps.values()):
        raise InputError(
            f"{where}: sweeps must map numbers to methods, by axis; write sweeps: {{axis: {{1: method}}}}"
        )


def numbers(values: Any) -> Any:
    """Return seeds with those as numbers that ``--config seeds=[0]`` gives as strings."""
    if not isinstance(values, list):
        return values
    return [int(each) if isinstance(each, str) and each.isdecimal() else each for each in values]


def over(base: Settings, own: Settings) -> Settings:
    """Return settings over others, mapping by mapping; lists and values are replaced."""
    merged = dict(base)
    for key, value in own.items():
        before = base.get(key)
        merged[key] = over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _check_names(settings: Settings) -> None:
    """Raise on a setting that nothing reads, a misspelt one most likely."""
    where = settings.get("name", "experiment")
    _refuse_unknown(settings, SETTINGS, f"{where}:")
    for part, known in PARTS.items():
        entries = settings.get(part) or {}
        if not isinstance(entries, dict):
            raise InputError(f"{where}: {part} must be a mapping; write {part}: {{name: {{…}}}}")
        for name, entry in entries.items():
            if not isinstance(entry or {}, dict):
                raise InputError(f"{where}: {part}.{name} must be a mapping of its settings")
            _refuse_unknown(entry or {}, known, f"{where}: {part}.{name}")


def _refuse_unknown(given: Settings, known: set[str], where: str) -> None:
    if unknown := sorted({*map(str, given)} - known):
        raise InputError(
            f"{where} has unknown settings {', '.join(unknown)}; choose among {', '.join(sorted(known))}"
        )


def _merged(settings: Settings) -> Settings:
    _check_names(settings)
    base: Settings = _merged(_load(settings["extends"])) if "extends" in settings else {}
    shipped = yaml.safe_load(METHODS.read_text())
    there = base.get("methods", {})
    methods: Settings = {}
    for name, own in (settings.get("methods") or there).items():
        methods[name] = _method(settings, name, own or {}, shipped | there | methods)
    taken = {
        key: _remaining(base[key], methods) for key in ("embedding", "highlight", "sweeps") if base.get(key)
    }
    stages = dict(base.get("stages", {}))
    for name, given in (settings.get("stages") or {}).items():
        before, stage = stages.get(name, {}), given or {}
        stages[name] = before | stage
        arguments = before.get("arguments", {}) | (stage.get("arguments") or {})
        stages[name]["arguments"] = {key: value for key, value in arguments.items() if value is not None}
    return base | taken | settings | {"stages": stages, "methods": methods}


def _remaining(named: Any, methods: Settings) -> Any:
    """Return what is left of methods that are named, singly, in a list or by numbers, where some are gone."""
    if isinstance(named, dict):
        return {key: found for key, inner in named.items() if (found := _remaining(inner, methods))}
    if isinstance(named, list):
        return [name for name in named if name in methods]
    return named if named in methods else None


def _method(settings: Settings, name: str, own: Settings, there: Settings) -> Settings:
    """Return the settings of a method, given those of the methods that are there already."""
    like = own.get("like", name)
    start = there.get(like)
    if start is None and like != name and not Path(f"configs/methods/{like}.yaml").is_file():
        raise InputError(
            f"{settings.get('name')}: method {name} is to be like {like}, which is neither listed before "
            f"it, nor in {METHODS.name}, nor a file in configs/methods"
        )
    start = dict(start or {})
    if like != name and not {"configs", "subset"} & {*start}:
        start["configs"] = [f"configs/methods/{like}.yaml"]
    return over(start, {key: value for key, value in own.items() if key != "like"})


def _filled(settings: Settings) -> Settings:
    """Return the methods with the budgets of plain subsets, and the arms that arguments name."""
    methods = settings["methods"]
    for name, method in methods.items():
        if (method.get("subset") or {}).get("of") == "plain" and "budgets" not in method:
            plain = settings["stages"].get("plain", {}).get("arguments", {})
            if PLAIN not in plain:
                raise InputError(
                    f"{settings.get('name')}: method {name} is taken from the plain set: give stages.plain "
                    f"the argument {PLAIN}, its size as a multiple of the real data"
                )
            methods = methods | {name: method | {"budgets": [plain[PLAIN]]}}

    def folder(match: re.Match[str]) -> str:
        arm = match[1]
        if arm in methods:
            budget = max(methods[arm].get("budgets", settings.get("budgets", [])))
            return f"{{arms}}/{arm}/{budget:g}x/weights"
        if arm.endswith("_training") and arm.removesuffix("_training") in methods:
            return f"{{arms}}/{arm}/weights"
        if arm in ("arms", "network"):
            return match[0]
        raise InputError(
            f"{settings.get('name')}: an argument names {{{arm}}}, but there is no method {arm}; list it "
            "among the methods"
        )

    def fill(part: Settings) -> Settings:
        filled: Settings = json.loads(re.sub(r"\{([A-Za-z]\w*)\}", folder, json.dumps(part)))
        return filled

    return {
        name: method | {key: fill(method[key]) for key in ("arguments", "training") if key in method}
        for name, method in methods.items()
    }


def _is_sweep(sweep: Any, methods: dict[str, Any]) -> bool:
    try:
        return all(math.isfinite(float(x)) and method in methods for x, method in sweep.items())
    except (AttributeError, TypeError, ValueError):
        return False


def _load(path: str | Path) -> Settings:
    if not Path(path).is_file():
        raise InputError(f"{path}: does not exist, but an experiment is to extend it; check extends")
    loaded: Settings = yaml.safe_load(Path(path).read_text())
    return loaded
