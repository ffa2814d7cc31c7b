"""What is written or shown."""

from callbacks.ema import EMA
from callbacks.folder import FolderWriter
from callbacks.predictions import PredictionWriter
from callbacks.preview import PreviewGrid
from callbacks.scores import ScoreWriter
from callbacks.synthesis import SynthesisCallback
from callbacks.weights import ExportWeights

__all__ = [
    "EMA",
    "ExportWeights",
    "FolderWriter",
    "PredictionWriter",
    "PreviewGrid",
    "ScoreWriter",
    "SynthesisCallback",
]
