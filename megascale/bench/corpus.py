"""A token folder of random codes, for benchmarks: as slow to read and to train on as any."""

from pathlib import Path

import numpy as np

from megascale import seeding, storage
from megascale.data.index import MANIFEST, CodecFacts, Manifest, ShardFacts
from megascale.tokenize.clips import Clip
from megascale.tokenize.shards import EncodedClip, build_shard, plan_shards, publish_shard
from megascale.tokens import FRAMES_PER_SECOND, SAMPLES_PER_FRAME, model_name

_FINGERPRINT = "0" * 64  # of no codec


def write_tokens(
    folder: Path, num_codebooks: int, num_clips: int, num_frames: int, clips_per_shard: int
) -> list[tuple[str, np.ndarray]]:
    """Write a token folder; return the key and codes_QT of every clip, in the order of the shards."""
    rng = seeding.generator(0, "bench tokens", num_codebooks)
    clips = [
        Clip(f"clip-{i:08d}-0123456789ab", "", f"{i:08d}.wav", f"recording-{i:08d}", 0.0, None, {}, None)
        for i in range(num_clips)
    ]
    name, shards, written = model_name(_FINGERPRINT, published=False), [], []
    for plan in plan_shards(clips, clips_per_shard):
        made = rng.integers(0, 1024, (len(plan.clips), num_codebooks, num_frames), dtype=np.int16)
        encoded = [EncodedClip(clip, made[i], num_frames * SAMPLES_PER_FRAME) for i, clip in enumerate(plan.clips)]
        data, index = build_shard(plan, encoded, [], name, _FINGERPRINT)
        publish_shard(str(folder), data, index)
        shards.append(ShardFacts(name=index.shard, clips=len(index.clips), sha256=index.sha256, size=index.size))
        written += [(clip.key, made[i]) for i, clip in enumerate(plan.clips)]
    manifest = Manifest(
        codec=CodecFacts(name=name, fingerprint=_FINGERPRINT, origin="random codes", num_codebooks=num_codebooks),
        source={},
        cut={},
        environment={},
        shards=shards,
        num_clips=num_clips,
        num_quarantined=0,
        seconds=num_clips * num_frames / FRAMES_PER_SECOND,
    )
    storage.publish_bytes(str(folder / MANIFEST), manifest.model_dump_json().encode())
    return written
