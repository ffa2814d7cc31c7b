"""Gain decomposition: what one gradient step on a synthetic sample does to the loss on real images.

``python -m evaluation.gain --set DIR --config CONFIG.yaml --anchor WEIGHTS --output FILE.json``
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.sources.configured import read_source
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.batches import batches, ready
from evaluation.fidelity import check_fit
from files import write_atomically
from networks.segmenter import Segmenter
from objectives.gradients import cosine, last_parameters, parameter_gradient
from objectives.rewards import REWARDS
from objectives.segmentation import dice_ce

Loss = Callable[[Tensor, Tensor], Tensor]


def sample_dice_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the loss that segmenters are trained with, :func:`dice_ce`, of each sample alone ``(B,)``."""
    pairs = zip(logits.split(1), mask.split(1), strict=True)
    return torch.stack([dice_ce(sample, target) for sample, target in pairs])


LOSSES: dict[str, Loss] = {"dice_ce": sample_dice_ce, **REWARDS}


def decompose(g_syn: Tensor, g_real: Tensor, gamma: float) -> dict[str, float]:
    """Return the first-order gain of one step of size γ along −g_syn, and what it is made of.

    G = ℓ_real(ϑ) − ℓ_real(ϑ − γ g_syn) ≈ γ⟨g_syn, g_real⟩ = γ ‖g_syn‖ ‖g_real‖ cos ζ. ‖g_syn‖ is how much
    there is to learn (adversariality), cos ζ how much of it serves real images (nativeness).

    Args:
        g_syn: gradient of the loss on synthetic data ``(P,)``.
        g_real: gradient of the loss on real data ``(P,)``.
        gamma: step size γ.

    Returns:
        ``norm_syn``, ``norm_real`` and ``cosine``, and ``gain`` in units of the loss, above 0 when the
        step helps.
    """
    return {
        "norm_syn": float(g_syn.norm()),
        "norm_real": float(g_real.norm()),
        "cosine": float(cosine(g_syn, g_real)),
        "gain": gamma * float(g_syn @ g_real),
    }


def mean_gradient(network: Segmenter, dataset: Dataset, loss: Loss) -> Tensor:
    """Return the gradient ``(P,)`` of the mean loss over a whole set, in all parameters of the network.

    Args:
        network: f_ϑ, in eval mode, on whatever device it is.
        dataset: samples with ``image`` and ``mask``, at least one.
        loss: of (logits, mask), one value a sample ``(B,)``.

    Raises:
        InputError: the set is empty.
    """
    total: Tensor | None = None
    count = 0
    for batch in batches(dataset, "gradient on real images"):
        image, mask = batch["image"].to(network.device), batch["mask"].to(network.device)
        gradient = parameter_gradient(network, image, mask, loss) * len(image)
        total = gradient if total is None else total.add_(gradient)
        count += len(image)
    if total is None:
        raise InputError("gain: the image set is empty; give a split with at least one image")
    return total / count


def measure_gain(
    synthetic: SyntheticSet, real: Dataset, anchor: Segmenter, loss: str = "dice_ce", gamma: float = 0.01
) -> dict[str, Any]:
    """Decompose the gain of each sample of a set, and of a step on the whole set.

    Three flat vectors of all parameters are held at a time, whatever the size of the set: the mean
    gradient on real images, the running sum on synthetic ones, and that of the sample at hand.

    Args:
        synthetic: the set.
        real: real images on which the gain is measured.
        anchor: the segmenter f_ϑ, on whatever device it is; it is frozen here.
        loss: a name in :data:`LOSSES`.
        gamma: step size γ.

    Returns:
        ``loss``, ``gamma``, ``n``, and for the whole network (``all``) and its output layer (``last``):
        ``set``, :func:`decompose` of the mean gradient, whose gain is the mean of those of the samples;
        ``mean``, the means over the samples; ``samples``, the numbers of each.

    Raises:
        InputError: the loss is unknown, the anchor does not fit the set, or a set is empty.
    """
    if loss not in LOSSES:
        raise InputError(f"loss {loss!r}: is unknown; choose {', '.join(LOSSES)}")
    check_fit(synthetic, anchor, "anchor")
    function = LOSSES[loss]
    parts = _parts(anchor.freeze())
    g_real = mean_gradient(anchor, real, function)
    g_sum = torch.zeros_like(g_real)
    samples: dict[str, list[dict[str, float]]] = {part: [] for part in parts}
    for sample in batches(synthetic, "gradient of each sample", size=1):
        image, mask = sample["image"].to(anchor.device), sample["mask"].to(anchor.device)
        g_syn = parameter_gradient(anchor, image, mask, function)
        g_sum += g_syn
        for part, where in parts.items():
            samples[part].append(decompose(g_syn[where], g_real[where], gamma))
    g_syn = g_sum / len(synthetic)
    figures: dict[str, Any] = {"loss": loss, "gamma": gamma, "n": len(synthetic)}
    for part, where in parts.items():
        columns = {key: [sample[key] for sample in samples[part]] for key in samples[part][0]}
        figures[part] = {
            "set": decompose(g_syn[where], g_real[where], gamma),
            "mean": {key: mean(column) for key, column in columns.items()},
            "samples": {key: column for key, column in columns.items() if key != "norm_real"},
        }
    return figures


def _parts(network: Segmenter) -> dict[str, slice | Tensor]:
    """Return where each part of the network is in a flat gradient of all its parameters."""
    last = set(last_parameters(network))
    flags = [torch.full((p.numel(),), name in last) for name, p in network.named_parameters()]
    return {"all": slice(None), "last": torch.cat(flags).nonzero().flatten().to(network.device)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.gain", description=__doc__)
    parser.add_argument("--set", required=True, help="folder of the synthetic set")
    parser.add_argument("--config", required=True, help="config.yaml of a run on the real images")
    parser.add_argument("--split", default="val", help="real split on which the gain is measured")
    parser.add_argument("--anchor", required=True, help="weights folder of the segmenter that is to learn")
    parser.add_argument("--loss", default="dice_ce", choices=list(LOSSES), help="loss on both sides")
    parser.add_argument("--gamma", type=float, default=0.01, help="step size")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    anchor = ready(options.anchor, Segmenter)  # type: ignore[type-abstract]
    source = read_source(options.config)
    if (source.channels, source.num_classes) != (anchor.image_channels, anchor.num_classes):
        raise InputError(
            f"{options.anchor}: is for {anchor.image_channels} channels and {anchor.num_classes} classes, "
            f"{source.name} of {options.config} has {source.channels} and {source.num_classes}; give a "
            "segmenter trained on those images"
        )
    synthetic = SyntheticSet(options.set)
    figures = measure_gain(synthetic, source.dataset(options.split), anchor, options.loss, options.gamma)
    facts = {key: synthetic.made[key] for key in ("method", "backbone", "seed")}
    facts |= {"split": options.split, "anchor": f"{type(anchor).__name__} {anchor.fingerprint()[:8]}"}
    write_atomically(options.output, json.dumps(facts | figures) + "\n")
    whole = figures["all"]["set"]
    print(
        f"{facts['method']} seed {facts['seed']}: {figures['n']} samples, gain {whole['gain']:.3g} = "
        f"{options.gamma:g} × {whole['norm_syn']:.3g} × {whole['norm_real']:.3g} × {whole['cosine']:.3f} "
        f"({options.loss} on {options.split})"
    )


if __name__ == "__main__":
    main()
