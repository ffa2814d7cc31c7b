"""Measure a synthetic set: adversariality, FID, seconds an image.

``python -m evaluation.synthetic --set DIR --config CONFIG.yaml --encoder WEIGHTS --output FILE.json``
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import jsonargparse
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules.sources import Source
from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.fid import EncoderFeatures, fid, inception
from files import write_atomically
from networks.pretrained import load_pretrained
from networks.segmenter import Segmenter


def read_source(config: str | Path) -> Source:
    """Build the source that a run's ``config.yaml`` names under ``data.init_args.source``.

    Raises:
        InputError: the file is missing or names no source.
    """
    try:
        settings = yaml.safe_load(Path(config).read_text())["data"]["init_args"]["source"]
    except FileNotFoundError:
        raise InputError(f"{config}: no such file; give the config.yaml that a fit run saved") from None
    except (KeyError, TypeError):
        raise InputError(
            f"{config}: has no data.init_args.source; give the config.yaml of a fit run"
        ) from None
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    return parser.instantiate_classes(parser.parse_object({"source": settings})).source


def _batches(dataset: Dataset) -> Iterator[Tensor]:
    for batch in DataLoader(dataset, batch_size=64):
        yield batch["image"]


def measure(synthetic: SyntheticSet, real: Dataset, extractor: nn.Module) -> dict[str, Any]:
    """Return the figures of a synthetic set.

    Args:
        synthetic: the set.
        real: real images to take the Fréchet distance to.
        extractor: images in [−1, 1] to features, with a ``name``.

    Returns:
        ``adversariality`` (mean of the reward named by ``reward``, under the anchor), ``values`` of each
        sample, ``fid``, ``fid_extractor``, ``seconds_per_image`` (synthesis alone), ``kl`` in nats, and
        what made the set.
    """
    made = json.loads((synthetic.folder / "dataset.json").read_text())
    values = [entry["value"] for entry in synthetic.entries]
    return {
        "method": made["method"],
        "backbone": made["backbone"],
        "seed": made["seed"],
        "n": len(synthetic),
        "adversariality": mean(values),
        "reward": made["reward"],
        "fid": fid(_batches(real), _batches(synthetic), extractor),
        "fid_extractor": extractor.name,
        "seconds_per_image": mean(entry["seconds"] for entry in synthetic.entries),
        "kl": mean(entry["kl"] for entry in synthetic.entries),
        "values": values,
    }


def write_examples(synthetic: SyntheticSet, real: Dataset, folder: Path) -> None:
    """Write the real image of every source mask of the set, as ``<source_mask>.png``."""
    wanted = {entry["source_mask"] for entry in synthetic.entries}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(real)):  # type: ignore[arg-type]
        sample = real[i]
        if sample["id"] in wanted:
            levels = ((sample["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(levels.squeeze()).save(folder / f"{sample['id']}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.synthetic", description=__doc__)
    parser.add_argument("--set", required=True, help="folder of the synthetic set")
    parser.add_argument("--config", required=True, help="config.yaml of a run on the real images")
    parser.add_argument("--split", default="test", help="real split that FID compares with")
    parser.add_argument(
        "--encoder", required=True, help="weights folder of a segmenter that is not the anchor"
    )
    parser.add_argument("--inception", default=None, help="file of torch-fidelity's Inception weights")
    parser.add_argument("--examples", type=Path, help="folder for the real images that the masks came from")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    extractor = inception(options.inception)
    if extractor is None:
        extractor = EncoderFeatures(load_pretrained(options.encoder, Segmenter))  # type: ignore[type-abstract]
    source = read_source(options.config)
    synthetic = SyntheticSet(options.set)
    figures = measure(synthetic, source.dataset(options.split), extractor)
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
