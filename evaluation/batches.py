"""How a network looks at a whole set: batch by batch, with a progress bar on a terminal."""

from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

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
