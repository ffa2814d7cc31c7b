"""Samples of a data set with masks over them: ``python -m datamodules.overlay --config FILE --output FILE``.

The images as a network is given them: a row for each split, and a colour for each class.
"""

import argparse
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from torch.utils.data import Dataset

from datamodules.sources import Source
from datamodules.sources.configured import read_source
from datamodules.sources.source import Sample
from errors import InputError
from evaluation.colours import palette

TILE = 256
"""Pixels that the longer side of a sample is enlarged to, at least, so that outlines are thin."""
OPACITY = 0.3
CANDIDATES = 32
"""Samples of which the one with the most classes is shown."""
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def overlay(sample: Sample, classes: int) -> NDArray[np.uint8]:
    """Return an image with its classes over it, translucent in full outlines: uint8 ``(H', W', 3)``."""
    grey = (sample["image"].expand(3, -1, -1).clamp(-1, 1) + 1) * 127.5
    scale = -(-TILE // max(grey.shape[1:]))
    pixels, labels = (
        array.repeat(scale, axis=0).repeat(scale, axis=1)
        for array in (grey.permute(1, 2, 0).numpy(), sample["mask"].numpy())
    )
    opacity = np.where(labels > 0, OPACITY, 0.0)
    for k in range(1, classes):
        inside = labels == k
        opacity[inside & ~binary_erosion(inside, iterations=2)] = 1
    mixed = pixels + opacity[..., None] * (palette(classes)[labels] - pixels)
    return np.rint(mixed).astype(np.uint8)


def chosen(dataset: Dataset[Sample], count: int) -> list[Sample]:
    """Return ``count`` samples, or all there are, spread evenly; of neighbours that with the most classes."""
    total = len(dataset)  # type: ignore[arg-type]
    ends = np.linspace(0, total, min(count, total) + 1).astype(int)
    samples = []
    for start, end in pairwise(ends):
        near = range(start, end, -(-(end - start) // CANDIDATES))
        samples.append(max((dataset[k] for k in near), key=lambda each: len(each["mask"].unique())))
    return samples


def sheet(source: Source, count: int = 6) -> Figure:
    """Return a figure with ``count`` samples of every split, their ids above them."""
    figure = Figure((1.9 * count + 0.4, 2.2 * len(source.splits) + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(len(source.splits), count, squeeze=False)
    for row, split in zip(axes, source.splits, strict=True):
        dataset = source.dataset(split)
        for place in row:
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        row[0].set_ylabel(f"{split}\n{len(dataset)} images", fontsize=9)  # type: ignore[arg-type]
        for place, sample in zip(row, chosen(dataset, count), strict=False):
            place.imshow(overlay(sample, source.num_classes))
            place.set_title("\n".join(textwrap.wrap(sample["id"], 28)), fontsize=7)
    colours = palette(source.num_classes)[1:] / 255
    legend = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=name)
        for colour, name in zip(colours, source.class_names[1:], strict=True)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.overlay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, action="append", help="file that names the source; again for one over it"
    )
    parser.add_argument("--output", required=True, type=Path, help=f"picture, {', '.join(SUFFIXES)}")
    parser.add_argument("--count", type=int, default=6, help="samples of each split (default 6)")
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() not in SUFFIXES:
        raise InputError(f"--output {options.output}: give a file that ends in {', '.join(SUFFIXES)}")
    if options.count < 1:
        raise InputError(f"--count {options.count}: must be at least 1")
    figure = sheet(read_source(*options.config), options.count)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
