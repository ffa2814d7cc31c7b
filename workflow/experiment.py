"""Settings of an experiment: what it takes over from the one that it extends, and its data in every stage."""

from pathlib import Path
from typing import Any

import yaml

from errors import InputError


def read(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file as the workflow runs them.

    Raises:
        InputError: there is no such file, or one that it extends is absent.
    """
    return resolved(_load(path))


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings over those of the experiment that they extend, with ``data`` in every stage.

    Stages are taken over one by one, and their arguments too. A method without settings has those that it
    has there. Of the methods in ``embedding``, taken over, those remain that the extension has. ``data`` is a
    config file, of all stages or of one; it comes after the first file of a stage, so that later ones go
    over it.

    Raises:
        InputError: a file that is extended is absent.
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
    return settings | {"stages": stages}


def _merged(settings: dict[str, Any]) -> dict[str, Any]:
    if "extends" not in settings:
        return settings
    base = _merged(_load(settings["extends"]))
    given = settings.get("methods", base["methods"])
    methods = {name: base["methods"].get(name) if own is None else own for name, own in given.items()}
    taken = {key: [name for name in base[key] if name in methods] for key in ("embedding",) if key in base}
    stages = dict(base["stages"])
    for name, stage in settings.get("stages", {}).items():
        before = stages.get(name, {})
        stages[name] = before | stage
        stages[name]["arguments"] = before.get("arguments", {}) | stage.get("arguments", {})
    return base | taken | settings | {"stages": stages, "methods": methods}


def _load(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        raise InputError(f"{path}: does not exist, but an experiment is to extend it; check extends")
    loaded: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    return loaded
