"""Which images an experiment reads: what is made from others is made again."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from errors import InputError
from workflow.experiment import Settings, over

SOURCE = "data.init_args.source"
"""Where the settings of a stage have the source of its images."""

GENERATED = "PhantomSource"
"""The source that reads no file."""

MEASURED_ON = {"fid_split": "test", "gain_split": None, "mode_split": None}
"""Settings of an experiment that name a split, and what they are by default."""


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
    return _files(stage)[0]


def check_splits(settings: Settings) -> None:
    """Check that the images on disk have the splits which an experiment names; generated ones need no check.

    Args:
        settings: of the experiment, complete.

    Raises:
        InputError: they lack one, or cannot be read.
    """
    real = "backbone" if settings.get("fid_source") == "backbone" else "segmenter"
    for key, default in MEASURED_ON.items() if settings["methods"] else ():
        split = settings.get(key, default)
        stage = "segmenter" if key == "gain_split" else real
        _, splits = _files(settings["stages"].get(stage, {}))
        if splits and split and split not in splits:
            raise InputError(
                f"{settings.get('name')}: {key} is {split}, but the images of stage {stage} have the splits "
                f"{', '.join(splits)}; choose one of them"
            )


def _files(stage: Settings) -> tuple[str, list[str]]:
    """Return the fingerprint of a stage's images, and their splits; nothing where they are not read."""
    found = [_source(yaml.safe_load(Path(path).read_text())) for path in stage.get("configs", [])]
    for key, value in stage.get("arguments", {}).items():
        if key.startswith(f"{SOURCE}."):
            for name in reversed(key.removeprefix(f"{SOURCE}.").split(".")):
                value = {name: value}
            found.append(value)
    kinds = [part["class_path"] for part in found if "class_path" in part]
    return _read(json.dumps(found)) if kinds and kinds[-1] != GENERATED else ("", [])


def _source(given: Any) -> Settings:
    for key in SOURCE.split("."):
        given = (given or {}).get(key)
    return given or {}


@cache
def _read(parts: str) -> tuple[str, list[str]]:
    from datamodules.sources import configured  # takes seconds, and phantoms need none of it

    settings: Settings = {}
    for part in json.loads(parts):
        settings = configured.over(settings, part) if "class_path" in part else over(settings, part)
    settings["init_args"].pop("n_train", None)
    digest = hashlib.sha256()
    source = configured.build(settings, SOURCE)
    for split, files in source.files().items():
        for file in files:
            digest.update(f"{split} {file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:12], list(source.splits)
