"""Frozen mask-to-image diffusion models, a file each."""

from diffusion.backbones.backbone import Backbone, TrainingBatch
from diffusion.backbones.segdiff import SegDiff

__all__ = ["Backbone", "SegDiff", "TrainingBatch"]
