"""What surface distances cost: ``python -m benchmarks.surface_distance``.

Ratios of seconds, measured in turns (A B A B …) in one process on the same masks: torchmetrics' Hausdorff
distance (and, beside it, MONAI's HD95) ÷ HD95 and ASD of ``SegmentationScore`` together.
"""

import argparse
import statistics
import warnings
from dataclasses import replace

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks.miner_overhead import paired_ratios
from evaluation.metrics import SegmentationScore
from evaluation.protocols import PROTOCOLS

BOTH = replace(PROTOCOLS["paper"], name="ASD and HD95", measures=("asd", "hd95"))


def slices(count: int, size: int, share: float) -> tuple[Tensor, Tensor]:
    """Return masks (N, H, W) of blobs that fill about ``share`` of the image, and others like them."""
    rng = np.random.default_rng(0)
    fields = [
        gaussian_filter(rng.normal(size=(2, size, size)), (0, size / 16, size / 16)) for _ in range(count)
    ]
    pairs = [(one, one + 0.3 * other * one.std() / other.std()) for one, other in fields]
    masks = [[field > np.quantile(field, 1 - share) for field in pair] for pair in pairs]
    target, prediction = torch.from_numpy(np.stack(masks, axis=1).astype(np.int64))
    return prediction, target


def ours(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Score all slices."""
    score = SegmentationScore(("background", "object"), protocol=BOTH)
    score.update(prediction, target, range(len(prediction)))
    return score.compute()


def by_torchmetrics(prediction: Tensor, target: Tensor) -> Tensor:
    """Return torchmetrics' Hausdorff distance."""
    from torchmetrics.segmentation import HausdorffDistance

    score = HausdorffDistance(num_classes=2, include_background=False, input_format="index")
    score.update(prediction, target)
    return score.compute()


def by_monai(prediction: Tensor, target: Tensor) -> Tensor:
    """Return MONAI's HD95."""
    from monai.metrics import compute_hausdorff_distance

    pair = (prediction[:, None].float(), target[:, None].float())
    return compute_hausdorff_distance(*pair, include_background=True, percentile=95)


def main() -> None:
    """Measure and print the ratios: median, minimum and maximum over the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256, help="edge of the slices in pixels")
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.05, help="share of the image inside the masks")
    parser.add_argument("--rounds", type=int, default=3, help="after one round that is not counted")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pair = slices(options.slices, options.size, options.share)
    for name, other in (("torchmetrics' HD", by_torchmetrics), ("MONAI's HD95", by_monai)):
        ratios = paired_ratios(lambda other=other: other(*pair), lambda: ours(*pair), options.rounds)
        print(
            f"{name} ÷ our ASD and HD95, seconds: median {statistics.median(ratios):.1f} (min "
            f"{min(ratios):.1f}, max {max(ratios):.1f}, {options.rounds} rounds; {options.slices} slices "
            f"of {options.size}², CPU)"
        )


if __name__ == "__main__":
    main()
