"""Keep the hard samples of a synthetic set: those above τ, as a set of their own.

``python -m evaluation.subsets --set DIR --tau 0.3 --output DIR``
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from files import beside, put_in_place


def subset(entries: Sequence[Mapping[str, Any]], tau: float, key: str = "value") -> list[int]:
    """Return the places of the samples whose value is above τ, in order (the paper's τ subsets).

    Args:
        entries: lines of a manifest.
        tau: threshold, in the unit of the value; a sample exactly at it is left out.
        key: which number of the manifest decides; ``value`` is the reward named by ``reward``.

    Raises:
        InputError: τ is not a number, or a sample has no number under the key.
    """
    if math.isnan(tau):
        raise InputError("tau: is not a number; give the smallest value that is left out")
    for place, entry in enumerate(entries):
        if not isinstance(entry.get(key), int | float):
            numbers = ", ".join(k for k, v in entry.items() if isinstance(v, int | float))
            raise InputError(f"sample {place} of the manifest has no number {key!r}; choose from {numbers}")
    return [place for place, entry in enumerate(entries) if entry[key] > tau]


def write_subset(
    folder: str | Path, output: str | Path, tau: float, key: str = "value", control: bool = False
) -> int:
    """Write the samples of a synthetic set that are above τ as a set of their own.

    Files are hard links where the file system has them, copies elsewhere; their names, and the lines of
    the manifest, stay those of the whole set, but for ``kl``: conditioning on an event of probability p
    moves a distribution by −ln p nats, and p is taken to be the share that is kept; and for ``calls`` and
    ``seconds``, which are also those of the samples that were left out. ``dataset.json`` gets
    the new ``n`` and, under ``subset``, every selection that led there. The folder is whole or absent.

    Args:
        folder: the whole set.
        output: where the subset goes. A synthetic set that is already there is replaced.
        tau: threshold, see :func:`subset`.
        key: which number of the manifest decides.
        control: keep as many samples as are above τ, but the first ones, whatever their value: what the
            subset is to be compared with, so that size and hardness are not mixed up.

    Returns:
        The number of samples kept.

    Raises:
        InputError: ``folder`` is no synthetic set, ``output`` is that very set or exists and is something
            else, or no sample is above τ.
    """
    source, output = SyntheticSet(folder), Path(output)
    if output.exists() and not (output / "dataset.json").is_file():
        raise InputError(f"{output}: exists and is no synthetic set; move it away or name another folder")
    if output.resolve() == source.folder.resolve():
        raise InputError(f"{output}: is the set to choose from; name another folder")
    places = subset(source.entries, tau, key)
    kept = [source.entries[place] for place in (range(len(places)) if control else places)]
    if not kept:
        highest = max((entry[key] for entry in source.entries), default=math.nan)
        raise InputError(f"{folder}: no {key} is above {tau:g}, the highest is {highest:g}; lower tau")
    chosen = {"set": str(folder), "key": key, "tau": tau, "control": control, "of": len(source)}
    made = source.made | {"n": len(kept), "subset": [*source.made.get("subset", []), chosen]}

    partial = beside(output)
    for entry in kept:
        for kind in ("image", "mask"):
            _link(source.folder / entry[kind], partial / entry[kind])
        noise = f"noise/{entry['index']:06d}.npy"
        if (source.folder / noise).is_file():
            _link(source.folder / noise, partial / noise)
    made_for_one = 1.0 if control else len(source) / len(kept)
    lines = [entry | _cost_of_choosing(entry, made_for_one) for entry in kept]
    (partial / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (partial / "dataset.json").write_text(json.dumps(made, indent=2) + "\n")
    put_in_place(partial, output)
    return len(kept)


def _cost_of_choosing(entry: Mapping[str, Any], made_for_one: float) -> dict[str, float]:
    """Return what changes in a line of the manifest when one of so many samples is kept."""
    changed = {key: entry[key] * made_for_one for key in ("calls", "seconds") if key in entry}
    if entry.get("kl") is not None:
        changed["kl"] = entry["kl"] + math.log(made_for_one)
    return changed


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.subsets", description=__doc__)
    parser.add_argument("--set", required=True, help="folder of the synthetic set")
    parser.add_argument("--tau", required=True, type=float, help="keep samples whose value is above this")
    parser.add_argument("--key", default="value", help="which number of the manifest decides")
    parser.add_argument("--control", action="store_true", help="keep as many, but the first ones")
    parser.add_argument("--output", required=True, type=Path, help="folder of the subset")
    options = parser.parse_args(arguments)
    kept = write_subset(options.set, options.output, options.tau, options.key, options.control)
    which = "the first, as many as have" if options.control else "with"
    print(f"{options.output}: {kept} samples, {which} {options.key} > {options.tau:g}")


if __name__ == "__main__":
    main()
