"""Whether a sample shows what its mask says, and how hard it is: a judge's DSC, an anchor's rewards."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from datamodules.sources.synthetic import SyntheticSet
from errors import InputError
from evaluation.batches import batches
from evaluation.protocols import PROTOCOLS
from evaluation.surfaces import score_case
from networks.segmenter import Segmenter
from objectives.rewards import REWARDS

_DSC = replace(PROTOCOLS["paper"], measures=("dsc",))  # surfaces cost more than all else


def mask_fidelity(synthetic: SyntheticSet, judge: Segmenter) -> Tensor:
    """Return the DSC of an independent segmenter's prediction against the mask of each sample.

    A sample that is hard for the anchor and easy for a well-trained judge is worth training on; one that
    both get wrong does not show its mask. The judge must not be the anchor.

    Args:
        synthetic: N samples.
        judge: the segmenter, on whatever device it is; it is frozen here.

    Returns:
        float64 ``(N,)`` in percent, on the CPU: the mean over the foreground classes that the mask or the
        prediction has, by :data:`evaluation.metrics.PROTOCOL`; NaN where neither has any.

    Raises:
        InputError: the judge does not fit the set's channels or classes.
    """
    scores = []
    for logits, mask in _judged(synthetic, judge, "judge"):
        predicted, target = logits.argmax(1).cpu().numpy(), mask.cpu().numpy()
        pairs = zip(predicted, target, strict=True)
        scores += [score_case(p, g, judge.num_classes, (1.0, 1.0), _DSC)[:, 0] for p, g in pairs]
    return torch.from_numpy(np.stack(scores)).nanmean(1)


def adversariality(synthetic: SyntheticSet, anchor: Segmenter) -> dict[str, Tensor]:
    """Return every reward of each sample under an anchor.

    Args:
        synthetic: N samples, as they lie on disk.
        anchor: the segmenter f_ϑ, on whatever device it is; it is frozen here.

    Returns:
        float64 ``(N,)`` on the CPU for each name in :data:`objectives.rewards.REWARDS`, in the units of
        the reward; larger is harder.

    Raises:
        InputError: the anchor does not fit the set's channels or classes.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in REWARDS}
    for logits, mask in _judged(synthetic, anchor, "anchor"):
        for name, reward in REWARDS.items():
            values[name].append(reward(logits, mask).double().cpu())
    return {name: torch.cat(batches) for name, batches in values.items()}


def check_fit(synthetic: SyntheticSet, segmenter: Segmenter, role: str) -> None:
    """Raise unless a segmenter reads the images of a set and knows the classes of its masks.

    Args:
        synthetic: the set.
        segmenter: the network.
        role: what the network is called in the message.

    Raises:
        InputError: the set is empty, or channels or classes do not fit.
    """
    if len(synthetic) == 0:
        raise InputError(f"{synthetic.folder}: holds no samples; synthesise the set again")
    channels, classes = {shape[0] for shape in synthetic.shapes}, synthetic.highest_class + 1
    if channels != {segmenter.image_channels} or classes > segmenter.num_classes:
        raise InputError(
            f"{role}: reads {segmenter.image_channels} channels and knows {segmenter.num_classes} classes, "
            f"the images of {synthetic.folder} have {', '.join(map(str, sorted(channels)))} and the masks "
            f"at least {classes}; give a segmenter trained on such images"
        )


@torch.no_grad()
def _judged(synthetic: SyntheticSet, segmenter: Segmenter, role: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 logits (B, K, H, W) and the masks (B, H, W) of a set, batch by batch."""
    check_fit(synthetic, segmenter, role)
    segmenter.freeze()
    for batch in batches(synthetic, role):
        yield segmenter(batch["image"].to(segmenter.device)).float(), batch["mask"].to(segmenter.device)
