"""DSC of a segmenter in each appearance mode of each test set, where the source knows the modes.

``python -m evaluation.by_mode --weights WEIGHTS --config CONFIG.yaml [--output FILE.json]``
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.sources import Source
from datamodules.sources.configured import read_source
from errors import InputError
from evaluation.batches import batches, ready
from evaluation.metrics import SegmentationScore
from files import write_atomically
from networks.segmenter import Segmenter


@torch.no_grad()
def dsc_by_mode(segmenter: Segmenter, source: Source) -> dict[str, dict[str, float]]:
    """Return the mean DSC in percent of each mode, and of ``all``, by test set.

    Args:
        segmenter: the network; it is frozen here.
        source: labelled images whose samples have a ``mode``.

    Raises:
        InputError: the samples know no mode.
    """
    segmenter.freeze()
    table: dict[str, dict[str, float]] = {}
    for split in source.test_splits:
        score = SegmentationScore(source.class_names)
        modes: list[int] = []
        for batch in batches(source.dataset(split), split):
            if "mode" not in batch:
                raise InputError(f"{source.name}: its images know no appearance mode; phantoms do")
            first = len(modes)
            modes += batch["mode"].tolist()
            prediction = segmenter(batch["image"].to(segmenter.device)).argmax(1).cpu()
            score.update(prediction, batch["mask"], range(first, len(modes)))
        cases = [np.nanmean([v for k, v in case.items() if k.startswith("dsc/")]) for case in score.cases()]
        dsc, drawn = np.array(cases), np.array(modes)
        found = np.unique(drawn).tolist()
        table[split] = {source.mode_names[mode]: float(dsc[drawn == mode].mean()) for mode in found}
        table[split]["all"] = float(dsc.mean())
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.by_mode", description=__doc__)
    parser.add_argument("--weights", required=True, help="weights folder of the segmenter")
    parser.add_argument("--config", required=True, help="config.yaml of a run on the real images")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    segmenter: Any = ready(options.weights, Segmenter)  # type: ignore[type-abstract]
    table = dsc_by_mode(segmenter, read_source(options.config))
    for split, modes in table.items():
        print(f"{split}: " + ", ".join(f"{mode} {dsc:.1f}" for mode, dsc in modes.items()))
    if options.output is not None:
        write_atomically(options.output, json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
