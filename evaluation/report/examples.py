"""A grid of pictures: mask, real image, the image of each method, and how far two of them are apart."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from errors import InputError
from evaluation.report.collect import Run, evenly
from evaluation.report.figures import data_uri
from evaluation.report.tables import number

EXAMPLES = 8
THUMBNAIL = 128
"""Longest side of an example on the page, in pixels."""

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#ffffff")


@dataclass(frozen=True)
class Picture:
    """One picture: a data URI (None where there is no such image) and what is written below."""

    uri: str | None
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """Examples side by side; ``white`` is the difference, in percent of the grey range, drawn brightest."""

    columns: list[str]
    lines: list[list[Picture]]
    legend: list[tuple[str, str]]
    seed: int
    white: float | None


def example_grid(run: Run) -> Grid | None:
    """Return mask / real / each method / |base − mined| of samples spread evenly over a synthetic set.

    The samples are those of the first seed, chosen by their place in the set and not by any result. None
    when a method has no images.

    Raises:
        InputError: an image of a set is missing or unreadable.
    """
    seed = run.experiment["seeds"][0]
    folders = {m: run.folder / f"seed{seed}/{m}/synthetic" for m in run.methods}
    if not all((f / "manifest.jsonl").is_file() for f in folders.values()):
        return None
    manifests = {
        m: [json.loads(line) for line in (f / "manifest.jsonl").read_text().splitlines()]
        for m, f in folders.items()
    }
    chosen = evenly(range(min(map(len, manifests.values()))), EXAMPLES)
    images = {(m, i): _pixels(folders[m] / manifests[m][i]["image"]) for m in run.methods for i in chosen}
    gaps = {}
    if "base" in run.methods and run.mined != "base":
        gaps = {i: _gap(images["base", i], images[run.mined, i]) for i in chosen}
    white = max((float(np.percentile(gap, 99.5)) for gap in gaps.values()), default=0.0) or 1.0

    def line(i: int) -> list[Picture]:
        first = manifests[run.methods[0]][i]
        real = run.folder / "reference/real/images" / f"{first['source_mask']}.png"
        pictures = [
            Picture(_class_map(_pixels(folders[run.methods[0]] / first["mask"])), f"no. {i}"),
            Picture(_thumbnail(_pixels(real)) if real.is_file() else None),
        ]
        for m in run.methods:
            pictures.append(Picture(_thumbnail(images[m, i]), f"ℓ = {number(manifests[m][i]['value'], 3)}"))
        if gaps:
            heat = matplotlib.colormaps["magma"]((gaps[i] / white).clip(0, 1), bytes=True)[..., :3]
            pictures.append(Picture(_thumbnail(heat)))
        return pictures

    return Grid(
        ["mask", "real", *run.methods, *([f"|base − {run.mined}|"] if gaps else [])],
        [line(i) for i in chosen],
        [(name, CLASS_COLOURS[k % len(CLASS_COLOURS)]) for k, name in enumerate(run.classes)],
        seed,
        100 * white if gaps else None,
    )


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
    palette = np.array([matplotlib.colors.to_rgb(c) for c in CLASS_COLOURS]) * 255
    colours = np.where(labels[..., None] > 0, palette[(labels.astype(int) - 1) % len(palette)], 20)
    return _thumbnail(colours.astype(np.uint8), Image.Resampling.NEAREST)


def _thumbnail(pixels: np.ndarray, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> str:
    """Return pixels as a PNG of at most THUMBNAIL a side, as a data URI."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), resampling)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")
