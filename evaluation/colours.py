"""Colours of classes, wherever class maps are shown."""

import numpy as np
from numpy.typing import NDArray

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")
"""Those of classes 1, 2, …, then from the start again (Okabe & Ito, to be told apart by everybody)."""

BACKGROUND = "#000000"


def palette(classes: int) -> NDArray[np.uint8]:
    """Return the colour of each class, uint8 ``(classes, 3)``; class 0 is black."""
    colours = [BACKGROUND, *(CLASS_COLOURS[k % len(CLASS_COLOURS)] for k in range(classes - 1))]
    return np.array([list(bytes.fromhex(colour[1:])) for colour in colours], np.uint8)
