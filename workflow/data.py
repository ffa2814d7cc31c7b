"""Which images an experiment reads: what is made from others is made again."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from workflow.experiment import Settings, over

SOURCE = "data.init_args.source"
"""Where the settings of a stage have the source of its images."""

GENERATED = "PhantomSource"
"""The source that reads no file."""


def fingerprint(stage: Settings) -> str:
    """Return the fingerprint of all files of a stage's source: their names and sizes, split by split.

    Args:
        stage: its ``configs`` and ``arguments``.

    Returns:
        12 hexadecimal digits; nothing where images are generated, or come from another stage. It is the same
        wherever the files lie, and however many of those for training are used.

    Raises:
        InputError: the source cannot be read.
    """
    found = [_source(yaml.safe_load(Path(path).read_text())) for path in stage.get("configs", [])]
    for key, value in stage.get("arguments", {}).items():
        if key.startswith(f"{SOURCE}."):
            for name in reversed(key.removeprefix(f"{SOURCE}.").split(".")):
                value = {name: value}
            found.append(value)
    kinds = [part["class_path"] for part in found if "class_path" in part]
    return _read(json.dumps(found)) if kinds and kinds[-1] != GENERATED else ""


def _source(given: Any) -> Settings:
    for key in SOURCE.split("."):
        given = (given or {}).get(key)
    return given or {}


@cache
def _read(parts: str) -> str:
    from datamodules.sources import configured  # takes seconds, and phantoms need none of it

    settings: Settings = {}
    for part in json.loads(parts):
        settings = configured.over(settings, part) if "class_path" in part else over(settings, part)
    settings["init_args"].pop("n_train", None)
    digest = hashlib.sha256()
    for split, files in configured.build(settings, SOURCE).files().items():
        for file in files:
            digest.update(f"{split} {file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:12]
