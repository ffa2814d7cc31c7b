"""Measure a synthetic set: how hard, how native, how true to its masks, how diverse, how costly.

``python -m evaluation.synthetic --set DIR --config CONFIG.yaml --encoder WEIGHTS --output FILE.json``
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from datamodules.sources.configured import read_source
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.batches import ready
from evaluation.distribution import diversity, features_of, inside, kid, precision_recall, vendi
from evaluation.fid import EncoderFeatures, fid, inception
from evaluation.fidelity import adversariality, mask_fidelity
from evaluation.modes import knows_modes, mode_histogram
from evaluation.noise import typical_set
from files import write_atomically
from networks.segmenter import Segmenter


def measure(
    synthetic: SyntheticSet,
    real: Dataset,
    extractor: nn.Module,
    judge: Segmenter | None = None,
    anchor: Segmenter | None = None,
    modes: Dataset | None = None,
    features_file: Path | None = None,
    mode_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the figures of a synthetic set.

    Args:
        synthetic: the set.
        real: real images to compare its distribution with.
        extractor: images in [−1, 1] to features, with a ``name``.
        judge: an independent, well-trained segmenter, for ``mask_fidelity``.
        anchor: the segmenter under which every reward is taken, for ``rewards``.
        modes: real images whose mode is known, best of all modes alike; None takes ``real``.
        features_file: .npz file for the features ``synthetic`` ``(N, D)`` and ``real`` ``(R, D)``.
        mode_names: of the modes, by number; without them the numbers are their names.

    Returns:
        ``adversariality`` (mean of the reward named by ``reward``, under the anchor, or without one under
        that of the synthesis), ``values`` of each sample, ``fid``, ``fid_extractor``, and of an image
        ``seconds_per_image`` and ``calls_per_image`` of the backbone (synthesis alone), ``kl`` in nats,
        and what made the set. Over the features of ``fid_extractor``: ``kid``, ``precision``, ``recall``,
        ``diversity`` and ``vendi`` (:mod:`evaluation.distribution`), None where undefined. With a judge:
        ``mask_fidelity``, the mean DSC in percent, and ``judge``. With an anchor: ``rewards``, the mean of
        each, and ``anchor``. Where the real images know their modes: ``modes`` with ``histogram``,
        ``recall`` and ``accuracy`` (:mod:`evaluation.modes`), and the ``precision`` of each mode's samples.
        ``samples`` holds ``mask_fidelity``, ``rewards`` and ``mode`` of each sample. Where the set has its
        initial noise: ``noise``, its farthest departure from N(0, I) by statistic (:func:`noise_figures`).
    """
    made = synthetic.made
    values = [entry["value"] for entry in synthetic.entries]
    divergences = [entry["kl"] for entry in synthetic.entries]
    real_features, features = features_of(real, extractor), features_of(synthetic, extractor)
    precision, recall = precision_recall(real_features, features)
    figures: dict[str, Any] = {
        "method": made["method"],
        "backbone": made["backbone"],
        "seed": made["seed"],
        "n": len(synthetic),
        "adversariality": mean(values),
        "reward": made["reward"],
        "fid": fid([real_features], [features], nn.Identity()),
        "fid_extractor": extractor.name,
        "kid": _defined(kid(real_features, features)),
        "precision": _defined(precision),
        "recall": _defined(recall),
        "diversity": _defined(diversity(features)),
        "vendi": _defined(vendi(features)),
        "seconds_per_image": mean(entry["seconds"] for entry in synthetic.entries),
        "calls_per_image": mean(entry["calls"] for entry in synthetic.entries),
        "kl": None if None in divergences else mean(divergences),
        "values": values,
        "samples": {},
    }
    if features_file is not None:
        as_read = features.float().numpy(), real_features.float().numpy()
        np.savez_compressed(features_file, synthetic=as_read[0], real=as_read[1])
    if noise := noise_figures(synthetic):
        figures["noise"] = noise
    if judge is not None:
        dsc = mask_fidelity(synthetic, judge)
        figures |= {"judge": _name(judge), "mask_fidelity": _defined(float(dsc.nanmean()))}
        figures["samples"]["mask_fidelity"] = [_defined(value) for value in dsc.tolist()]
    if anchor is not None:
        rewards = adversariality(synthetic, anchor)
        figures |= {"anchor": _name(anchor), "rewards": {k: float(v.mean()) for k, v in rewards.items()}}
        figures["samples"]["rewards"] = {name: value.tolist() for name, value in rewards.items()}
        figures["values"] = figures["samples"]["rewards"][made["reward"]]
        figures["adversariality"] = mean(figures["values"])
    known = real if modes is None else modes
    if knows_modes(known):
        found = mode_histogram(known, synthetic)
        names = [mode_names[mode] if mode_names else str(mode) for mode in found.modes]
        figures["modes"] = {
            "histogram": dict(zip(names, found.counts, strict=True)),
            "accuracy": _defined(found.accuracy),
            "recall": dict(zip(names, map(_defined, found.recall), strict=True)),
        }
        if precision == precision:  # not NaN
            within = inside(real_features, features)
            shares = [float(within[found.predicted == mode].double().mean()) for mode in found.modes]
            figures["modes"]["precision"] = dict(zip(names, map(_defined, shares), strict=True))
        figures["samples"]["mode"] = found.predicted.tolist()
    return figures


def noise_figures(synthetic: SyntheticSet) -> dict[str, dict[str, float]]:
    """Return how far the initial noise of a set is from N(0, I), by statistic; empty where it has none.

    Of the channels, and of the three lowest bands of frequency, the one that is farthest off counts:
    ``value``, and ``z`` in standard deviations of that statistic for as much noise from N(0, I).
    """
    files = [synthetic.folder / "noise" / f"{entry['index']:06d}.npy" for entry in synthetic.entries]
    files = [file for file in files if file.is_file()]
    if not files:
        return {}
    checks = typical_set(torch.from_numpy(np.stack([np.load(file) for file in files])))
    chosen = {
        "norm": (checks["norm_ratio"], None),
        "mean": (checks["channel_mean"], None),
        "variance": (checks["channel_variance"], None),
        "low_frequencies": (checks["spectrum"], 3),
    }
    figures = {}
    for name, (check, count) in chosen.items():
        z, value = max(zip(check["z"][:count], check["value"][:count], strict=True), key=lambda p: abs(p[0]))
        figures[name] = {"value": value, "z": z}
    return figures


def _defined(value: float) -> float | None:
    """Return None, which JSON knows, for NaN."""
    return None if math.isnan(value) else value


def _name(segmenter: Segmenter) -> str:
    return f"{type(segmenter).__name__} {segmenter.fingerprint()[:8]}"


def write_examples(synthetic: SyntheticSet, real: Dataset, folder: Path) -> None:
    """Write the real image of every source mask of the set, as ``<source_mask>.png``."""
    wanted = {entry["source_mask"] for entry in synthetic.entries}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(real)):  # type: ignore[arg-type]
        sample = real[i]
        if sample["id"] in wanted:
            levels = ((sample["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(levels.squeeze()).save(folder / f"{sample['id']}.png")


def _load(folder: str) -> Segmenter:
    return ready(folder, Segmenter)  # type: ignore[type-abstract]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.synthetic", description=__doc__)
    parser.add_argument("--set", required=True, help="folder of the synthetic set")
    parser.add_argument("--config", required=True, help="config.yaml of a run on the real images")
    parser.add_argument("--real-config", help="config.yaml with the real images to compare with; --config")
    parser.add_argument("--split", default="test", help="real split that the set is compared with")
    parser.add_argument(
        "--encoder", required=True, help="weights folder of a segmenter that is not the anchor"
    )
    parser.add_argument("--judge", help="weights folder of the segmenter for mask fidelity; the --encoder")
    parser.add_argument("--anchor", help="weights folder of the segmenter for every reward; none if absent")
    parser.add_argument("--mode-split", help="real split that shows the appearance modes; the --split")
    parser.add_argument("--inception", default=None, help="file of torch-fidelity's Inception weights")
    parser.add_argument("--examples", type=Path, help="folder for the real images that the masks came from")
    parser.add_argument("--features", type=Path, help=".npz file to write the features to")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    encoder = _load(options.encoder)
    judge = encoder if options.judge is None else _load(options.judge)
    anchor = None if options.anchor is None else _load(options.anchor)
    if anchor is not None and anchor.fingerprint() in (encoder.fingerprint(), judge.fingerprint()):
        raise InputError(
            f"--anchor {options.anchor}: is the encoder or the judge too, to which samples that are hard for "
            "it look wrong; give a segmenter of other images, or of another seed"
        )
    source = read_source(options.config)
    real = source if options.real_config is None else read_source(options.real_config)
    synthetic = SyntheticSet(options.set)
    extractor = inception(options.inception) or EncoderFeatures(encoder)
    figures = measure(
        synthetic,
        real.dataset(options.split),
        extractor.to(encoder.device),
        judge,
        anchor,
        real.dataset(options.mode_split or options.split),
        options.features,
        real.mode_names,
    )
    if options.examples is not None:
        write_examples(synthetic, source.dataset("train"), options.examples)
    write_atomically(options.output, json.dumps(figures) + "\n")
    print(
        f"{figures['method']} seed {figures['seed']}: {figures['n']} samples, adversariality "
        f"{figures['adversariality']:.4f} ({figures['reward']}), "
        f"FID {figures['fid']:.3f} ({figures['fid_extractor']})"
    )


if __name__ == "__main__":
    main()
