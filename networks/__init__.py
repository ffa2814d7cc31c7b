"""Plain networks, without Lightning."""

from networks.miner import Miner
from networks.nnunet import NNUNet
from networks.scorer import Scorer
from networks.segmenter import Segmenter
from networks.swin_unet import SwinUnet

__all__ = ["Miner", "NNUNet", "Scorer", "Segmenter", "SwinUnet"]
