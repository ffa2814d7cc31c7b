"""Frozen mask-to-image diffusion models, a file each."""

from diffusion.backbones.backbone import Backbone, TrainingBatch
from diffusion.backbones.controlldm import ControlLDM
from diffusion.backbones.segdiff import SegDiff
from diffusion.backbones.siamesediff import SiameseDiff

__all__ = ["Backbone", "ControlLDM", "SegDiff", "SiameseDiff", "TrainingBatch"]
