"""What folders and text files list, for readers and for their messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from errors import InputError

SHOWN = 8


def shown(folder: Path) -> str:
    """Return the first names in a folder."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return f"{', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}" if names else "nothing"


def similar(name: str, others: Iterable[str]) -> str:
    """Return the end of a message that asks whether another name is meant; nothing where none is near."""
    near = get_close_matches(name, sorted(others), 1)
    return f"; is {near[0]} it?" if near else ""


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the list, or split otherwise") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a text file: {error}") from error
    return [line.strip() for line in lines if line.strip()]
