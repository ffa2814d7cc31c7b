"""Grids of pictures: mask, real image, the image of each method, and how far each is from base."""

import io
import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from errors import InputError
from evaluation.colours import CLASS_COLOURS, palette
from evaluation.report.collect import Run
from evaluation.report.inputs import evenly
from evaluation.report.style import INK, WIDTH, data_uri, new_figure, picture, styled, to_svg
from evaluation.report.tables import number

EXAMPLES = 8
ON_SHEET = 6
THUMBNAIL = 96
"""Longest side of an example on the page, in pixels."""


@dataclass(frozen=True)
class Picture:
    """One picture: a data URI (None where there is no such image) and what is written below."""

    uri: str | None
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """The same examples in every line; None for a picture that a set does not have.

    Attributes:
        lines: by name, a picture per example: ``mask``, ``real``, then each method.
        gaps: by method, |base − method| of each example with the same mask; empty without base.
        legend: name and colour of each class.
        seed: whose sets these are.
        white: the difference drawn brightest, in percent of the grey range; None without differences.
    """

    lines: dict[str, list[Picture]]
    gaps: dict[str, list[Picture]]
    legend: list[tuple[str, str]]
    seed: int
    white: float | None


@dataclass(frozen=True)
class _Example:
    """A synthetic image, its adversariality, and whether its mask is that of the whole column."""

    image: np.ndarray
    value: float
    shared: bool


def example_grid(run: Run) -> Grid | None:
    """Return mask / real / each method, and |base − method|, of samples spread evenly over a synthetic set.

    The samples are those of the first seed, chosen by their place in the set of base, or else of the first
    method, and not by any result. None when a method has no images.

    Raises:
        InputError: an image of a set is missing or unreadable.
    """
    seed = run.experiment["seeds"][0]
    folders = {m: run.folder / f"seed{seed}/{m}/synthetic" for m in run.methods}
    if not folders or not all((f / "manifest.jsonl").is_file() for f in folders.values()):
        return None
    manifests = {m: _manifest(folder) for m, folder in folders.items()}
    whole = "base" if "base" in run.methods else run.methods[0]
    chosen = evenly([manifests[whole][index] for index in sorted(manifests[whole])], EXAMPLES)
    masks = [_pixels(folders[whole] / one["mask"]) for one in chosen]
    reals = [run.folder / "real/images" / f"{one['source_mask']}.png" for one in chosen]
    examples = {
        m: [
            _example(folders[m], manifests[m].get(one["index"]), mask)
            for one, mask in zip(chosen, masks, strict=True)
        ]
        for m in run.methods
    }
    gaps, white = _gap_lines(examples)
    return Grid(
        {
            "mask": [
                Picture(_class_map(mask), f"no. {one['index']}")
                for one, mask in zip(chosen, masks, strict=True)
            ],
            "real": [Picture(_thumbnail(_pixels(path)) if path.is_file() else None) for path in reals],
            **{m: [_picture(one) for one in line] for m, line in examples.items()},
        },
        gaps,
        list(zip(run.classes, cycle(CLASS_COLOURS), strict=False)),
        seed,
        100 * white if gaps else None,
    )


@styled
def example_sheet(grid: Grid) -> str:
    """Return the first columns of a grid as one figure, the differences to base beside them; a data URI.

    Every example has the pixels that it has on the page; the viewer enlarges them.
    """
    lines = [line[:ON_SHEET] + grid.gaps.get(name, [])[:ON_SHEET] for name, line in grid.lines.items()]
    tiles = [[_decoded(one) for one in line] for line in lines]
    side = max(max(tile.shape[:2]) for line in tiles for tile in line)
    columns, step = max(map(len, lines)), side + side // 8
    sheet = np.full((step * len(lines), step * columns, 3), 255, dtype=np.uint8)
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            height, width, _ = tile.shape
            sheet[row * step :, column * step :][:height, :width] = tile
    figure = new_figure(WIDTH * len(lines) / (columns + 2))
    axes = figure.subplots()
    axes.imshow(sheet, interpolation="none")
    axes.set_anchor("W")  # in the middle, the room beside it would be taken for that of the names
    axes.set_yticks([row * step + side / 2 for row in range(len(lines))], list(grid.lines), color=INK)
    heads = ["images"] + ["|image − base|"] * bool(grid.gaps)
    axes.set_xticks([(k + 0.5) * step * columns / len(heads) for k in range(len(heads))], heads, color=INK)
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return to_svg(figure)


def _decoded(one: Picture) -> np.ndarray:
    """Return the pixels (H, W, 3) of a picture; none of one that is not there."""
    if one.uri is None:
        return np.empty((0, 0, 3), np.uint8)
    with Image.open(io.BytesIO(picture(one.uri))) as image:
        return np.asarray(image.convert("RGB"))


def _manifest(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the entries of a synthetic set by index."""
    entries = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return {entry["index"]: entry for entry in entries}


def _example(folder: Path, entry: dict[str, Any] | None, mask: np.ndarray) -> _Example | None:
    """Return the image of an entry, where the set has it; the mask is that of the whole column."""
    if entry is None:
        return None
    shared = np.array_equal(_pixels(folder / entry["mask"]), mask)
    return _Example(_pixels(folder / entry["image"]), entry["value"], shared)


def _picture(example: _Example | None) -> Picture:
    if example is None:
        return Picture(None)
    note = f"ℓ = {number(example.value, 3)}"
    return Picture(_thumbnail(example.image), note if example.shared else f"{note}, own mask")


def _gap_lines(examples: dict[str, list[_Example | None]]) -> tuple[dict[str, list[Picture]], float]:
    """Return |base − method| of each example, and the difference drawn brightest, the same for all."""
    gaps = {
        m: [
            _gap(a.image, b.image) if a and b and b.shared else None
            for a, b in zip(examples["base"], own, strict=True)
        ]
        for m, own in examples.items()
        if "base" in examples and m != "base"
    }
    pixels = [gap.ravel() for line in gaps.values() for gap in line if gap is not None]
    white = (float(np.percentile(np.concatenate(pixels), 99.5)) if pixels else 0.0) or 1.0
    magma = matplotlib.colormaps["magma"]

    def heat(gap: np.ndarray | None) -> Picture:
        if gap is None:
            return Picture(None)
        return Picture(_thumbnail(magma((gap / white).clip(0, 1), bytes=True)[..., :3]))

    return {m: [heat(gap) for gap in line] for m, line in gaps.items()}, white


def _pixels(path: Path) -> np.ndarray:
    """Return an 8-bit image (H, W) or (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image; synthesise its set again") from error


def _gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return |a − b| (H, W) as a fraction of the grey range, mean over the channels."""
    gap = np.abs(a.astype(float) - b) / 255
    return gap.reshape(*gap.shape[:2], -1).mean(axis=2)


def _class_map(labels: np.ndarray) -> str:
    return _thumbnail(palette(int(labels.max()) + 1)[labels], Image.Resampling.NEAREST)


def _thumbnail(pixels: np.ndarray, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> str:
    """Return pixels as a PNG of at most THUMBNAIL a side, as a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), resampling)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")
