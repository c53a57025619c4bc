"""Small real inputs for tests: audio files, and token folders written by the package's own writers."""

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from megascale import storage
from megascale.data.index import MANIFEST, CodecFacts, Manifest, ShardFacts
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer
from megascale.seeding import torch_generator
from megascale.tokenize.clips import Clip, Recording
from megascale.tokenize.shards import EncodedClip, build_shard, plan_shards, publish_shard
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokens import FRAMES_PER_SECOND, SAMPLES_PER_FRAME, model_name
from megascale.train.checkpoint import write_model

FINGERPRINT = "ab" * 32


def tone(seconds: float, rate_hz: int, pitch_hz: float, seed: int = 0) -> np.ndarray:
    """A decaying tone in a little noise, float32."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.5 * np.sin(2 * np.pi * pitch_hz * time) * np.exp(-time) + 0.02 * noise).astype(np.float32)


def write_tones(folder: Path, count: int, seconds: float = 2.0, rate_hz: int = 22_050) -> list[Path]:
    """Write `count` tones of two classes, `low/` and `high/`, as 16-bit WAV."""
    paths = []
    for i in range(count):
        name = ("low", "high")[i % 2]
        path = folder / name / f"{name}-{i:03d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        pitch_hz = (150 if i % 2 == 0 else 1500) * (1 + 0.02 * i)
        soundfile.write(path, tone(seconds, rate_hz, pitch_hz, seed=i), rate_hz, subtype="PCM_16")
        paths.append(path)
    return paths


def write_token_folder(
    folder: Path,
    num_clips: int,
    num_codebooks: int = 2,
    frames: int | Sequence[int] = 75,
    clips_per_shard: int = 8,
    fingerprint: str = FINGERPRINT,
    codes: np.ndarray | None = None,
    clips_per_recording: int = 1,
    labels: Callable[[int], dict[str, object]] = lambda i: {"class": ("low", "high")[i % 2]},
    audio: str = "/nowhere",
) -> list[np.ndarray]:
    """Write a committed token folder of two classes and three splits; return each clip's codes_QT in order.

    Codes are random, or `codes` (num_clips, Q, T); `frames` may be each clip's own.
    Clip i is labelled `class` = low or high by i % 2, or as `labels` says, and its audio is said to lie at `audio`/000i.wav.
    """
    rng = np.random.default_rng(7)
    lengths = [frames] * num_clips if isinstance(frames, int) else list(frames)
    clips = [
        Clip(
            key=f"clip-{i:04d}",
            url=f"{audio}/{i:04d}.wav",
            source=f"{i:04d}.wav",
            recording=f"recording-{i // clips_per_recording:04d}",
            start_seconds=0.0,
            duration_seconds=lengths[i] / FRAMES_PER_SECOND,
            labels=labels(i),
            split=("train", "train", "train", "train", "valid", "valid", "test", "test")[i % 8],
        )
        for i in range(num_clips)
    ]
    if codes is None:
        made = [rng.integers(0, 1024, (num_codebooks, length)) for length in lengths]
    else:
        made, num_codebooks = list(codes), codes.shape[1]
    name = model_name(fingerprint, published=False)
    shards = []
    for plan in plan_shards(clips, clips_per_shard):
        first = plan.number * clips_per_shard
        encoded = [
            EncodedClip(c, made[first + i], lengths[first + i] * SAMPLES_PER_FRAME) for i, c in enumerate(plan.clips)
        ]
        data, index = build_shard(plan, encoded, [], name, fingerprint)
        publish_shard(str(folder), data, index)
        shards.append(ShardFacts(name=index.shard, clips=len(index.clips), sha256=index.sha256, size=index.size))
    manifest = Manifest(
        codec=CodecFacts(name=name, fingerprint=fingerprint, origin="test", num_codebooks=num_codebooks),
        source={"kind": "files", "url": audio},
        cut={"seconds": None},
        environment={},
        shards=shards,
        num_clips=num_clips,
        num_quarantined=0,
        seconds=sum(lengths) / FRAMES_PER_SECOND,
    )
    storage.publish_bytes(str(folder / MANIFEST), manifest.model_dump_json().encode())
    return made


def write_paced_tokens(
    folder: Path, num_clips: int, num_codebooks: int = 16, fingerprint: str = FINGERPRINT, **options: object
) -> None:
    """Write a token folder that can be learned: a clip counts up from its start, `low` clips by 3 and `high` ones by 7."""
    rng = np.random.default_rng(11)
    start_N = rng.integers(0, 64, num_clips)
    pace_N = np.where(np.arange(num_clips) % 2 == 0, 3, 7)
    codes_NT = (start_N[:, None] + pace_N[:, None] * np.arange(75)) % 64
    codes_NQT = np.stack([(codes_NT + 11 * q) % 64 for q in range(num_codebooks)], axis=1)
    write_token_folder(folder, num_clips, fingerprint=fingerprint, codes=codes_NQT, **options)  # type: ignore[arg-type]


def write_pretrained(folder: Path, num_codebooks: int, fingerprint: str = FINGERPRINT, seed: int = 0) -> None:
    """Write the `model/` of a tiny pretrained encoder with first weights."""
    config = ModelConfig(layers=1, width=32, heads=2, mlp_width=64, local_layers=1, local_width=16, local_heads=1)
    model = MegaAudioFormer(config, num_codebooks, torch_generator(seed, "test"))
    name = model_name(fingerprint, published=False)
    codec = CodecFacts(name=name, fingerprint=fingerprint, origin="test", num_codebooks=16)
    facts = {"model": config.model_dump(), "num_codebooks": num_codebooks, "codec": codec.model_dump()}
    write_model(folder, {k: v.detach().clone() for k, v in model.named_parameters()}, facts)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(kind: str, url: Path | str, **options: object) -> list[Recording]:
    """List a corpus of one of the kinds."""
    return list_recordings(SourceConfig(kind=kind, url=str(url), **options))[0]  # type: ignore[arg-type]


def sources(recordings: list[Recording]) -> list[str]:
    return [r.source for r in recordings]


def without_place(recordings: list[Recording]) -> list[tuple[object, ...]]:
    return [(r.source, dict(r.labels), r.split, r.start_seconds, r.duration_seconds) for r in recordings]


def write_list(folder: Path, text: str | bytes, name: str = "clips.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes of a file, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
