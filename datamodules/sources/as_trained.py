"""What a segmenter was trained on, without the images."""

from pathlib import Path

from torch.utils.data import Dataset

from datamodules.sources.source import Sample, Source
from errors import InputError
from networks.pretrained import training_facts


class AsTrainedSource(Source):
    """Size, channels and classes of the images that trained weights are from; it has no split.

    For ``predict`` on ``data.images`` where the training images are not: at the next hospital, say.

    Args:
        weights: folder of weights, as ``fit`` wrote it.

    Raises:
        InputError: the folder does not say what it was trained on.
    """

    splits = ()

    def __init__(self, weights: str) -> None:
        facts = training_facts(weights)
        if absent := [key for key in ("source", "class_names", "channels", "size") if key not in facts]:
            raise InputError(
                f"{Path(weights) / 'training.json'}: does not say {', '.join(absent)} of what was trained "
                "on; name a folder that fit wrote, or the training images as data.source"
            )
        self.name: str = facts["source"]
        self.class_names = tuple(facts["class_names"])
        self.channels: int = facts["channels"]
        self.size = (facts["size"][0], facts["size"][1])

    def dataset(self, split: str) -> Dataset[Sample]:
        """Raise: there is none."""
        raise InputError(
            f"data.source AsTrainedSource: has no images of {self.name} itself; take it to predict "
            "data.images, and name the images as data.source for anything else"
        )

    _dataset = dataset
