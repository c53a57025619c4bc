"""Crop, chunk drop and masking of whole batches: pure functions of the clips' seeds, the same bits on every device.

B clips, T frames of the longest, Q codebooks. Lengths, which fix the shapes, are NumPy arrays on the host: a GPU is
never waited for. What is drawn is a tensor where the seeds are (`seeding.clip_seeds`, one for each clip and purpose).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from megascale import seeding
from megascale.config import Section
from megascale.errors import ConfigError

_FRAME_BITS = 20  # of the keys that frames are ordered by: clips have up to a million frames, nearly four hours
_NEVER = (1 << 63) - 1
_KEYS_AT_ONCE = 1 << 18


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


def draw_drop_share(config: DropConfig, rng: np.random.Generator) -> float:
    """Return the share of frames that this batch loses: one draw per batch, so that its clips stay equally long."""
    dropped = rng.random() < config.p
    share = rng.uniform(config.min_share, config.max_share)
    return float(share) if dropped else 0.0


def removed_frames(lengths_B: np.ndarray, share: float) -> np.ndarray:
    """Return how many frames each clip loses, int64: round(share x T), and never all of them."""
    return np.minimum(np.rint(share * lengths_B).astype(np.int64), lengths_B - 1)


def draw_starts(seeds_B: Tensor, whole_B: np.ndarray, part_B: np.ndarray) -> Tensor:
    """Return where a part of each clip begins, int64 (B,): every place where it fits is as likely."""
    return seeding.integers_below(seeds_B, on_device(whole_B - part_B + 1, seeds_B.device))


def draw_kept_frames(seeds_B: Tensor, lengths_B: np.ndarray, removed_B: np.ndarray) -> Tensor:
    """Return which frames stay after one contiguous run is removed, int64 (B, T) ascending; padding holds 0."""
    left_B = lengths_B - removed_B
    frame_T = torch.arange(int(left_B.max()), device=seeds_B.device)
    if not removed_B.any():
        kept_BT = frame_T.repeat(len(lengths_B), 1)
    else:
        gap_B1 = draw_starts(seeds_B, lengths_B, removed_B)[:, None]
        kept_BT = frame_T + (frame_T >= gap_B1) * on_device(removed_B, seeds_B.device)[:, None]
    valid_BT = valid_frames(left_B, seeds_B.device)
    return kept_BT if valid_BT is None else kept_BT * valid_BT


def valid_frames(lengths_B: np.ndarray, device: torch.device) -> Tensor | None:
    """Return which frames of a padded batch are a clip's own, bool (B, T); None where all are."""
    longest = int(lengths_B.max())
    if int(lengths_B.min()) == longest:
        return None
    return torch.arange(longest, device=device) < on_device(lengths_B, device)[:, None]


def draw_masks(seeds_B: Tensor, lengths_B: np.ndarray, num_codebooks: int, config: MaskConfig) -> Tensor:
    """Draw which tokens to hide: masked_BTQ bool, True = predict; padding is never hidden.

    Each codebook of a clip of T frames hides max(1, round(ratio x T)) frames. `token` draws them for each codebook
    apart, `frame` the same for all, `span` the same for all in runs. (paper, section 3: 25% of the input tokens)
    """
    if seeds_B.device.type != "cpu":
        return draw_masks_by_sorting(seeds_B, lengths_B, num_codebooks, config)
    drawn, counts_B = _drawn(lengths_B, num_codebooks, config)
    masked_BTQ = torch.zeros(len(lengths_B), int(lengths_B.max()), num_codebooks, dtype=torch.bool)
    for rows_R, length in _equal_rows(lengths_B, drawn):
        keys_RQT = _keys(seeds_B[rows_R], lengths_B[rows_R], drawn, config)
        smallest_RQT = choose_smallest_on_cpu(keys_RQT.numpy(), int(counts_B[rows_R][0]))
        masked_BTQ[rows_R, :length] = torch.from_numpy(smallest_RQT).transpose(1, 2)
    return masked_BTQ


def draw_masks_by_sorting(seeds_B: Tensor, lengths_B: np.ndarray, num_codebooks: int, config: MaskConfig) -> Tensor:
    """Return what `draw_masks` returns, all clips at once, whatever their lengths: right for a GPU."""
    drawn, counts_B = _drawn(lengths_B, num_codebooks, config)
    keys_BQT = _keys(seeds_B, lengths_B, drawn, config)
    smallest_BQT = choose_smallest(keys_BQT, counts_B, valid_frames(lengths_B, seeds_B.device))
    return smallest_BQT.transpose(1, 2).expand(-1, -1, num_codebooks).contiguous()


def _drawn(lengths_B: np.ndarray, num_codebooks: int, config: MaskConfig) -> tuple[int, np.ndarray]:
    """Return how many codebooks are drawn apart, and how many frames of each are hidden."""
    if int(lengths_B.max()) >= 1 << _FRAME_BITS:
        raise ConfigError(
            f"data.clip_seconds: a clip of {lengths_B.max()} frames; at most {(1 << _FRAME_BITS) - 1} can be masked"
        )
    counts_B = np.maximum(1, np.rint(config.ratio * lengths_B).astype(np.int64))
    return num_codebooks if config.kind == "token" else 1, counts_B


def _equal_rows(lengths_B: np.ndarray, num_codebooks: int) -> Iterator[tuple[np.ndarray | slice, int]]:
    """Yield a few clips of one length at a time, whose keys stay in a core's cache."""
    for length in np.unique(lengths_B).tolist():
        at_once = max(1, _KEYS_AT_ONCE // (num_codebooks * length))
        rows = np.flatnonzero(lengths_B == length)
        for first in range(0, len(rows), at_once):
            own = slice(first, first + at_once)
            yield own if len(rows) == len(lengths_B) else rows[own], length


def _keys(seeds_B: Tensor, lengths_B: np.ndarray, num_codebooks: int, config: MaskConfig) -> Tensor:
    """Return keys_BQT, int32 or int64: of each clip and codebook those frames are hidden whose keys are the smallest."""
    longest, device = int(lengths_B.max()), seeds_B.device
    if config.kind == "span":
        return _span_keys(seeds_B, lengths_B, torch.arange(longest, device=device), config.span_frames)[:, None]
    # a word of 64 bits is two keys
    word_QW = torch.arange(num_codebooks, device=device)[:, None] * (1 << _FRAME_BITS)
    word_QW = word_QW + torch.arange(-(-longest // 2), device=device)
    return seeding.random_bits(seeds_B[:, None, None], word_QW, 64).view(torch.int32)[..., :longest]


def _span_keys(seeds_B: Tensor, lengths_B: np.ndarray, frame_T: Tensor, span: int) -> Tensor:
    """Return keys_BT by which frames are taken in runs of `span`: run after run in random order, each from its start.

    A frame's key is that of the first run that holds it, and its place there, so the last run is shorter where it must
    be. A run that passes the end goes on at the start: else the first frames, which few runs reach, are rarely chosen.
    """
    length_B1 = on_device(lengths_B, seeds_B.device)[:, None]
    run_BT = seeding.random_bits(seeds_B[:, None], frame_T, 64 - 2 * _FRAME_BITS).bitwise_left_shift_(_FRAME_BITS)
    run_BT = run_BT.bitwise_or_(frame_T).bitwise_left_shift_(_FRAME_BITS)
    keys_BT = run_BT
    for place in range(1, min(span, len(frame_T))):
        keys_BT = torch.minimum(keys_BT, run_BT.gather(1, (frame_T - place) % length_B1) | place)
    return keys_BT


def choose_smallest(keys_BQT: Tensor, counts_B: np.ndarray, valid_BT: Tensor | None) -> Tensor:
    """Return where a row's counts-th smallest key and the smaller ones are, bool (B, Q, T).

    Args:
        keys_BQT: int32, of which of equal ones the first are taken, or int64 that differ.
        counts_B: int64.
        valid_BT: False where keys are padding, which is never taken.
    """
    if keys_BQT.dtype == torch.int32:
        frame_T = torch.arange(keys_BQT.shape[-1], device=keys_BQT.device)
        keys_BQT = keys_BQT.long().bitwise_left_shift_(_FRAME_BITS).bitwise_or_(frame_T)
    if valid_BT is not None:
        keys_BQT = keys_BQT.masked_fill(~valid_BT[:, None], _NEVER)
    place_BQ1 = on_device(counts_B - 1, keys_BQT.device)[:, None, None].expand(-1, keys_BQT.shape[1], 1)
    return keys_BQT <= keys_BQT.sort(dim=-1).values.gather(-1, place_BQ1)


def choose_smallest_on_cpu(keys_BQT: np.ndarray, count: int) -> np.ndarray:
    """Return what `choose_smallest` returns, where every row has the same count: several times faster than a sort."""
    nth_BQ1 = np.partition(keys_BQT, count - 1, axis=-1)[..., count - 1 : count]
    smallest = keys_BQT <= nth_BQ1
    if np.count_nonzero(smallest) > nth_BQ1.size * count:
        equal = keys_BQT == nth_BQ1
        wanted_BQ1 = count - (smallest ^ equal).sum(axis=-1, keepdims=True)
        smallest &= ~equal | (equal.cumsum(axis=-1) <= wanted_BQ1)
    return smallest


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Move a small array to a device without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
