"""Plan nnU-Net for a training set, as nnU-Net does, and write the plan as a configuration.

``python -m datamodules.plan --config configs/data/mine.yaml --output plan.yaml``

The plan goes over the other files of a segmenter:
``python cli.py fit --config configs/stages/segmenter.yaml --config configs/data/mine.yaml
--config configs/segmenters/nnunet.yaml --config plan.yaml``
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from datamodules.sources import Source
from datamodules.sources.configured import read_source
from errors import InputError
from files import write_atomically
from networks.nnunet_plan import Fingerprint, Intensities, Plan, Spacing, plan_2d
from networks.normalisation import scheme_of

PLAIN_SPACING = (999.0, 1.0, 1.0)
"""What nnU-Net takes for images that are no slices: they lie far apart."""
UNKNOWN_SPACING = (1.0, 1.0, 1.0)


@dataclass
class _Case:
    name: str | None
    spacing: Spacing
    images: list[np.ndarray]
    masks: list[np.ndarray]


def _cases(source: Source) -> Iterator[_Case]:
    """Yield the training cases: the slices of a volume together, every other image alone."""
    dataset: Any = source.dataset("train")
    case: _Case | None = None
    for index in range(len(dataset)):
        sample, volume = dataset[index], source.volume("train", index)
        image, mask = sample["image"].numpy(), sample["mask"].numpy()
        name = None if volume is None else volume.case
        if case is not None and name is not None and name == case.name:
            case.images.append(image)
            case.masks.append(mask)
            continue
        if case is not None:
            yield case
        spacing = PLAIN_SPACING if volume is None else volume.spacing or UNKNOWN_SPACING
        case = _Case(name, spacing, [image], [mask])
    if case is not None:
        yield case


def measure(source: Source) -> tuple[Fingerprint, list[dict[str, float]]]:
    """Return the fingerprint of a source's training set, and the grey values of its foreground by channel.

    Images are taken as the source gives them, in [−1, 1]; the slices of a volume are one case if they follow
    each other.

    Raises:
        InputError: no training image has any foreground.
    """
    shapes, spacings = [], []
    intensities = Intensities(source.channels)
    for case in _cases(source):
        shapes.append((len(case.images), *case.masks[0].shape))
        spacings.append(case.spacing)
        intensities.add(np.stack(case.images, axis=1), np.stack(case.masks))
    try:
        summary = intensities.summary()
    except ValueError as error:
        raise InputError(f"{source.name}: {error} in its training split; check its masks") from error
    return Fingerprint(tuple(shapes), tuple(spacings), source.channels, source.num_classes), summary


def normalisation(names: Sequence[str], intensities: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Return how each channel is normalised, by nnU-Net's rule from the names of the channels.

    Args:
        names: of all channels, or one for all of them.
        intensities: grey values of the foreground of each channel.

    Raises:
        InputError: there are neither one nor as many names as channels, or one cannot be served.
    """
    if len(names) not in (1, len(intensities)):
        raise InputError(
            f"--channels: names {len(names)}, the images have {len(intensities)} channels; name each, or one "
            "for all"
        )
    every = list(names) * (len(intensities) // len(names))
    found = []
    for name, values in zip(every, intensities, strict=True):
        scheme = scheme_of(name)
        found.append({"scheme": scheme} | ({} if scheme == "zscore" else values))
    return found


def as_config(plan: Plan, source: Source, channels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a plan as the part of a configuration that it decides."""
    network = {
        "in_channels": source.channels,
        "num_classes": source.num_classes,
        "patch_size": list(plan.patch_size),
        "base_features": plan.features[0],
        "max_features": 512,
        "strides": [list(pair) for pair in plan.strides],
        "kernel_sizes": [list(pair) for pair in plan.kernel_sizes],
        "normalisation": channels,
    }
    data = {
        "batch_size": plan.batch_size,
        "augmentation": "nnunetv2",
        "patch_size": list(plan.patch_size),
        "normalisation": [dict(channel) for channel in channels],
    }
    return {
        "model": {"init_args": {"segmenter": {"class_path": "NNUNet", "init_args": network}}},
        "data": {"init_args": data},
    }


def describe(plan: Plan, fingerprint: Fingerprint, channels: Sequence[dict[str, Any]]) -> str:
    """Return what was decided, and from what, a line each."""
    slices = sum(shape[0] for shape in fingerprint.shapes)
    lines = {
        "training set": f"{len(fingerprint.shapes)} cases, {slices} images, {fingerprint.classes} classes",
        "spacing": " × ".join(f"{size:g}" for size in plan.spacing),
        "median shape": " × ".join(f"{edge:g}" for edge in plan.median_shape),
        "patch": " × ".join(map(str, plan.patch_size)),
        "batch": str(plan.batch_size),
        "stages": f"{len(plan.strides)}, {plan.convs} convolutions each",
        "features": ", ".join(map(str, plan.features)),
        "strides": ", ".join(f"{a}×{b}" for a, b in plan.strides),
        "kernels": ", ".join(f"{a}×{b}" for a, b in plan.kernel_sizes),
    }
    for number, channel in enumerate(channels):
        values = [f"{key} {value:.4g}" for key, value in channel.items() if key != "scheme"]
        lines[f"channel {number}"] = ", ".join([channel["scheme"], *values])
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, action="append", help="file that names the source; again for one over it"
    )
    parser.add_argument("--output", required=True, type=Path, help="file for the plan")
    parser.add_argument(
        "--channels",
        nargs="+",
        default=["zscore"],
        help="name of each channel, or one for all: ct has a normalisation of its own, all else the z-score",
    )
    parser.add_argument("--memory", type=float, default=8.0, help="of the GPU to plan for, in GB")
    options = parser.parse_args(arguments)
    if not options.memory > 0:
        raise InputError(f"--memory {options.memory:g}: must be above 0")
    source = read_source(*options.config)
    fingerprint, intensities = measure(source)
    channels = normalisation(options.channels, intensities)
    plan = plan_2d(fingerprint, options.memory)
    text = describe(plan, fingerprint, channels)
    comment = "".join(f"# {line}\n" for line in [f"nnU-Net's plan for {source.name}", *text.splitlines()])
    write_atomically(
        options.output,
        comment
        + yaml.safe_dump(
            as_config(plan, source, channels), sort_keys=False, default_flow_style=None, width=100
        ),
    )
    print(text)
    print(options.output)


if __name__ == "__main__":
    main()
