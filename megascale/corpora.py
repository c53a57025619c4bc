"""Procedural audio corpora in the on-disk layouts of GTZAN, NSynth and GTZAN music/speech.

They let the real readers, codec, pretraining and fine-tuning run with nothing downloaded. They are NOT those datasets:
every sound is synthesised here, and scores on them say nothing of scores on the real ones.
"""

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from pydantic import Field

from megascale import synthesis
from megascale.config import Section

_CHUNK_CLIPS = 8
_NOTES_PER_INSTRUMENT = 2
_NSYNTH_SPLITS = ("train", "valid", "test")


class CorpusSizes(Section):
    """How many clips of which length (seconds) each corpus holds. They are NOT the datasets whose layouts they have,
    and scores on them say nothing of the real ones."""

    pretrain_clips: int = Field(300, gt=0, description="clips without labels")
    pretrain_seconds: float = Field(3.0, ge=0.1, description="length of each")
    gtzan_per_genre: int = Field(16, gt=0, description="songs of each of the 10 genres")
    gtzan_seconds: float = Field(3.0, ge=0.1, description="length of each")
    nsynth_train_per_family: int = Field(18, gt=0, description="training notes of each of the 11 instrument families")
    nsynth_valid_per_family: int = Field(5, gt=0, description="notes that choose the model, of each of 10 families")
    nsynth_test_per_family: int = Field(8, gt=0, description="notes that are tested, of each of 10 families")
    nsynth_seconds: float = Field(1.5, ge=0.1, description="length of each")
    music_speech_per_class: int = Field(20, gt=0, description="clips of music, and as many of speech")
    music_speech_seconds: float = Field(3.0, ge=0.1, description="length of each")


@dataclass(frozen=True)
class _Clip:
    path: Path
    corpus: str
    sample_rate_hz: int
    seconds: float


def write_corpora(
    root: Path, sizes: CorpusSizes, seed: int, num_processes: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `pretrain/`, `gtzan/`, `nsynth/` and `music_speech/` under `root`.

    They are NOT the datasets whose layouts they have, and scores on them say nothing of the real ones. Audio that
    exists is left as it is, so an interrupted run goes on; give another seed or other sizes another root.

    Args:
        root: folder to write to; made if it is missing.
        sizes: counts, and lengths in seconds.
        seed: a file's samples depend only on this, its corpus, its name and its length.
        num_processes: renderers; 1 renders in this process. More are spawned, so a script needs its `__main__` guard.
        progress: called with the number of clips that exist and of all clips, at the start and as they are rendered.

    Raises:
        ValueError: `num_processes` is not above 0.
        OSError: a file cannot be written.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes must be above 0: {num_processes}")
    clips = list(_unlisted_clips(Path(root), sizes))
    for split in _NSYNTH_SPLITS:
        examples = _nsynth_examples(split, getattr(sizes, f"nsynth_{split}_per_family"), seed)
        folder = Path(root) / "nsynth" / f"nsynth-{split}"
        clips += [_Clip(folder / "audio" / f"{n}.wav", "nsynth", 16000, sizes.nsynth_seconds) for n in examples]
        index, text = folder / "examples.json", json.dumps(examples, indent=1).encode()
        if not index.exists() or index.read_bytes() != text:
            _write(index, text)
    missing = [clip for clip in clips if not clip.path.exists()]
    done = len(clips) - len(missing)
    report = progress or (lambda done, total: None)
    report(done, len(clips))
    for count in _render_all(missing, seed, num_processes):
        done += count
        report(done, len(clips))


def _unlisted_clips(root: Path, sizes: CorpusSizes) -> Iterator[_Clip]:
    for i in range(sizes.pretrain_clips):
        yield _Clip(root / "pretrain" / f"clip-{i:05d}.wav", "pretrain", 22050, sizes.pretrain_seconds)
    for genre in synthesis.GENRES:
        for i in range(sizes.gtzan_per_genre):
            path = root / "gtzan" / "genres" / genre / f"{genre}.{i:05d}.wav"
            yield _Clip(path, "gtzan", 22050, sizes.gtzan_seconds)
    for name in ("music", "speech"):
        for i in range(sizes.music_speech_per_class):
            path = root / "music_speech" / f"{name}_wav" / f"{name}{i:03d}.wav"
            yield _Clip(path, "music_speech", 22050, sizes.music_speech_seconds)


def _nsynth_examples(split: str, per_family: int, seed: int) -> dict[str, dict[str, Any]]:
    split_id = _NSYNTH_SPLITS.index(split)
    examples: dict[str, dict[str, Any]] = {}
    for family_id, (family_name, family) in enumerate(synthesis.FAMILIES.items()):
        if family_name == "synth_lead" and split != "train":
            continue  # as in NSynth
        for i in range(per_family):
            source = family.sources[i // _NOTES_PER_INSTRUMENT % len(family.sources)]
            number = i // _NOTES_PER_INSTRUMENT * 3 + split_id  # no instrument is in two splits
            instrument = f"{family_name}_{source}_{number:03d}"
            rng = _generator(seed, "nsynth note", instrument, i)
            pitch, velocity = int(rng.integers(*family.pitch)), int(rng.choice(synthesis.VELOCITIES))
            while (note := f"{instrument}-{pitch:03d}-{velocity:03d}") in examples:
                pitch += 1
            examples[note] = {
                "note": (i * 11 + family_id) * 3 + split_id,
                "note_str": note,
                "instrument": number * 11 + family_id,
                "instrument_str": instrument,
                "pitch": pitch,
                "velocity": velocity,
                "sample_rate": 16000,
                "instrument_family": family_id,
                "instrument_family_str": family_name,
                "instrument_source": synthesis.SOURCES.index(source),
                "instrument_source_str": source,
                "qualities": [0] * 10,
                "qualities_str": [],
            }
    return examples


def _generator(seed: int, *ids: int | str) -> np.random.Generator:
    # megascale.seeding does the same, but its torch import would cost each spawned renderer seconds
    digest = hashlib.blake2b(repr((seed, "corpora", ids)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def _render_all(clips: list[_Clip], seed: int, num_processes: int) -> Iterator[int]:
    chunks = [clips[i : i + _CHUNK_CLIPS] for i in range(0, len(clips), _CHUNK_CLIPS)]
    if num_processes == 1 or not chunks:
        yield from (_render_chunk(chunk, seed) for chunk in chunks)
        return
    # spawn, because the caller may hold threads (torch, Ray) that a fork would break
    pool = ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_render_chunk, chunk, seed) for chunk in chunks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _render_chunk(clips: list[_Clip], seed: int) -> int:
    for clip in clips:
        file = io.BytesIO()
        soundfile.write(file, _render(clip, seed), clip.sample_rate_hz, subtype="PCM_16", format="WAV")
        _write(clip.path, file.getvalue())
    return len(clips)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _render(clip: _Clip, seed: int) -> np.ndarray:
    rng = _generator(seed, clip.corpus, clip.path.name)
    seconds, rate = clip.seconds, clip.sample_rate_hz
    if clip.corpus == "pretrain":
        samples = synthesis.make_mixture(rng, int(clip.path.stem.removeprefix("clip-")), seconds, rate)
    elif clip.corpus == "gtzan":
        samples = synthesis.make_song(rng, clip.path.name.split(".")[0], seconds, rate)
    elif clip.corpus == "nsynth":
        name, pitch, velocity = clip.path.stem.rsplit("-", 2)
        instrument = synthesis.draw_instrument(_generator(seed, "nsynth instrument", name), name.rsplit("_", 2)[0])
        samples = synthesis.make_note(rng, instrument, int(pitch), int(velocity), 0.8 * seconds, seconds, rate)
    elif clip.path.stem.startswith("speech"):
        samples = synthesis.make_speech(rng, seconds, rate)
    else:
        samples = synthesis.make_song(
            rng, str(rng.choice(list(synthesis.GENRES))), seconds, rate, sung=rng.random() < 0.3
        )
    peak = np.abs(samples).max() or 1.0
    # recordings have a noise floor, and a codec's tokens for digital silence would be one constant
    samples = samples / peak + 10 ** (rng.uniform(-66, -56) / 20) * synthesis.make_noise(
        rng, len(samples), rate, 40, 6000
    )
    return samples / np.abs(samples).max() * 10 ** (rng.uniform(-12, -1) / 20)
