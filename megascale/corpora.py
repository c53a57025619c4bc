"""Procedural audio corpora in the on-disk layouts of GTZAN, NSynth and GTZAN music/speech.

They let the real readers, codec, pretraining and fine-tuning run with nothing downloaded. They are NOT those datasets:
every sound is synthesised here, and scores on them say nothing of scores on the real ones.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

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
        index, text = folder / "examples.json", json.dumps(examples, indent=1).encode()
        if not index.exists() or index.read_bytes() != text:
            _write(index, text)
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


def _pretrain_clips(root: Path, sizes: CorpusSizes) -> Iterator[_Clip]:
    for i in range(sizes.pretrain_clips):
        yield _Clip(root / "pretrain" / f"clip-{i:05d}.wav", "pretrain", 22050, sizes.pretrain_seconds)


def _gtzan_clips(root: Path, sizes: CorpusSizes) -> Iterator[_Clip]:
    for genre in _GENRES:
        for i in range(sizes.gtzan_per_genre):
            path = root / "gtzan" / "genres" / genre / f"{genre}.{i:05d}.wav"
            yield _Clip(path, "gtzan", 22050, sizes.gtzan_seconds)


def _music_speech_clips(root: Path, sizes: CorpusSizes) -> Iterator[_Clip]:
    for name in ("music", "speech"):
        for i in range(sizes.music_speech_per_class):
            path = root / "music_speech" / f"{name}_wav" / f"{name}{i:03d}.wav"
            yield _Clip(path, "music_speech", 22050, sizes.music_speech_seconds)


def _nsynth_examples(split: str, sizes: CorpusSizes, seed: int) -> dict[str, dict[str, Any]]:
    # thousands apart, so that no instrument is in two splits
    first_number = {"train": 0, "valid": 1000, "test": 2000}[split]
    notes = {
        "train": sizes.nsynth_train_per_family,
        "valid": sizes.nsynth_valid_per_family,
        "test": sizes.nsynth_test_per_family,
    }[split]
    examples: dict[str, dict[str, Any]] = {}
    for family_number, (family_name, family) in enumerate(_FAMILIES.items()):
        if family_name == "synth_lead" and split != "train":
            continue  # as in NSynth
        for i in range(notes):
            number = first_number + i // _NOTES_PER_INSTRUMENT
            source = family.sources[number % len(family.sources)]
            instrument = f"{family_name}_{source}_{number:03d}"
            rng = _generator(seed, "nsynth note", instrument, i)
            pitch, velocity = int(rng.integers(*family.pitch)), int(rng.choice(_VELOCITIES))
            while f"{instrument}-{pitch:03d}-{velocity:03d}" in examples:
                pitch += 1
            examples[f"{instrument}-{pitch:03d}-{velocity:03d}"] = {
                "note": (first_number * 11 + family_number * 1000 + i),
                "note_str": f"{instrument}-{pitch:03d}-{velocity:03d}",
                "instrument": first_number * 11 + family_number * 1000 + number,
                "instrument_str": instrument,
                "pitch": pitch,
                "velocity": velocity,
                "sample_rate": 16000,
                "instrument_family": family_number,
                "instrument_family_str": family_name,
                "instrument_source": _ALL.index(source),
                "instrument_source_str": source,
                **_qualities(_nsynth_instrument(instrument, seed)),
            }
    return examples


def _qualities(instrument: _Instrument) -> dict[str, Any]:
    tilt_db = 20 * math.log10(instrument.gains_K[1:4].mean() + 1e-3)
    found = {
        "bright": tilt_db > -6,
        "dark": tilt_db < -15,
        "fast_decay": instrument.decay_per_second_K[0] > 2.5,
        "long_release": instrument.release_seconds > 0.2,
        "nonlinear_env": instrument.tremolo > 0.15,
        "percussive": instrument.attack_seconds_K[0] < 0.004,
    }
    names = [name for name in _QUALITIES if found.get(name, False)]
    return {"qualities": [int(name in names) for name in _QUALITIES], "qualities_str": names}


def _nsynth_instrument(name: str, seed: int) -> _Instrument:
    return _draw_instrument(_generator(seed, "nsynth instrument", name), name.rsplit("_", 2)[0])


def _generator(seed: int, *ids: int | str) -> np.random.Generator:
    # megascale.seeding does the same, but its torch import would cost each spawned renderer seconds
    digest = hashlib.blake2b(repr((seed, "corpora", ids)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _render_chunk(clips: list[_Clip], seed: int) -> int:
    for clip in clips:
        samples = _render(clip, seed)
        file = io.BytesIO()
        soundfile.write(file, samples, clip.sample_rate_hz, subtype="PCM_16", format="WAV")
        _write(clip.path, file.getvalue())
    return len(clips)


def _render(clip: _Clip, seed: int) -> np.ndarray:
    rng = _generator(seed, clip.corpus, clip.path.name)
    seconds, rate = clip.seconds, clip.sample_rate_hz
    if clip.corpus == "pretrain":
        number = int(clip.path.stem.removeprefix("clip-"))
        samples = _pretrain_sound(rng, number, seconds, rate)
    elif clip.corpus == "gtzan":
        samples = _song(rng, clip.path.name.split(".")[0], seconds, rate)
    elif clip.corpus == "nsynth":
        name, pitch, velocity = clip.path.stem.rsplit("-", 2)
        instrument = _nsynth_instrument(name, seed)
        samples = _tone(rng, instrument, int(pitch), int(velocity), 0.8 * seconds, seconds, rate)
    elif clip.path.stem.startswith("speech"):
        samples = _speech(rng, seconds, rate)
    else:
        samples = _song(rng, str(rng.choice(list(_GENRES))), seconds, rate, sung=rng.random() < 0.4)
    peak = np.abs(samples).max() or 1.0
    # recordings have a noise floor, and a codec's tokens for digital silence would be one constant
    samples = samples / peak + 10 ** (rng.uniform(-66, -56) / 20) * _noise(rng, len(samples), rate, 40, 6000)
    return samples / np.abs(samples).max() * 10 ** (rng.uniform(-12, -1) / 20)


def _pretrain_sound(rng: np.random.Generator, number: int, seconds: float, rate: int) -> np.ndarray:
    if number % _TEXTURE_EVERY == _TEXTURE_EVERY - 1:
        return _texture(rng, seconds, rate)
    if number % 3 == 0:
        return _song(rng, str(rng.choice(list(_GENRES))), seconds, rate)
    if number % 3 == 1:
        return _speech(rng, seconds, rate)
    name = str(rng.choice(list(_FAMILIES)))
    instrument = _draw_instrument(rng, name)
    track, start = np.zeros(round(seconds * rate)), 0.0
    while start < seconds:
        held = rng.uniform(0.3, 1.2)
        pitch, velocity = int(rng.integers(*_FAMILIES[name].pitch)), int(rng.choice(_VELOCITIES))
        _place(track, _tone(rng, instrument, pitch, velocity, held, held + 0.3, rate), start, rate)
        start += held * rng.uniform(0.9, 1.1)
    return track


def _draw_instrument(rng: np.random.Generator, name: str) -> _Instrument:
    family = _FAMILIES[name]
    number_K = np.arange(1.0, 25.0)
    ratios_K = {
        "harmonic": number_K,
        "stretched": number_K * np.sqrt(1 + 10 ** rng.uniform(-5, -3.2) * number_K**2),
        "bars": np.cumsum(np.append(1.0, rng.uniform(0.7, 3.5, 9))),
        "drawbars": np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]),
    }[family.partials]
    number_K = number_K[: len(ratios_K)]
    gains_K = 10 ** (rng.uniform(*family.tilt_db) / 20 * np.log2(np.maximum(ratios_K, 1)))
    gains_K *= np.where(number_K % 2 == 0, rng.uniform(*family.even), 1.0) * 10 ** (rng.normal(0, 2.5, len(ratios_K)) / 20)
    if family.partials == "drawbars":
        gains_K *= rng.integers(0, 9, len(ratios_K)) / 8 * (number_K != 2) + (number_K == 2)
    formants = family.formants_hz[rng.integers(len(family.formants_hz))]
    return _Instrument(
        ratios_K=ratios_K,
        gains_K=gains_K,
        attack_seconds_K=rng.uniform(*family.attack_seconds) * (1 + rng.uniform(*family.upper_attack) * (number_K - 1)),
        decay_per_second_K=rng.uniform(*family.decay_per_second) + rng.uniform(*family.upper_decay) * (number_K - 1),
        release_seconds=rng.uniform(0.04, 0.3),
        formants_hz=tuple(hz * rng.uniform(0.85, 1.2) for hz in formants),
        formant_gain=rng.uniform(1.5, 6) * (3 if name == "vocal" else 1),
        vibrato_hz=rng.uniform(4, 7),
        vibrato_cents=rng.uniform(*family.vibrato_cents),
        tremolo=rng.uniform(*family.tremolo),
        noise=10 ** (rng.uniform(*family.noise_db) / 20),
        fm=rng.uniform(*family.fm),
        drive=rng.uniform(0.05, 2) if name in ("synth_lead", "guitar", "bass", "organ") else 0.05,
    )


def _tone(
    rng: np.random.Generator,
    instrument: _Instrument,
    pitch: int,
    velocity: int,
    held_seconds: float,
    seconds: float,
    rate: int,
    most_partials: int = 24,
) -> np.ndarray:
    f0_hz = 440 * 2 ** ((pitch - 69) / 12)
    heard = instrument.ratios_K[:most_partials] * f0_hz < 0.45 * rate
    keep = slice(0, max(1, int(heard.sum())))
    ratios_K = instrument.ratios_K[keep]
    # harder notes are brighter
    gains_K = instrument.gains_K[keep] * np.maximum(ratios_K, 1) ** (1.2 * (velocity / 127 - 0.8))
    body_K = np.ones(len(ratios_K))
    for hz in instrument.formants_hz:
        body_K += instrument.formant_gain / (1 + ((ratios_K * f0_hz - hz) / (60 + 0.08 * hz)) ** 2)
    t_N = np.arange(round(seconds * rate)) / rate
    wobble_N = np.sin(2 * np.pi * (instrument.vibrato_hz * t_N + rng.random()))
    cents_N = instrument.vibrato_cents * wobble_N * np.minimum(1, t_N / 0.25) + rng.normal(0, 4)
    cycles_N = np.cumsum(f0_hz * 2 ** (cents_N / 1200)) / rate
    if instrument.fm > 0:
        cycles_N += instrument.fm * np.exp(-t_N) * np.sin(2 * np.pi * cycles_N) / (2 * np.pi)
    cycles_KN = np.multiply.outer(ratios_K, cycles_N) + rng.random((len(ratios_K), 1))
    # whole cycles go before the cast: float32 holds the rest well, and its sine is many times faster
    waves_KN = np.sin((2 * np.pi * (cycles_KN - np.floor(cycles_KN))).astype(np.float32))
    t32_N = t_N.astype(np.float32)
    decay_K1 = instrument.decay_per_second_K[keep, None].astype(np.float32)
    attack_K1 = instrument.attack_seconds_K[keep, None].astype(np.float32)
    shape_KN = np.exp(-decay_K1 * t32_N) - np.exp(-(decay_K1 + 1 / attack_K1) * t32_N)
    waves_KN *= shape_KN * (gains_K * body_K).astype(np.float32)[:, None]
    tone_N = waves_KN.sum(axis=0).astype(np.float64)
    tone_N /= np.abs(tone_N).max() + 1e-9
    struck = instrument.decay_per_second_K[0] > 0.5
    breath_N = _noise(rng, len(t_N), rate, f0_hz, min(10 * f0_hz, 0.45 * rate))
    tone_N += instrument.noise * breath_N * (np.exp(-30 * t_N) * 4 if struck else np.minimum(1, t_N / 0.05))
    tone_N *= 1 + instrument.tremolo * np.roll(wobble_N, rate // 17)
    tone_N *= np.exp(-np.maximum(0, t_N - held_seconds) / instrument.release_seconds * 4)
    return np.tanh(instrument.drive * tone_N) / np.tanh(instrument.drive) * (0.3 + 0.7 * velocity / 127)


def _song(rng: np.random.Generator, name: str, seconds: float, rate: int, sung: bool = False) -> np.ndarray:
    genre = _GENRES[name]
    step_seconds = 15 / rng.uniform(*genre.tempo_bpm)
    swing, first_step, root = rng.uniform(*genre.swing), int(rng.integers(16)), int(rng.integers(12))
    roots = [root + int(rng.choice((0, 0, 5, 7, 9))) for _ in range(64)]

    def hits(pattern: str) -> Iterator[tuple[float, int]]:
        for i in range(math.ceil(seconds / step_seconds)):
            place = (first_step + i) % 16
            # a song strays from its genre's bar now and then
            chance = 0.04 if pattern[place] == "." else int(pattern[place]) / 9
            if pattern.strip(".") and rng.random() < chance:
                yield (i + swing * (place % 4 == 2)) * step_seconds, (first_step + i) // 8

    def play(family: str, pattern: str, steps: Range, notes: Callable[[int], list[int]], partials: int) -> np.ndarray:
        instrument, track, made = _draw_instrument(rng, family), np.zeros(round(seconds * rate)), {}
        held = max(0.08, rng.uniform(*steps) * step_seconds)
        for start, half_bar in hits(pattern):
            for pitch in notes(roots[half_bar % len(roots)]):
                if pitch not in made:
                    made[pitch] = _tone(rng, instrument, pitch, 100, held, min(seconds, held + 0.15), rate, partials)
                _place(track, made[pitch] * rng.uniform(0.7, 1), start, rate)
        return track

    intervals = genre.intervals[rng.integers(len(genre.intervals))]
    chord_octave, lead_octave = 12 * int(rng.integers(4, 6)), 12 * int(rng.integers(5, 7))
    scale = np.array((0, 2, 4, 7, 9, 12) if 4 in intervals else (0, 3, 5, 7, 10, 12))
    parts = (
        _drums(rng, genre, hits, round(seconds * rate), rate),
        play("string" if name == "classical" else "bass", genre.bass, (1.5, 4 if name != "classical" else 14),
             lambda r: [28 + r % 12 + int(rng.choice(genre.bass_moves))], 10),
        play(str(rng.choice(genre.chord_families)), genre.chord, genre.chord_steps,
             lambda r: [chord_octave + r % 12 + i for i in intervals], 12),
        play("vocal" if sung else str(rng.choice(genre.lead_families)), genre.lead, (1, 4),
             lambda r: [lead_octave + root + int(rng.choice(scale))], 14),
    )  # fmt: skip
    mix = np.zeros(round(seconds * rate))
    for part, level_db in zip(parts, genre.levels_db, strict=True):
        rms = math.sqrt(float(np.mean(part**2)))
        mix += part / (rms + 1e-6) * 10 ** ((level_db + rng.normal(0, 3)) / 20)
    mix /= np.abs(mix).max() + 1e-9
    drive = rng.uniform(*genre.drive)
    return _tilt(np.tanh(drive * mix) / math.tanh(drive), rate, rng.uniform(*genre.tilt_db))


def _drums(
    rng: np.random.Generator, genre: _Genre, hits: Callable[[str], Iterator[tuple[float, int]]], length: int, rate: int
) -> np.ndarray:
    t_N = np.arange(round(0.4 * rate)) / rate
    sweep_N = np.cumsum(rng.uniform(42, 65) + rng.uniform(60, 200) * np.exp(-t_N * rng.uniform(15, 45))) / rate
    kick_N = np.sin(2 * np.pi * sweep_N) * np.exp(-t_N * rng.uniform(6, 18)) * rng.uniform(0.8, 1.4)
    rattle_N = _noise(rng, len(t_N), rate, rng.uniform(300, 1500), rng.uniform(4000, 9000)) / 3
    body_N = np.sin(2 * np.pi * rng.uniform(150, 240) * t_N)
    snare_N = (rattle_N + rng.uniform(0.1, 0.8) * body_N) * np.exp(-t_N * rng.uniform(12, 30)) * rng.uniform(0.6, 1)
    hiss_N = _noise(rng, len(t_N), rate, rng.uniform(4000, 7500), 10500) / 3
    hat_N = hiss_N * np.exp(-t_N / rng.uniform(*genre.hat_seconds)) * rng.uniform(0.2, 0.6)
    track = np.zeros(length)
    for pattern, sound in ((genre.kick, kick_N), (genre.snare, snare_N), (genre.hat, hat_N)):
        for start, _ in hits(pattern):
            _place(track, sound * rng.uniform(0.7, 1), start, rate)
    return track


def _speech(rng: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    hop, length = 256, round(seconds * rate)
    frames = math.ceil(length / hop) + 1
    lengths_S = rng.uniform(0.06, 0.2, math.ceil(seconds / 0.06) + 2)
    centres_S = np.cumsum(lengths_S) - lengths_S / 2
    kind_S = rng.choice(4, len(lengths_S), p=(0.62, 0.12, 0.14, 0.12))  # voiced, breathy, fricative, pause
    time_F, time_N = np.arange(frames) * hop / rate, np.arange((frames + 1) * hop) / rate
    tract = rng.uniform(0.85, 1.2)
    targets_S3 = np.array(_VOWELS)[rng.integers(len(_VOWELS), size=len(lengths_S))] * tract
    formants_F3 = np.stack([np.interp(time_F, centres_S, targets_S3[:, i]) for i in range(3)], axis=1)
    voiced_F, noisy_F, hissed_F = (
        np.interp(time_F, centres_S, np.array(level)[kind_S])
        for level in ((1, 0.15, 0, 0), (0.01, 0.12, 0.02, 0), (0, 0, rng.uniform(0.15, 0.5), 0))
    )
    syllable_F = 0.55 + 0.45 * np.sin(2 * np.pi * np.cumsum(rng.uniform(3, 6) + rng.normal(0, 2, frames)) * hop / rate)
    knots = np.arange(0, seconds + 1, 0.15)
    melody_N = np.interp(time_N, knots, rng.normal(0, 0.12, len(knots)) - 0.06 * knots)
    cycles_N = np.cumsum(rng.uniform(80, 260) * np.exp(melody_N)) / rate
    phase_N = (cycles_N + np.interp(time_N, time_F, rng.normal(0, 0.02, frames))) % 1
    glottis_N = np.exp(-phase_N * rng.uniform(6, 14))
    hz_B = np.fft.rfftfreq(2 * hop, 1 / rate)
    tract_FB = 0.02 + sum(
        gain / (1 + ((hz_B - formants_F3[:, i : i + 1]) / (45 + 0.04 * formants_F3[:, i : i + 1])) ** 2)
        for i, gain in enumerate((1.0, 0.6, 0.3))
    )
    tract_FB = tract_FB * (hz_B > 60)
    hiss_FB = 1 / (1 + ((hz_B - np.interp(time_F, centres_S, rng.uniform(2500, 8000, len(lengths_S)))[:, None]) / 1500) ** 2)
    window = np.hanning(2 * hop + 1)[:-1]
    place_FW = np.arange(frames)[:, None] * hop + np.arange(2 * hop)
    voice_FB = np.fft.rfft((glottis_N - glottis_N.mean())[place_FW] * window)
    noise_FB = np.fft.rfft(rng.normal(0, 0.3, len(time_N))[place_FW] * window)
    spectrum_FB = tract_FB * (voice_FB * voiced_F[:, None] + noise_FB * noisy_F[:, None])
    spectrum_FB += hiss_FB * noise_FB * hissed_F[:, None]
    pieces_FW = np.fft.irfft(spectrum_FB * syllable_F[:, None])
    speech = np.append(pieces_FW[:, :hop].ravel(), np.zeros(hop))
    speech[hop:] += pieces_FW[:, hop:].ravel()
    speech = speech[:length] / (np.abs(speech[:length]).max() + 1e-9)
    if rng.random() < 0.3:
        hum = np.sin(2 * np.pi * rng.choice((50, 60, 100, 120)) * time_N[:length])
        speech += 10 ** (rng.uniform(-45, -28) / 20) * (hum + _noise(rng, length, rate, 80, rng.uniform(500, 5000)))
    return _tilt(speech, rate, rng.uniform(-1.5, 1.5))


def _texture(rng: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    low_hz = 10 ** rng.uniform(1.5, 3.5)
    noise = _noise(rng, round(seconds * rate), rate, low_hz, low_hz * 10 ** rng.uniform(0.3, 1.5))
    knots = np.arange(0, seconds + 1, rng.uniform(0.1, 0.8))
    level_db = np.interp(np.arange(len(noise)) / rate, knots, rng.uniform(-24, 0, len(knots)))
    return _tilt(noise * 10 ** (level_db / 20), rate, rng.uniform(-6, 1))


def _noise(rng: np.random.Generator, length: int, rate: int, low_hz: float, high_hz: float) -> np.ndarray:
    hz = np.fft.rfftfreq(length, 1 / rate)
    band = 1 / (1 + (low_hz / np.maximum(hz, 1)) ** 4) / (1 + (hz / high_hz) ** 4)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * band, length)
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-9)


def _tilt(samples: np.ndarray, rate: int, db_per_octave: float) -> np.ndarray:
    hz = np.fft.rfftfreq(len(samples), 1 / rate)
    gain = 10 ** (db_per_octave / 20 * np.log2(np.clip(hz, 50, 10000) / 1000))
    return np.fft.irfft(np.fft.rfft(samples) * gain, len(samples))


def _place(track: np.ndarray, sound: np.ndarray, start_seconds: float, rate: int) -> None:
    first = round(start_seconds * rate)
    stop = min(len(track), first + len(sound))
    if first < stop:
        track[first:stop] += sound[: stop - first]
