"""Plain networks, without Lightning."""

from networks.miner import Miner
from networks.nnunet import NNUNet
from networks.scorer import Scorer
from networks.segmenter import Segmenter

__all__ = ["Miner", "NNUNet", "Scorer", "Segmenter"]
