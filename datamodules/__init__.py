"""What is read: labelled images, masks to synthesise from, and the sources of both."""

from datamodules.conditions import ConditionDataModule
from datamodules.seg import SegDataModule

__all__ = ["ConditionDataModule", "SegDataModule"]
