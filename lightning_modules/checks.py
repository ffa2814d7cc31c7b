"""Checks of one part of a run against another, before anything is trained."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from datamodules.sources import Source
from diffusion.backbones import Backbone
from errors import InputError
from networks import Segmenter
from networks.pretrained import Pretrained, load_pretrained

Network = TypeVar("Network", bound=Pretrained)


def check_image_set(source: Source, network: Backbone | Segmenter, argument: str, whole: bool = True) -> None:
    """Raise unless a network fits the images of a source.

    Args:
        source: where the images come from.
        network: what reads or makes such images.
        argument: the command-line argument that configures the network.
        whole: whether a segmenter is given whole images; windows of them have its own size.

    Raises:
        InputError: channels, classes or sizes differ.
    """
    if network.image_channels != source.channels:
        raise InputError(
            f"{argument}: is made for images of {network.image_channels} channels, those of {source.name} "
            f"have {source.channels}; set its channels to match, or give a network trained on such images"
        )
    if network.num_classes != source.num_classes:
        raise InputError(
            f"{argument}: has {network.num_classes} classes, {source.name} has {source.num_classes} "
            f"({', '.join(source.class_names)}); set num_classes to match, or give a network trained on them"
        )
    if isinstance(network, Backbone):
        network.noise_shape(source.size)  # raises where the size does not fit
    wrong = network.misfit(source.size) if whole and isinstance(network, Segmenter) else None
    if wrong:
        raise InputError(
            f"{argument}: {source.name} has {wrong}; set the size of the data to match, or give another "
            "network"
        )


def started(network: Network, weights: str | None, argument: str) -> Network:
    """Return the network to train, with the weights of a trained one where there is one.

    Args:
        network: as configured.
        weights: folder of trained weights to start from; None starts anew.
        argument: the command-line argument that configures the network.

    Raises:
        InputError: the weights cannot be read, or are of another architecture.
    """
    if weights is None:
        return network
    trained = load_pretrained(weights, type(network))
    if trained.settings() != network.settings():
        raise InputError(
            f"model.weights {weights}: holds another architecture than {argument} "
            f"({trained.settings()}, not {network.settings()}); set {argument} to match"
        )
    network.load_state_dict(trained.state_dict())
    return network


def check_trained(found: Any, what: str) -> None:
    """Raise unless something trained is found: a network that has learnt nothing has no results.

    Args:
        found: true if there is.
        what: what the network is.
    """
    if not found:
        raise InputError(f"model.weights: is not given; name the folder of a trained {what}")


def check_checkpoint(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise unless a checkpoint's weights fit the configured network.

    Args:
        own: the state that the configuration makes.
        given: the state in the checkpoint.
        what: what is trained, for the message.

    Raises:
        InputError: a weight is missing, is not known, or has another shape.
    """
    wrong = set(own.keys() ^ given.keys())
    wrong |= {key for key in own.keys() & given.keys() if own[key].shape != given[key].shape}
    if wrong:
        raise InputError(
            f"ckpt_path: the checkpoint holds another {what} than the configuration ({len(wrong)} weights "
            f"differ, such as {min(wrong)}); resume with the configuration it was made with, or start anew"
        )
