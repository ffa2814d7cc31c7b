"""What is optimised: one LightningModule a stage."""

from lightning_modules.autoencoder import AutoencoderLitModule
from lightning_modules.diffusion import DiffusionLitModule
from lightning_modules.miner import MinerLitModule
from lightning_modules.scorer import ScorerLitModule
from lightning_modules.seg import SegLitModule
from lightning_modules.synthesis import SynthesisLitModule

__all__ = [
    "AutoencoderLitModule",
    "DiffusionLitModule",
    "MinerLitModule",
    "ScorerLitModule",
    "SegLitModule",
    "SynthesisLitModule",
]
