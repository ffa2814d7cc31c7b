"""How generators are optimised."""

from typing import Any

from diffusers.optimization import get_cosine_schedule_with_warmup
from lightning.pytorch.utilities.types import OptimizerLRScheduler


def cosine(optimizer: Any, warmup_steps: int, total_steps: int) -> OptimizerLRScheduler:
    """Return what Lightning needs for linear warm-up, of a tenth of all steps at most, and cosine decay."""
    warmup = min(warmup_steps, total_steps // 10)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
