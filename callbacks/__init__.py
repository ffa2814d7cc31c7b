"""What is written or shown."""

from callbacks.ema import EMA
from callbacks.preview import PreviewGrid
from callbacks.scores import ScoreWriter
from callbacks.synthesis import SynthesisCallback
from callbacks.weights import ExportWeights

__all__ = ["EMA", "ExportWeights", "PreviewGrid", "ScoreWriter", "SynthesisCallback"]
