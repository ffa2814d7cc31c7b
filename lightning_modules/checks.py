"""Checks of one part of a run against another, before anything is trained."""

from typing import Any

from errors import InputError


def check_image_set(trainer: Any, channels: int, num_classes: int, argument: str) -> None:
    """Raise unless a network fits the images that the data module reads.

    Args:
        trainer: its data module has a ``source``; one without is not checked.
        channels: image channels of the network.
        num_classes: classes of the network, background included.
        argument: the command-line argument that configures the network.

    Raises:
        InputError: channels or classes differ.
    """
    source = getattr(trainer.datamodule, "source", None)
    if source is None:
        return
    if channels != source.channels:
        raise InputError(
            f"{argument}: reads images of {channels} channels, those of {source.name} have "
            f"{source.channels}; set its channels to match, or give a network trained on such images"
        )
    if num_classes != source.num_classes:
        raise InputError(
            f"{argument}: has {num_classes} classes, {source.name} has {source.num_classes} "
            f"({', '.join(source.class_names)}); set num_classes to match, or give a network trained on them"
        )
