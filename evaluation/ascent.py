"""Where the gradient leads that a miner climbs, and how large it is.

``python -m evaluation.ascent --set DIR --backbone WEIGHTS --anchor WEIGHTS --output FILE.json``

For the initial noises of a plain set: the gradient of the reward of a truncated rollout, with the paper's
temporal stop-gradient and with the true one, and that of a glance; and what finished samples gain when
their noise takes a step along it, beside a step in a random direction.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.sources.synthetic import SyntheticSet
from diffusion.sampler import GradientMode, Sampler
from errors import require
from evaluation.foresight import loaded, noises, parser_of, reward_of
from files import write_atomically
from methods.method import gradient_of
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS

NATS = (2.0, 50.0, 500.0)
"""Sizes of the steps that are tried: ½‖Δx_T‖², the KL divergence of N(Δx_T, I) from N(0, I)."""

LOOKS: dict[str, tuple[str, int, GradientMode]] = {
    "rollout of 10 calls, temporal stop-gradient": ("rollout", 10, "stop"),
    "rollout of 10 calls, true gradient": ("rollout", 10, "full"),
    "glance of 2 calls, true gradient": ("glance", 2, "full"),
}
"""What is climbed: how the sampler looks ahead, its calls, and the gradient. The first is the paper's."""

RANDOM = "random direction"


def ascent(
    plain: SyntheticSet, sampler: Sampler, anchor: Segmenter, nats: Sequence[float] = NATS
) -> list[dict[str, Any]]:
    """Return how large each gradient is, and where a step along it leads.

    Args:
        plain: samples of the method Base by this backbone; their reward is the one that their manifest names.
        sampler: DDIM through that backbone.
        anchor: the segmenter f_ϑ whose reward is climbed.
        nats: sizes of the steps.

    Returns:
        A row for each direction: ``direction``; ``norm``, the median of ‖∂reward/∂x_T‖; ``cosine``, its mean
        with the true gradient of the same look; ``rise``, for each of ``nats`` the mean change of the
        finished sample's reward. A random direction has the last alone.

    Raises:
        InputError: the set was not made by Base, or by another backbone; or the schedule is shorter than a
            rollout.
    """
    longest = max(calls for _, calls, _ in LOOKS.values())
    require(len(sampler.pairs) >= longest, "--steps", len(sampler.pairs), f"must be at least {longest}")
    reward = reward_of(plain)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, list[Tensor]]] = {}
    for x_T, mask, finished in noises(plain, sampler, anchor, reward):
        condition = sampler.backbone.condition(mask)

        def judged(image: Tensor, mask: Tensor = mask) -> Tensor:
            return REWARDS[reward](anchor(image.clamp(-1, 1)).float(), mask)

        def seen(
            look: tuple[str, int, GradientMode], condition: Any = condition
        ) -> Callable[[Tensor], Tensor]:
            kind, calls, mode = look
            ahead = sampler.glance if kind == "glance" else sampler.rollout
            return lambda x: judged(sampler.backbone.decode(ahead(x, condition, calls, mode)))

        directions = {name: gradient_of(seen(look), x_T)[1] for name, look in LOOKS.items()}
        for name, (kind, calls, _) in LOOKS.items():
            true = directions[next(n for n, look in LOOKS.items() if look == (kind, calls, "full"))]
            parts = found.setdefault(name, {})
            cosine = torch.cosine_similarity(directions[name].flatten(1), true.flatten(1))
            parts.setdefault("norm", []).append(directions[name].flatten(1).norm(dim=1).cpu())
            parts.setdefault("cosine", []).append(cosine.cpu())
        directions[RANDOM] = torch.randn(x_T.shape, generator=generator).to(x_T)
        for name, direction in directions.items():
            unit = torch.nn.functional.normalize(direction.flatten(1), dim=1).view_as(x_T)
            for size in nats:
                moved = sampler.sample(x_T + (2 * size) ** 0.5 * unit, condition)
                with torch.no_grad():
                    rise = judged(moved) - finished
                found.setdefault(name, {}).setdefault(f"{size:g}", []).append(rise.cpu())
    rows = []
    for name, parts in found.items():
        values = {key: torch.cat(part) for key, part in parts.items()}
        row: dict[str, Any] = {"direction": name}
        if "norm" in values:
            row |= {"norm": float(values["norm"].median()), "cosine": float(values["cosine"].mean())}
        rows.append(row | {"rise": {f"{size:g}": float(values[f"{size:g}"].mean()) for size in nats}})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser_of("evaluation.ascent", __doc__).parse_args(arguments)
    plain, sampler, anchor = loaded(options)
    rows = ascent(plain, sampler, anchor)
    facts = {
        "set": options.set,
        "n": len(plain),
        "steps": options.steps,
        "anchor": anchor.fingerprint()[:8],
        "reward": reward_of(plain),
        "amplification": sampler.terminal_alpha**-0.5,
    }
    write_atomically(options.output, json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    print(f"√(1/ᾱ_T) = {facts['amplification']:.1f}")
    for row in rows:
        size = f"‖∇‖ {row['norm']:.3g}, cos to the true one {row['cosine']:.2f}, " if "norm" in row else ""
        rises = ", ".join(f"{nats} nats {rise:+.3f}" for nats, rise in row["rise"].items())
        print(f"{row['direction']}: {size}rise of {facts['reward']}: {rises}")


if __name__ == "__main__":
    main()
