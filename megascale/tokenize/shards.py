"""Shards: planned from the sorted clip list, written as reproducible tars with an index.

A shard's bytes depend on its clips and the codec alone: fixed order, mtime 0, uid 0, and nothing about the machine.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from megascale import storage
from megascale.data.index import Member, Quarantined, ShardIndex, broken, index_name
from megascale.errors import DataError
from megascale.tokenize.clips import Clip
from megascale.tokens import num_frames, write_ecdc


@dataclass(frozen=True)
class ShardPlan:
    """One unit of work: the shard's number and its clips, in order."""

    number: int
    clips: list[Clip]

    @property
    def name(self) -> str:
        return f"tokens-{self.number:06d}.tar"


@dataclass(frozen=True)
class EncodedClip:
    """A clip with its codes: codes_QT integer 0..1023, and its length in samples at 24 kHz."""

    clip: Clip
    codes_QT: np.ndarray
    audio_samples: int


def plan_shards(clips: Sequence[Clip], clips_per_shard: int) -> list[ShardPlan]:
    """Cut the sorted clip list into shards. Raises DataError if two clips share a key."""
    seen: dict[str, Clip] = {}
    for clip in clips:
        other = seen.setdefault(clip.key, clip)
        if other is not clip:
            raise DataError(f"{clip.source} at {clip.start_seconds} s: listed twice (key {clip.key})")
    starts = range(0, len(clips), clips_per_shard)
    return [ShardPlan(n, list(clips[i : i + clips_per_shard])) for n, i in enumerate(starts)]


def build_shard(
    plan: ShardPlan, encoded: Sequence[EncodedClip], bad: list[Quarantined], codec_name: str, fingerprint: str
) -> tuple[bytes, ShardIndex]:
    """Build a shard's tar and its index in memory (1,000 clips of 10 s take 16 MB at 12 kbps)."""
    buffer = io.BytesIO()
    members = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for item in encoded:
            stream = write_ecdc(item.codes_QT, item.audio_samples, codec_name)
            offset = _add(tar, f"{item.clip.key}.ecdc", stream)
            frames = num_frames(item.audio_samples)
            key, recording = item.clip.key, item.clip.recording
            members.append(Member(key=key, recording=recording, offset=offset, size=len(stream), frames=frames))
            _add(tar, f"{item.clip.key}.json", json.dumps(_describe(item.clip), sort_keys=True).encode())
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    index = ShardIndex(
        shard=plan.name, sha256=digest, size=len(data), codec=fingerprint, clips=members, quarantined=bad
    )
    return data, index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 by default
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset


def _describe(clip: Clip) -> dict[str, Any]:
    # no URL: the bytes must be the same for the same corpus on a disk and in a bucket
    facts = asdict(clip)
    del facts["url"], facts["key"]
    return facts


def publish_shard(url: str, data: bytes, index: ShardIndex) -> None:
    """Publish the tar, then the index that commits it. Two writers publish the same bytes, so either may win.

    The index of a tar that was lost is replaced if it does not fit the new tar: another machine may round otherwise.
    """
    storage.publish_bytes(storage.join(url, index.shard), data)
    where, content = storage.join(url, index_name(index.shard)), index.model_dump_json().encode()
    if not storage.publish_bytes(where, content, create_only=True) and storage.read_bytes(where) != content:
        storage.publish_bytes(storage.join(url, index.shard), data)  # again, because the other's may be the later one
        storage.publish_bytes(where, content)


def read_committed(url: str, shard: ShardPlan, fingerprint: str) -> ShardIndex | None:
    """Read the index of a committed shard.

    None if the shard has none, if it is another codec's or holds other clips than planned, or if its tar is missing or
    of another size. Raises DataError if the index is broken.
    """
    where = storage.join(url, index_name(shard.name))
    if not storage.exists(where):
        return None
    try:
        index = ShardIndex.model_validate_json(storage.read_bytes(where))
    except ValidationError as failure:
        raise DataError(f"{broken(where, failure)}; delete it and run the same command again") from None
    held = {member.key for member in index.clips} | {bad.key for bad in index.quarantined}
    if index.codec != fingerprint or held != {clip.key for clip in shard.clips}:
        return None
    return index if storage.size(storage.join(url, shard.name)) == index.size else None
