"""Names beside the points of a plot, where they cover least."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

SIZE = 7
"""Of the font, in points; a character is about 0.54 as wide and a line 1.2 as high."""

CROWD = 16
"""Beyond as many points, panels with names have the whole width of the page."""

DISTANCES = (5.0, 13.0, 22.0, 32.0)
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Where a name is tried, the best first: how far from its point, in points, and right or left, up or down."""


class Box(NamedTuple):
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: "Box") -> float:
        """Return the area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


def label_points(ax: Axes, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Write the name of each point beside it, away from all points and from the other names.

    The axes must have got their limits and their place in the figure before.

    Args:
        ax: where the points are drawn.
        names: of the points.
        x: where they are, in units of the data.
        y: likewise.
    """
    scale = 72 / ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    frame = Box(*(float(edge) * scale for edge in ax.get_window_extent().extents))
    centres = [(px * scale, py * scale) for px, py in ax.transData.transform(list(zip(x, y, strict=True)))]
    taken = [Box(px - 3, py - 3, px + 3, py + 3) for px, py in centres]
    for name, (px, py), place in zip(names, centres, zip(x, y, strict=True), strict=True):
        tried = [
            (_cost(box, taken, frame) + distance / 4, distance, (dx, dy), box)
            for distance in DISTANCES
            for dx, dy, box in (_box(name, px, py, distance, *way) for way in DIRECTIONS)
        ]
        _, distance, offset, box = min(tried, key=lambda one: one[0])
        taken.append(box)
        ax.annotate(
            name,
            place,
            offset,
            textcoords="offset points",
            fontsize=SIZE,
            ha="left",
            va="bottom",
            arrowprops=None
            if distance == DISTANCES[0]
            else {"arrowstyle": "-", "color": "#9aa5ad", "lw": 0.5, "shrinkA": 0, "shrinkB": 2},
        ).set_in_layout(False)


def _box(name: str, px: float, py: float, distance: float, across: int, up: int) -> tuple[float, float, Box]:
    """Return a name's lower left corner relative to its point, and its box, all in points."""
    width, height = 0.54 * SIZE * len(name) + 3, 1.2 * SIZE
    step = distance * (0.7 if across and up else 1)
    dx, dy = step * across + width * (across - 1) / 2, step * up + height * (up - 1) / 2
    return dx, dy, Box(px + dx, py + dy, px + dx + width, py + dy + height)


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """Return how much a box covers of others, plus what of it lies outside the axes."""
    outside = (box.right - box.left) * (box.top - box.bottom) - box.shared(frame)
    return sum(box.shared(other) for other in taken) + 3 * outside
