"""What is read: labelled images, masks to synthesise from, and the sources of both."""

from datamodules.conditions import ConditionDataModule, GlanceDataModule
from datamodules.scored import ScoredDataModule
from datamodules.seg import SegDataModule

__all__ = ["ConditionDataModule", "GlanceDataModule", "ScoredDataModule", "SegDataModule"]
