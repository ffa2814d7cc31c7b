"""The source that configuration files name."""

from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from datamodules.sources.source import Source
from errors import InputError


def read_source(*configs: str | Path) -> Source:
    """Build the source that configuration files name under ``data.init_args.source``; later ones go over.

    Args:
        configs: files such as those of ``configs/data``, or the ``config.yaml`` that a fit run saved.

    Raises:
        InputError: a file is missing or no YAML, one names no source, or the source cannot be built.
    """
    settings: dict[str, Any] = {}
    for config in configs:
        try:
            given = yaml.safe_load(Path(config).read_text())
            settings = over(settings, given["data"]["init_args"]["source"])
        except FileNotFoundError:
            raise InputError(f"{config}: no such file; {_GIVE}") from None
        except yaml.YAMLError as error:
            raise InputError(f"{config}: is no YAML ({str(error).splitlines()[0]})") from None
        except (KeyError, TypeError):
            raise InputError(f"{config}: has no data.init_args.source; {_GIVE}") from None
    return build(settings, configs[-1])


def build(settings: dict[str, Any], where: str | Path) -> Source:
    """Build a source.

    Args:
        settings: its ``class_path`` and ``init_args``.
        where: what to name if that fails.

    Raises:
        InputError: it cannot be built.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    try:
        return parser.instantiate_classes(parser.parse_object({"source": settings})).source
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from error


_GIVE = "give a file such as those of configs/data, or the config.yaml that a fit run saved"


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a source over others as the command line takes them: argument by argument."""
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return above
    arguments = {**below.get("init_args", {}), **above.get("init_args", {})}
    return {**below, **above, "init_args": arguments}
