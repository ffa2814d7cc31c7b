"""What is read: labelled images, masks to synthesise from, and the sources of both."""

from datamodules.conditions import ConditionDataModule
from datamodules.scored import ScoredDataModule
from datamodules.seg import SegDataModule

__all__ = ["ConditionDataModule", "ScoredDataModule", "SegDataModule"]
