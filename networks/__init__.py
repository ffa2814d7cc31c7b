"""Plain networks, without Lightning."""

from networks.miner import Miner
from networks.nnunet import NNUNet
from networks.segmenter import Segmenter

__all__ = ["Miner", "NNUNet", "Segmenter"]
