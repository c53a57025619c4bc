"""Learning-rate schedules, as factors of the peak."""

import math
from typing import Literal

from pydantic import Field, field_validator

from megascale.config import Section


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's averaging factors")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decay, on matrices only")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    schedule: Literal["cosine", "trapezoid"] = Field("cosine", description="after warmup: cosine, or flat then linear")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate rises linearly")
    decay_share: float = Field(0.2, gt=0, le=1, description="trapezoid: share of the steps over which it falls to 0")
    final_share: float = Field(0.1, ge=0, le=1, description="cosine: where it ends, as a share of the peak")

    @field_validator("betas")
    @classmethod
    def _are_averaging_factors(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must lie in 0..1, 1 left out")
        return betas


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step 0..num_steps-1 as a share of `optim.lr`."""
    warmup = round(config.warmup_share * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "trapezoid":
        return min(1.0, (num_steps - step) / max(1, round(config.decay_share * num_steps)))
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
