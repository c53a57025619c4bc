"""Recordings, as a corpus lists them, and the clips they are cut to; a clip's key tells its file and where it begins."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field

from megascale.config import Section
from megascale.tokenize.streams import is_stream


class ClipsConfig(Section):
    """How recordings are cut. Codes depend on where audio is cut, so this is recorded in the manifest."""

    seconds: float | None = Field(10.0, gt=0, description="length of a clip; null keeps each recording whole")
    min_seconds: float = Field(1.0, ge=0, description="a shorter rest at a recording's end is left out")
    max_seconds: float = Field(
        600.0,
        gt=0,
        description="a longer clip is quarantined; a worker holds up to 50 (at batch_clips=8), 0.1 MB a second each",
    )


@dataclass(frozen=True)
class Recording:
    """One audio file, or a stretch of one, as the corpus lists it."""

    url: str
    source: str  # path relative to the corpus root
    labels: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None  # None: to the end


@dataclass(frozen=True)
class Clip:
    """One piece of audio that becomes one training sample."""

    key: str
    url: str
    source: str
    recording: str  # clips cut from one recording share it, so that windows can be averaged
    start_seconds: float
    duration_seconds: float | None
    labels: Mapping[str, Any]
    split: str | None


def cut(recording: Recording, total_seconds: float | None, config: ClipsConfig) -> list[Clip]:
    """Cut a recording to clips.

    Args:
        recording: what to cut.
        total_seconds: the file's length; needed when clips have a length and the recording has none.
        config: the cut policy.

    Returns:
        At least one clip. A recording shorter than `min_seconds` is kept whole: only a rest is left out. An `.ecdc`
        stream is kept whole too.
    """
    if is_stream(recording.url):
        return [_clip(recording, 0.0, total_seconds)]
    duration = recording.duration_seconds
    if config.seconds is None:
        return [_clip(recording, recording.start_seconds, duration)]
    if duration is None:
        assert total_seconds is not None, "cutting needs the file's length"
        duration = total_seconds - recording.start_seconds
    count = max(1, math.floor(duration / config.seconds + 1e-9))
    rest = duration - count * config.seconds
    lengths = [min(config.seconds, duration)] * count + ([rest] if rest >= max(config.min_seconds, 1e-3) else [])
    return [_clip(recording, recording.start_seconds + i * config.seconds, n) for i, n in enumerate(lengths)]


def _clip(recording: Recording, start: float, duration: float | None) -> Clip:
    whole = _key(recording.source, recording.start_seconds)
    key = whole if start == recording.start_seconds else _key(recording.source, start)
    labels, split = recording.labels, recording.split
    return Clip(key, recording.url, recording.source, whole, round(start, 6), duration, labels, split)


def _key(source: str, start_seconds: float) -> str:
    # WebDataset splits a member's name at the first dot and at slashes; the hash keeps look-alikes apart
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(source).stem)[:60]
    digest = hashlib.sha256(f"{source}\n{start_seconds:.6f}".encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem}-{digest[:12]}"
