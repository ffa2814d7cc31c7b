"""How a network looks at a whole set: on a GPU if there is one, batch by batch, with a progress bar."""

from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from networks.pretrained import Pretrained, frozen

P = TypeVar("P", bound=Pretrained)

BATCH = 64
"""Images at a time."""


def batches(dataset: Dataset, doing: str, size: int = BATCH) -> "tqdm[dict[str, Any]]":
    """Return the batches of a set in its order.

    Args:
        dataset: samples as dictionaries.
        doing: what the progress bar says; there is none where standard error is no terminal.
        size: samples in a batch.
    """
    return tqdm(DataLoader(dataset, batch_size=size), desc=doing, leave=False, disable=None)


def ready(folder: str, kind: type[P]) -> P:
    """Return the network that a folder holds, frozen, on a GPU where there is one.

    Raises:
        InputError: see :func:`networks.pretrained.load_pretrained`.
    """
    return frozen(folder, kind).to("cuda" if torch.cuda.is_available() else "cpu")
