"""From the values that a file has for its structures to classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from errors import InputError


@dataclass(frozen=True)
class LabelMap:
    """Class of every value that a label file may hold; any other value is an error.

    Attributes:
        name: of the convention, for messages.
        classes: pairs of a value on file and its class; several values may share a class.
        hints: pairs of a value that is known to be wrong and what to do about it.
    """

    name: str
    classes: tuple[tuple[int, int], ...]
    hints: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of_names(
        cls,
        name: str,
        values: Mapping[int, str],
        class_names: Sequence[str],
        hints: Mapping[int, str] | None = None,
    ) -> "LabelMap":
        """Build a map from the name of each value; values with names that are no class are background."""
        order = {each: k for k, each in enumerate(class_names)}
        classes = tuple(sorted((value, order.get(each, 0)) for value, each in values.items()))
        return cls(name, classes, tuple(sorted((hints or {}).items())))

    def apply(self, label: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
        """Return the classes of a label of any shape.

        Raises:
            InputError: the file has a value that the map does not know.
        """
        known = sorted(value for value, _ in self.classes)
        classes, unknown = lookup(label, dict(self.classes))
        if unknown.size:
            shown = ", ".join(map(str, unknown[:8])) + (", …" if unknown.size > 8 else "")
            hint = dict(self.hints).get(int(unknown[0]), "correct the mask or name another label map")
            values = ", ".join(map(str, known[:12])) + (", …" if len(known) > 12 else "")
            raise InputError(f"{path} has the label {shown}; those of {self.name} are {values}: {hint}")
        return classes


def identity(name: str, count: int) -> LabelMap:
    """Return the map of files whose values are the classes 0 … ``count`` − 1."""
    return LabelMap(name, tuple((k, k) for k in range(count)))


def lookup(
    label: NDArray[np.int64], classes: Mapping[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the class of every value, of those that are known, and the values that are not."""
    known = np.array(sorted(classes))
    position = np.minimum(np.searchsorted(known, label), len(known) - 1)
    unknown = np.unique(label[known[position] != label])
    return np.array([classes[value] for value in known.tolist()], np.uint8)[position], unknown
