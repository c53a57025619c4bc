"""Crop, chunk drop and masking: pure functions of explicit generators.

T frames, Q codebooks.
"""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from megascale.config import Section


class MaskConfig(Section):
    """Which tokens are hidden. Every kind hides the same number of tokens of each codebook: shapes stay static."""

    kind: Literal["token", "frame", "span"] = Field(
        "token", description="token: every codebook draws its own frames; frame: whole frames; span: runs of them"
    )
    ratio: float = Field(0.25, gt=0, lt=1, description="share of tokens hidden (paper: 0.25)")
    span_frames: int = Field(10, ge=1, description="span: length of a run")


class DropConfig(Section):
    """Token-chunk drop: one contiguous run of whole frames is removed from each clip of a batch."""

    p: float = Field(0.5, ge=0, le=1, description="probability that a batch is dropped from; 0 turns it off")
    min_share: float = Field(0.1, ge=0, lt=1, description="shortest run, as a share of the clip")
    max_share: float = Field(0.3, ge=0, lt=1, description="longest run, as a share of the clip")
    close_gap: bool = Field(False, description="renumber frames after the drop instead of keeping their positions")

    @model_validator(mode="after")
    def _shares_are_ordered(self) -> "DropConfig":
        if self.min_share > self.max_share:
            raise ValueError(f"min_share={self.min_share} must not be above max_share={self.max_share}")
        return self


def draw_crop(num_frames: int, crop_frames: int, rng: np.random.Generator) -> slice:
    """Return a random stretch of `crop_frames`, or the whole clip if it is no longer than that."""
    if num_frames <= crop_frames:
        return slice(0, num_frames)
    start = int(rng.integers(num_frames - crop_frames + 1))
    return slice(start, start + crop_frames)


def draw_drop_share(config: DropConfig, rng: np.random.Generator) -> float:
    """Return the share of frames that this batch loses: one draw per batch, so that its clips stay equally long."""
    dropped = rng.random() < config.p
    share = rng.uniform(config.min_share, config.max_share)
    return float(share) if dropped else 0.0


def draw_kept_frames(num_frames: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return which frames stay, int64 ascending, after one contiguous run of round(share x T) is removed."""
    length = min(round(share * num_frames), num_frames - 1)
    start = int(rng.integers(num_frames - length + 1))
    return np.concatenate([np.arange(start), np.arange(start + length, num_frames)])


def draw_mask(num_frames: int, num_codebooks: int, config: MaskConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw which tokens to hide: masked_TQ bool, True = predict.

    Each codebook hides max(1, round(ratio x T)) frames. `token` draws them for each codebook apart, `frame` the same
    for all, `span` the same for all in runs. (paper, section 3: 25% of the input tokens)
    """
    count = max(1, round(config.ratio * num_frames))
    masked_TQ = np.zeros((num_frames, num_codebooks), dtype=bool)
    if config.kind == "token":
        order_TQ = rng.random((num_frames, num_codebooks)).argsort(axis=0)
        np.put_along_axis(masked_TQ, order_TQ[:count], True, axis=0)
    elif config.kind == "frame":
        masked_TQ[rng.permutation(num_frames)[:count]] = True
    else:
        masked_TQ[_span_frames(num_frames, count, config.span_frames, rng)] = True
    return masked_TQ


def _span_frames(num_frames: int, count: int, span: int, rng: np.random.Generator) -> np.ndarray:
    """Choose exactly `count` frames in runs of `span`; the last run is shorter where it must be.

    A run that passes the end goes on at the start: else the first frames, which few runs reach, are rarely chosen.
    """
    chosen = np.zeros(num_frames, dtype=bool)
    for start in rng.permutation(num_frames):
        room = count - int(chosen.sum())
        if room == 0:
            break
        run = (start + np.arange(min(span, num_frames))) % num_frames
        chosen[run[~chosen[run]][:room]] = True
    return np.flatnonzero(chosen)
