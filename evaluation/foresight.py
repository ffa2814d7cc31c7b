"""How well a few calls of the backbone foretell how hard a finished sample will be.

``python -m evaluation.foresight --set DIR --backbone WEIGHTS --anchor WEIGHTS --output FILE.json``
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from datamodules.sources.synthetic import SyntheticSet
from diffusion.backbones import Backbone
from diffusion.noise import NoiseStream
from diffusion.sampler import Sampler
from errors import InputError
from evaluation.batches import BATCH, batches, ready
from evaluation.ranks import spearman_within
from files import write_atomically
from methods.method import PROBE
from networks.scorer import Scorer
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS

SIGNALS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""ᾱ at which glances are tried."""

GLANCES = (1, 2, 3, 4)
ESTIMATES = (1, 2, 5, 10, 20)
"""Calls of the glances, and of the truncated rollouts, that are tried."""


class Noises(NamedTuple):
    """A batch of initial noises of a plain set, its masks, and how hard the finished samples are ``(B,)``."""

    noise: Tensor
    mask: Tensor
    finished: Tensor


class Look(NamedTuple):
    """A way to look ahead: its kind, ᾱ where it begins, calls of the backbone, and what it foretells."""

    kind: str
    signal: float | None
    calls: int
    values: Tensor


def looks(
    sampler: Sampler, x_T: Tensor, mask: Tensor, anchor: Segmenter, scorer: Scorer | None, reward: str
) -> Iterator[Look]:
    """Yield what each way to look ahead foretells of initial noises ``(B, *noise_shape)``."""
    condition = sampler.backbone.condition(mask)

    def judged(latent: Tensor) -> Tensor:
        image = sampler.backbone.decode(latent).clamp(-1, 1)
        return REWARDS[reward](anchor(image).float(), mask)

    for calls in ESTIMATES:
        if calls <= len(sampler.pairs):
            yield Look("estimate", None, calls, judged(sampler.rollout(x_T, condition, calls)))
    for signal in SIGNALS:
        for calls in GLANCES:
            latent = sampler.glance(x_T, condition, calls, signal=signal)
            yield Look("glance", signal, calls, judged(latent))
    if scorer is not None:
        response = sampler.response(x_T, condition, scorer)
        yield Look("scorer", None, int(scorer.inputs != "noise"), scorer.predict(response, mask))


def noises(plain: SyntheticSet, sampler: Sampler, anchor: Segmenter, reward: str) -> Iterator[Noises]:
    """Yield the initial noises that a plain set was made from, batch by batch.

    Raises:
        InputError: the set was not made by Base, or by another backbone.
    """
    made = plain.made
    if made["method"] != "base":
        raise InputError(f"{plain.folder}: was made by {made['method']}; give a set of the method Base")
    if made["weights"]["backbone"] != sampler.backbone.fingerprint():
        raise InputError(f"{plain.folder}: was made by another backbone; give the one that made it")
    for first, batch in enumerate(batches(plain, "samples")):
        mask = batch["mask"].to(anchor.device)
        entries = plain.entries[first * BATCH : first * BATCH + len(mask)]
        shape = sampler.backbone.noise_shape((mask.shape[-2], mask.shape[-1]))
        stream = NoiseStream(entries[0]["seed"], [e["index"] for e in entries], shape, anchor.device)
        with torch.no_grad():
            finished = REWARDS[reward](anchor(batch["image"].to(anchor.device)).float(), mask)
        yield Noises(stream.draw(PROBE), mask, finished)


def reward_of(plain: SyntheticSet) -> str:
    """Return the reward that a set's manifest names."""
    return str(plain.made["reward"])


@torch.no_grad()
def foresight(
    plain: SyntheticSet, sampler: Sampler, anchor: Segmenter, scorer: Scorer | None = None
) -> list[dict[str, Any]]:
    """Return Spearman's ρ between what each way foretells and how hard the finished samples are.

    Args:
        plain: samples of the method Base by this backbone; their reward is the one that their manifest names.
        sampler: DDIM through that backbone.
        anchor: the segmenter f_ϑ whose reward is foretold.
        scorer: a trained seed scorer to compare with.

    Returns:
        A row for each way: ``kind``, ``signal`` (ᾱ at the first call of a glance, else None), ``calls`` of
        the backbone for a sample, ``spearman`` over all samples, and ``spearman_within`` the draws of one
        real mask, which is what a choice goes by; None where no mask has three.

    Raises:
        InputError: the set was not made by Base, or by another backbone.
    """
    reward = reward_of(plain)
    finished: list[Tensor] = []
    rows: dict[tuple[str, float | None, int], list[Tensor]] = {}
    for x_T, mask, hardness in noises(plain, sampler, anchor, reward):
        finished.append(hardness.cpu())
        for look in looks(sampler, x_T, mask, anchor, scorer, reward):
            rows.setdefault((look.kind, look.signal, look.calls), []).append(look.values.cpu())
    truth = torch.cat(finished).tolist()
    masks = [entry["source_mask"] for entry in plain.entries]
    found = []
    for (kind, signal, calls), values in rows.items():
        foretold = torch.cat(values).tolist()
        within = spearman_within(foretold, truth, masks)
        found.append(
            {
                "kind": kind,
                "signal": signal,
                "calls": calls,
                "spearman": float(spearmanr(foretold, truth).statistic),
                "spearman_within": within if math.isfinite(within) else None,
            }
        )
    return found


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command that looks at the noises of a plain set."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--set", required=True, help="folder of a plain synthetic set")
    parser.add_argument("--backbone", required=True, help="weights folder of the backbone that made it")
    parser.add_argument("--anchor", required=True, help="weights folder of the segmenter")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the full schedule")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    return parser


def loaded(options: argparse.Namespace) -> tuple[SyntheticSet, Sampler, Segmenter]:
    """Return the plain set, DDIM through the backbone, and the anchor that such a command names."""
    backbone = ready(options.backbone, Backbone)  # type: ignore[type-abstract]
    anchor = ready(options.anchor, Segmenter)  # type: ignore[type-abstract]
    return SyntheticSet(options.set), Sampler(backbone, options.steps), anchor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = parser_of("evaluation.foresight", __doc__)
    parser.add_argument("--scorer", help="weights folder of a seed scorer, to compare with")
    options = parser.parse_args(arguments)
    plain, sampler, anchor = loaded(options)
    scorer = None if options.scorer is None else ready(options.scorer, Scorer)
    rows = foresight(plain, sampler, anchor, scorer)
    facts = {"set": options.set, "n": len(plain), "steps": options.steps, "anchor": anchor.fingerprint()[:8]}
    write_atomically(options.output, json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    for row in rows:
        where = "" if row["signal"] is None else f" from ᾱ = {row['signal']:g}"
        within = row["spearman_within"]
        inside = "" if within is None else f", within a mask {within:.2f}"
        print(f"{row['kind']}{where}, calls {row['calls']}: ρ = {row['spearman']:.2f}{inside}")


if __name__ == "__main__":
    main()
