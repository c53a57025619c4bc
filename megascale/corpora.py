"""Procedural audio corpora in the on-disk layouts of GTZAN, NSynth and GTZAN music/speech.

They let the real readers, codec, pretraining and fine-tuning run with nothing downloaded. They are NOT those datasets:
every sound is synthesised here, and scores on them say nothing of scores on the real ones.
"""

import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

Range = tuple[float, float]
_CHUNK_CLIPS = 16
_NOTES_PER_INSTRUMENT = 3
_TEXTURE_EVERY = 10  # every tenth pretrain clip is environmental noise
_VELOCITIES = (25, 50, 75, 100, 127)
_QUALITIES = ("bright", "dark", "distortion", "fast_decay", "long_release", "multiphonic", "nonlinear_env",
              "percussive", "reverb", "tempo-synced")  # fmt: skip


@dataclass(frozen=True)
class CorpusSizes:
    """How many clips of which length (seconds) each corpus holds. They are NOT the datasets whose layouts they have,
    and scores on them say nothing of the real ones."""

    pretrain_clips: int = 300
    pretrain_seconds: float = 3.0
    gtzan_per_genre: int = 16
    gtzan_seconds: float = 3.0
    nsynth_train_per_family: int = 18
    nsynth_valid_per_family: int = 5
    nsynth_test_per_family: int = 8
    nsynth_seconds: float = 1.5
    music_speech_per_class: int = 20
    music_speech_seconds: float = 3.0


@dataclass(frozen=True)
class _Clip:
    path: Path
    corpus: str
    sample_rate_hz: int
    seconds: float


@dataclass(frozen=True)
class _Family:
    pitch: Range  # MIDI numbers
    tilt_db: Range  # per octave above the fundamental
    even: Range  # gain of the even partials
    attack_seconds: Range
    decay_per_second: Range
    upper_decay: Range  # more decay per second for each partial number
    upper_attack: Range  # longer attack, as a share, for each partial number
    vibrato_cents: Range
    tremolo: Range
    noise_db: Range
    fm: Range
    formants_hz: tuple[tuple[float, ...], ...]  # one set is drawn per instrument
    partials: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class _Instrument:
    ratios_K: np.ndarray
    gains_K: np.ndarray
    attack_seconds_K: np.ndarray
    decay_per_second_K: np.ndarray
    release_seconds: float
    formants_hz: tuple[float, ...]
    formant_gain: float
    vibrato_hz: float
    vibrato_cents: float
    tremolo: float
    noise: float
    fm: float
    drive: float


@dataclass(frozen=True)
class _Genre:
    tempo_bpm: Range
    swing: Range  # steps by which the off-beat eighths come late
    # one bar of sixteenths each; a digit is the chance, in ninths, that the step sounds
    kick: str
    snare: str
    hat: str
    bass: str
    chord: str
    lead: str
    hat_seconds: Range
    chord_steps: Range  # how long a chord sounds
    intervals: tuple[tuple[int, ...], ...]
    bass_moves: tuple[int, ...]  # semitones above the root that a bass note may take
    chord_families: tuple[str, ...]
    lead_families: tuple[str, ...]
    levels_db: tuple[float, float, float, float]  # drums, bass, chords, lead
    drive: Range
    tilt_db: Range  # per octave, of the whole mix


_ANY, _VOWELS = ((),), ((730.0, 1090.0, 2440.0), (270.0, 2290.0, 3010.0), (300.0, 870.0, 2240.0),
                        (530.0, 1840.0, 2480.0), (570.0, 840.0, 2410.0), (490.0, 1350.0, 1690.0))  # fmt: skip
_PLAYED, _ALL = ("acoustic", "electronic"), ("acoustic", "electronic", "synthetic")
_FAMILIES = {
    "bass": _Family((26, 62), (-13, -6), (0.6, 1), (0.003, 0.02), (0.4, 3), (0.2, 1), (0, 0), (0, 4), (0, 0.05),
                    (-60, -40), (0, 0.3), _ANY, "stretched", ("electronic", "synthetic")),
    "brass": _Family((42, 82), (-8, -3), (0.7, 1), (0.02, 0.08), (0, 0.4), (0, 0.05), (0.1, 0.5), (0, 15), (0, 0.1),
                     (-50, -32), (0, 0), ((1100.0,), (1500.0,), (800.0, 2200.0)), "harmonic", ("acoustic",)),
    "flute": _Family((52, 92), (-18, -9), (0.4, 1), (0.03, 0.12), (0, 0.4), (0, 0.1), (0, 0.1), (5, 25), (0.03, 0.25),
                     (-36, -18), (0, 0), _ANY, "harmonic", ("acoustic", "synthetic")),
    "guitar": _Family((36, 84), (-10, -3), (0.5, 1), (0.002, 0.01), (0.6, 4), (0.1, 0.8), (0, 0), (0, 8), (0, 0.03),
                      (-55, -35), (0, 0), ((220.0,), (110.0, 420.0), (2500.0,)), "stretched", _PLAYED),
    "keyboard": _Family((30, 94), (-13, -5), (0.5, 1), (0.002, 0.012), (0.4, 3.5), (0.05, 0.6), (0, 0), (0, 3),
                        (0, 0.2), (-60, -40), (0, 0.8), _ANY, "stretched", _ALL),
    "mallet": _Family((42, 96), (-11, -3), (0.6, 1), (0.001, 0.006), (1, 8), (0.2, 2), (0, 0), (0, 2), (0, 0.3),
                      (-50, -28), (0, 0), _ANY, "bars", ("acoustic", "synthetic")),
    "organ": _Family((34, 92), (-6, 0), (0.6, 1), (0.004, 0.04), (0, 0.1), (0, 0), (0, 0), (0, 10), (0, 0.25),
                     (-60, -38), (0, 0.2), _ANY, "drawbars", _PLAYED),
    "reed": _Family((42, 88), (-10, -3), (0.1, 0.6), (0.015, 0.07), (0, 0.4), (0, 0.1), (0, 0.15), (0, 18), (0, 0.12),
                    (-46, -26), (0, 0), ((1400.0,), (900.0, 2600.0), ()), "harmonic", ("acoustic",)),
    "string": _Family((36, 92), (-9, -3), (0.7, 1), (0.05, 0.3), (0, 0.8), (0, 0.1), (0, 0.05), (5, 25), (0, 0.12),
                      (-44, -26), (0, 0), ((280.0, 1000.0), (450.0, 2800.0), (600.0,)), "harmonic",
                      ("acoustic", "acoustic", "synthetic")),
    "synth_lead": _Family((34, 92), (-7, -1), (0.1, 1), (0.002, 0.04), (0, 1), (0, 0.3), (0, 0.1), (0, 30), (0, 0.2),
                          (-70, -45), (0, 2.5), _ANY, "harmonic", ("synthetic",)),
    "vocal": _Family((42, 82), (-11, -5), (0.7, 1), (0.03, 0.14), (0, 0.4), (0, 0.05), (0, 0.05), (8, 40), (0, 0.15),
                     (-48, -28), (0, 0), _VOWELS, "harmonic", ("acoustic", "synthetic")),
}  # fmt: skip

_MAJOR, _MINOR, _POWER = (0, 4, 7), (0, 3, 7), (0, 7, 12)
_SEVENTHS = ((0, 4, 7, 11), (0, 3, 7, 10), (0, 4, 10, 14))
_BACK_BEAT, _EIGHTHS = "....9.......9...", "9.9.9.9.9.9.9.9."
_GENRES = {
    "blues": _Genre((70, 125), (0.35, 0.67), "9...2.2.9...2...", "....9......19...", "9.7.9.7.9.7.9.7.",
                    "9.5.9.5.9.5.9.5.", "9.....3.9.....3.", "4.4.4.4.4.4.4.4.", (0.03, 0.1), (2, 8), ((0, 4, 10), _MAJOR),
                    (0, 4, 7, 9), ("guitar", "keyboard", "organ"), ("guitar", "reed", "vocal"), (-3, -3, -5, 0),
                    (0.3, 2.5), (-3, 0.5)),
    "classical": _Genre((60, 130), (0, 0), "." * 16, "." * 16, "." * 16, "9.......5.......", "9.......6...2...",
                        "6...6.3.6...6.3.", (0.03, 0.05), (8, 16), (_MAJOR, _MINOR), (0, 0, 7), ("string", "string", "keyboard"),
                        ("flute", "string", "reed", "keyboard"), (-40, -6, -1, -1), (0.05, 0.3), (-2.5, 0.5)),
    "country": _Genre((85, 135), (0, 0.3), "9.......9.....1.", "2.2.7.2.2.2.7.2.", "5.5.5.5.5.5.5.5.",
                      "9.......9.....2.", "2...9...2...9...", "5.3.5.3.5.3.5.3.", (0.02, 0.08), (2, 6), (_MAJOR,), (0, 7),
                      ("guitar", "guitar", "keyboard"), ("guitar", "string", "vocal"), (-6, -4, -1, 0), (0.1, 1),
                      (-1.5, 1.5)),
    "disco": _Genre((105, 132), (0, 0.05), "9...9...9...9...", _BACK_BEAT, "3.9.3.9.3.9.3.9.", "9.7.9.7.9.7.9.7.",
                    "5.....5...5...5.", "4.4.4.4.4.4.4.4.", (0.05, 0.2), (2, 8), (_MAJOR, _MINOR, (0, 3, 7, 10)), (0, 12),
                    ("string", "guitar", "keyboard"), ("string", "brass", "vocal"), (1, -2, -4, -3), (0.2, 1.2),
                    (-1.5, 1.5)),
    "hiphop": _Genre((72, 108), (0, 0.35), "9..3..5.2.8...1.", "....9.......9..1", "7.7.7.7.7.7.7.73", "8.....4...5.....",
                     "7.......2.......", "4..34..3..4.4..3", (0.02, 0.1), (4, 12), (_MINOR, (0, 3, 7, 10)), (0, 0, -2),
                     ("keyboard", "string", "mallet"), ("vocal", "vocal", "synth_lead"), (3, 1, -9, -3), (0.3, 2),
                     (-3.5, 0)),
    "jazz": _Genre((90, 185), (0.3, 0.67), "2.....1.2.......", "1.....2...1...2.", "9...9.7.9...9.7.",
                   "9...9.1.9...9.1.", "3.....4...2...3.", "5.4.5.4.5.4.5.4.", (0.06, 0.3), (2, 8), _SEVENTHS,
                   (0, 2, 4, 5, 7, 9, 11), ("keyboard", "keyboard", "guitar"), ("reed", "brass", "mallet"), (-7, -1, -4, 0),
                   (0.05, 0.5), (-3, 0)),
    "metal": _Genre((110, 190), (0, 0), "9.879.879.879.87", "....9.......9.2.", "9...7...9...7...", "9.7.9.7.9.7.9.7.",
                    "9.659.659.659.65", "2.2.2.2.2.2.2.2.", (0.08, 0.35), (1, 4), (_POWER, (0, 7), _POWER), (0, 0, 1, 3),
                    ("guitar",), ("guitar", "vocal"), (0, -3, 2, -3), (2.5, 8), (-1.5, 1.5)),
    "pop": _Genre((88, 132), (0, 0.2), "9...3.5.9...3...", _BACK_BEAT, "8.8.8.8.8.8.8.8.", "9..5..5.9..5..5.",
                  "9.......5.......", "5.3.5.3.5.3.5.3.", (0.02, 0.12), (4, 14), (_MAJOR, _MINOR), (0, 0, 7),
                  ("keyboard", "synth_lead", "guitar"), ("vocal", "vocal", "synth_lead"), (-1, -3, -4, 1), (0.2, 1.5),
                  (-1, 2)),
    "reggae": _Genre((65, 98), (0, 0.4), "2.......9.......", "2.......8....2..", "7.5.7.5.7.5.7.5.", "9..5..6....4..6.",
                     "..9...9...9...9.", "3.2.3.2.3.2.3.2.", (0.02, 0.08), (0.8, 2), (_MINOR, _MAJOR), (0, 0, 7, 3),
                     ("organ", "guitar", "keyboard"), ("vocal", "brass", "organ"), (-3, 2, -2, -4), (0.1, 0.8),
                     (-3.5, 0)),
    "rock": _Genre((95, 155), (0, 0.1), "9.....5.9.2...2.", _BACK_BEAT, _EIGHTHS, "9.8.9.8.9.8.9.8.", "9...4.5.9...4.5.",
                   "4.3.4.3.4.3.4.3.", (0.04, 0.2), (2, 8), (_POWER, _MAJOR), (0, 0, 0, 7), ("guitar", "guitar", "organ"),
                   ("guitar", "vocal"), (0, -3, 0, -2), (0.8, 4), (-1.5, 1.5)),
}  # fmt: skip


def write_corpora(
    root: Path, sizes: CorpusSizes, seed: int, num_processes: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `pretrain/`, `gtzan/`, `nsynth/` and `music_speech/` under `root`.

    They are NOT the datasets whose layouts they have, and scores on them say nothing of the real ones. Audio that
    exists is left as it is, so an interrupted run goes on; give another seed or other sizes another root.

    Args:
        root: folder to write to; made if it is missing.
        sizes: counts, and lengths in seconds.
        seed: a file's samples depend only on this, its corpus and its name (and its length).
        num_processes: renderers; 1 renders in this process. More are spawned, so a script needs its `__main__` guard.
        progress: called with the clips that exist and the clips in all.

    Raises:
        ValueError: a size or `num_processes` is not above 0.
        OSError: a file cannot be written.
    """
    if num_processes < 1 or min(astuple(sizes)) <= 0:
        raise ValueError(f"num_processes and sizes must be above 0: {num_processes}, {sizes}")
    root = Path(root)
    clips = [*_pretrain_clips(root, sizes), *_gtzan_clips(root, sizes), *_music_speech_clips(root, sizes)]
    for split in ("train", "valid", "test"):
        examples = _nsynth_examples(split, sizes, seed)
        folder = root / "nsynth" / f"nsynth-{split}"
        clips += [_Clip(folder / "audio" / f"{n}.wav", "nsynth", 16000, sizes.nsynth_seconds) for n in examples]
        text = json.dumps(examples, indent=1).encode()
        _write(folder / "examples.json", lambda file, text=text: file.write(text))  # type: ignore[misc]
    missing = [clip for clip in clips if not clip.path.exists()]
    chunks = [missing[i : i + _CHUNK_CLIPS] for i in range(0, len(missing), _CHUNK_CLIPS)]
    done = len(clips) - len(missing)
    for count in _render_all(chunks, seed, num_processes):
        done += count
        if progress is not None:
            progress(done, len(clips))


def _render_all(chunks: list[list[_Clip]], seed: int, num_processes: int) -> Iterator[int]:
    if num_processes == 1:
        yield from (_render_chunk(chunk, seed) for chunk in chunks)
        return
    # spawn, because the caller may hold threads (torch, Ray) that a fork would break
    pool = ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(_render_chunk, chunk, seed) for chunk in chunks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
