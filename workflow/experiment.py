"""Settings of an experiment, and what it takes over from the experiment that it extends."""

from pathlib import Path
from typing import Any

import yaml

from errors import InputError


def read(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file, with what they extend.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: an experiment extends this file, which does not exist")
    return extended(yaml.safe_load(Path(path).read_text()))


def extended(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings over those of the experiment that they extend, if any.

    ``stages`` is taken over stage by stage. A method without settings has those that it has there. Of
    the methods in ``embedding``, taken over, those remain that the extension has.
    """
    if "extends" not in settings:
        return settings
    base = read(settings["extends"])
    given = settings.get("methods", base["methods"])
    methods = {name: base["methods"].get(name) if own is None else own for name, own in given.items()}
    taken = {key: [name for name in base[key] if name in methods] for key in ("embedding",) if key in base}
    stages = base["stages"] | settings.get("stages", {})
    return base | taken | settings | {"stages": stages, "methods": methods}
