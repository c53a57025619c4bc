"""Sounds made of arithmetic: notes of instrument families, songs of genres, speech-like sounds, textures.

Array names end in their axes: N samples, K partials, F frames, B frequency bins, S speech segments. Functions return
float64 samples at `rate` (Hz), of any peak; all that is drawn comes from the generator handed in.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Range = tuple[float, float]
VELOCITIES = (25, 50, 75, 100, 127)
SOURCES = ("acoustic", "electronic", "synthetic")
_TEXTURE_EVERY = 10  # every tenth mixture is environmental noise


# What the instruments of a family draw their own sound from.
@dataclass(frozen=True)
class _Family:
    pitch: tuple[int, int]  # MIDI numbers
    tilt_db: Range  # per octave above the fundamental
    attack_seconds: Range
    noise_db: Range
    noise_hz: Range
    partials: str = "harmonic"
    even: Range = (0.7, 1)  # gain of the even partials
    decay_per_second: Range = (0, 0.3)
    upper_decay: Range = (0, 0.05)  # more decay per second for each partial number
    upper_attack: Range = (0, 0.05)  # longer attack, as a share, for each partial number
    vibrato_cents: Range = (0, 4)
    tremolo: Range = (0, 0.08)
    fm: Range = (0, 0)
    drive: Range = (0.05, 0.05)
    formants_hz: tuple[tuple[float, ...], ...] = ((),)  # an instrument has one of these sets
    sources: tuple[str, ...] = ("acoustic", "electronic")


@dataclass(frozen=True)
class _Instrument:
    ratios_K: np.ndarray
    gains_K: np.ndarray
    attack_seconds_K: np.ndarray
    decay_per_second_K: np.ndarray
    formants_hz: tuple[float, ...]
    formant_gain: float
    release_seconds: float
    vibrato_hz: float
    vibrato_cents: float
    tremolo: float
    noise: float
    noise_hz: Range
    fm: float
    drive: float


# What the songs of a genre draw from. `kick` to `lead` are a bar of sixteenths: a digit is the chance, in ninths, that
# its step sounds.
@dataclass(frozen=True)
class _Genre:
    tempo_bpm: Range
    kick: str
    snare: str
    hat: str
    bass: str
    chord: str
    lead: str
    chord_steps: Range  # how long a chord sounds
    intervals: tuple[tuple[int, ...], ...]
    chord_families: tuple[str, ...]
    lead_families: tuple[str, ...]
    levels_db: tuple[float, float, float, float]  # drums, bass, chords, lead
    drive: Range
    tilt_db: Range  # per octave, of the whole mix
    swing: Range = (0, 0.1)  # steps by which the off-beat eighths come late
    hat_seconds: Range = (0.02, 0.1)
    bass_family: str = "bass"
    bass_steps: Range = (1.5, 4)
    bass_moves: tuple[int, ...] = (0, 0, 7)  # semitones above the root


_VOWELS_HZ = ((730.0, 1090.0, 2440.0), (270.0, 2290.0, 3010.0), (300.0, 870.0, 2240.0), (530.0, 1840.0, 2480.0),
              (570.0, 840.0, 2410.0), (490.0, 1350.0, 1690.0))  # fmt: skip
FAMILIES = {
    "bass": _Family((24, 55), (-12, -6), (0.003, 0.02), (-55, -40), (50, 800), "stretched", fm=(0, 0.3),
                    drive=(0.05, 2), decay_per_second=(0.4, 2.5), upper_decay=(0.2, 1),
                    sources=("electronic", "synthetic")),
    "brass": _Family((42, 74), (-5, -2), (0.03, 0.09), (-55, -42), (400, 2500), upper_attack=(0.2, 0.6),
                     formants_hz=((1100.0,), (1400.0,)), vibrato_cents=(0, 12), sources=("acoustic",)),
    "flute": _Family((60, 90), (-18, -10), (0.04, 0.12), (-28, -17), (700, 5000), even=(0.3, 0.9), tremolo=(0.05, 0.25),
                     vibrato_cents=(5, 25), sources=("acoustic", "synthetic")),
    "guitar": _Family((40, 78), (-8, -2), (0.002, 0.01), (-45, -28), (1500, 5000), "stretched", even=(0.5, 1),
                      decay_per_second=(0.8, 4), upper_decay=(0.1, 0.6), drive=(0.05, 1.5),
                      formants_hz=((110.0, 420.0), (220.0, 2500.0))),
    "keyboard": _Family((42, 94), (-15, -9), (0.002, 0.012), (-60, -45), (100, 1500), "stretched", sources=SOURCES,
                        decay_per_second=(0.4, 2), upper_decay=(0.02, 0.3), tremolo=(0, 0.2), fm=(0, 0.8)),
    "mallet": _Family((46, 94), (-10, -2), (0.001, 0.005), (-40, -22), (1000, 6000), "bars", decay_per_second=(2, 8),
                      upper_decay=(0.5, 3), tremolo=(0, 0.3), sources=("acoustic", "synthetic")),
    "organ": _Family((38, 82), (-1, 2), (0.004, 0.03), (-50, -38), (60, 500), "drawbars", tremolo=(0.08, 0.35),
                     vibrato_cents=(0, 8), drive=(0.05, 1.5)),
    "reed": _Family((48, 80), (-8, -3), (0.015, 0.06), (-38, -26), (1800, 6000), even=(0.02, 0.35),
                    formants_hz=((1600.0, 3000.0), (2000.0,)), vibrato_cents=(0, 15), sources=("acoustic",)),
    "string": _Family((42, 84), (-5, -1), (0.15, 0.4), (-30, -20), (4000, 9000), vibrato_cents=(8, 30),
                      tremolo=(0.02, 0.15), formants_hz=((280.0, 1000.0), (450.0, 2800.0)),
                      sources=("acoustic", "acoustic", "synthetic")),
    "synth_lead": _Family((40, 84), (-3, 1), (0.002, 0.03), (-70, -55), (500, 5000), even=(0, 1), upper_decay=(0, 0.2),
                          fm=(0, 3), drive=(0.5, 4), vibrato_cents=(0, 30), sources=("synthetic",)),
    "vocal": _Family((46, 76), (-9, -6), (0.03, 0.12), (-55, -42), (500, 8000), vibrato_cents=(20, 60),
                     tremolo=(0.05, 0.2), formants_hz=_VOWELS_HZ, sources=("acoustic", "synthetic")),
}  # fmt: skip

_MAJOR, _MINOR, _POWER, _REST = (0, 4, 7), (0, 3, 7), (0, 7, 12), "." * 16
_BACK_BEAT, _EIGHTHS, _SPARSE = "....9.......9...", "9.8.9.8.9.8.9.8.", "4.4.4.4.4.4.4.4."
GENRES = {
    "blues": _Genre((70, 120), "9...2.2.9...2...", _BACK_BEAT, "9.7.9.7.9.7.9.7.", "9.6.9.6.9.6.9.6.",
                    "9.....4.9.....4.", _SPARSE, (2, 6), ((0, 4, 10), _MAJOR), ("guitar", "organ"), ("guitar", "reed"),
                    (-4, -1, -4, 1), (1, 2.5), (-2.5, -0.5), swing=(0.35, 0.67), bass_moves=(0, 4, 7, 9)),
    "classical": _Genre((60, 130), _REST, _REST, _REST, "9.......5.......", "9.......6...2...", "6...6.3.6...6.3.",
                        (5, 10), (_MAJOR, _MINOR), ("string", "string", "keyboard"), ("flute", "string", "reed"),
                        (-40, -8, 0, 0), (0.05, 0.3), (-3.5, -0.5), bass_family="string", bass_steps=(5, 10)),
    "country": _Genre((85, 135), "9.......9.....1.", "3.3.8.3.3.3.8.3.", "5.5.5.5.5.5.5.5.", "9.......9.....2.",
                      "2...9...2...9...", "6.4.6.4.6.4.6.4.", (2, 5), (_MAJOR,), ("guitar",),
                      ("guitar", "guitar", "string"), (-8, -3, 1, 0), (0.1, 0.8), (-0.5, 2), bass_moves=(0, 7)),
    "disco": _Genre((105, 132), "9...9...9...9...", _BACK_BEAT, "3.9.3.9.3.9.3.9.", "9.7.9.7.9.7.9.7.",
                    "5.....5...5...5.", _SPARSE, (3, 8), (_MAJOR, _MINOR, (0, 3, 7, 10)), ("string", "keyboard"),
                    ("string", "brass"), (3, -2, -4, -4), (0.2, 1.2), (0.5, 2.5), hat_seconds=(0.08, 0.2),
                    bass_moves=(0, 12)),
    "hiphop": _Genre((72, 108), "9..3..5.2.8...1.", "....9.......9..1", "7.7.7.7.7.7.7.73", "8.....4...5.....",
                     "7.......2.......", "4..34..3..4.4..3", (3, 8), (_MINOR, (0, 3, 7, 10)), ("keyboard", "mallet"),
                     ("vocal", "vocal", "synth_lead"), (5, 2, -9, -3), (0.5, 2.5), (-3.5, -0.5), swing=(0, 0.35)),
    "jazz": _Genre((90, 180), "2.....1.2.......", "1.....2...1...2.", "9...9.7.9...9.7.", "9...9.1.9...9.1.",
                   "3.....4...2...3.", "5.4.5.4.5.4.5.4.", (2, 6), ((0, 4, 7, 11), (0, 3, 7, 10), (0, 4, 10, 14)),
                   ("keyboard",), ("reed", "brass"), (-7, 1, -4, 0), (0.05, 0.4), (-2.5, 0), swing=(0.3, 0.67),
                   hat_seconds=(0.15, 0.4), bass_moves=(0, 2, 4, 5, 7, 9, 11)),
    "metal": _Genre((110, 190), "9.879.879.879.87", "....9.......9.2.", "9...7...9...7...", _EIGHTHS,
                    "9.659.659.659.65", "2.2.2.2.2.2.2.2.", (1, 4), (_POWER, (0, 7)), ("guitar",), ("guitar", "vocal"),
                    (0, -3, 2, -3), (4, 10), (-0.5, 2), hat_seconds=(0.1, 0.35), bass_moves=(0, 0, 1, 3)),
    "pop": _Genre((88, 132), "9...3.5.9...3...", _BACK_BEAT, "8.8.8.8.8.8.8.8.", "9..5..5.9..5..5.", "9.......5.......",
                  "6.4.6.4.6.4.6.4.", (4, 10), (_MAJOR, _MINOR), ("keyboard", "synth_lead"), ("vocal",),
                  (-1, -4, -4, 3), (0.2, 1.5), (1.5, 3.5), swing=(0, 0.2)),
    "reggae": _Genre((65, 98), "2.......9.......", "2.......8....2..", "7.5.7.5.7.5.7.5.", "9..5..6....4..6.",
                     "..9...9...9...9.", "3.2.3.2.3.2.3.2.", (0.8, 2), (_MINOR, _MAJOR), ("organ", "organ", "guitar"),
                     ("vocal", "brass"), (-5, 3, 0, -5), (0.1, 0.8), (-4, -1), swing=(0, 0.4), bass_moves=(0, 0, 7, 3)),
    "rock": _Genre((95, 155), "9.....5.9.2...2.", _BACK_BEAT, _EIGHTHS, _EIGHTHS, "9...4.5.9...4.5.",
                   "4.3.4.3.4.3.4.3.", (2, 8), (_POWER, _MAJOR), ("guitar", "guitar", "organ"), ("guitar", "vocal"),
                   (3, -3, 0, -3), (0.8, 2.5), (-2, 0.5), hat_seconds=(0.04, 0.15)),
}  # fmt: skip


def make_mixture(rng: np.random.Generator, number: int, seconds: float, rate: int) -> np.ndarray:
    """Return clip `number` of an unlabelled corpus, (S,) samples at `rate` Hz: a song, speech, notes of one instrument, or now
    and then a texture."""
    if number % _TEXTURE_EVERY == _TEXTURE_EVERY - 1:
        return _texture(rng, seconds, rate)
    if number % 3 == 0:
        return make_song(rng, str(rng.choice(list(GENRES))), seconds, rate)
    if number % 3 == 1:
        return make_speech(rng, seconds, rate)
    name = str(rng.choice(list(FAMILIES)))
    instrument = draw_instrument(rng, name)
    track, start = np.zeros(round(seconds * rate)), 0.0
    while start < seconds:
        held = rng.uniform(0.3, 1.2)
        pitch, velocity = int(rng.integers(*FAMILIES[name].pitch)), int(rng.choice(VELOCITIES))
        _place(track, make_note(rng, instrument, pitch, velocity, held, held + 0.3, rate), start, rate)
        start += held * rng.uniform(0.9, 1.1)
    return track


def draw_instrument(rng: np.random.Generator, name: str) -> _Instrument:
    """Draw an instrument of a family of `FAMILIES`."""
    family = FAMILIES[name]
    number_K = np.arange(1.0, 25.0)
    ratios_K = {
        "harmonic": number_K,
        "stretched": number_K * np.sqrt(1 + 10 ** rng.uniform(-5, -3.2) * number_K**2),
        "bars": np.cumsum(np.append(1.0, rng.uniform(0.7, 3.5, 9))),
        "drawbars": np.array([1.0, 0.5, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]),
    }[family.partials]
    number_K = number_K[: len(ratios_K)]
    gains_K = 10 ** (rng.uniform(*family.tilt_db) / 20 * np.log2(np.maximum(ratios_K, 1)))
    gains_K *= 10 ** (rng.normal(0, 1.5, len(ratios_K)) / 20)
    if family.partials == "drawbars":
        gains_K[1:] *= rng.integers(1, 9, len(ratios_K) - 1) / 8
    else:
        gains_K[1::2] *= rng.uniform(*family.even)
    formants = family.formants_hz[rng.integers(len(family.formants_hz))]
    return _Instrument(
        ratios_K=ratios_K,
        gains_K=gains_K,
        attack_seconds_K=rng.uniform(*family.attack_seconds) * (1 + rng.uniform(*family.upper_attack) * (number_K - 1)),
        decay_per_second_K=rng.uniform(*family.decay_per_second) + rng.uniform(*family.upper_decay) * (number_K - 1),
        formants_hz=tuple(hz * rng.uniform(0.9, 1.12) for hz in formants),
        formant_gain=rng.uniform(10, 25) if len(formants) == 3 else rng.uniform(2.5, 6),
        release_seconds=rng.uniform(0.04, 0.3),
        vibrato_hz=rng.uniform(4, 7),
        vibrato_cents=rng.uniform(*family.vibrato_cents),
        tremolo=rng.uniform(*family.tremolo),
        noise=10 ** (rng.uniform(*family.noise_db) / 20),
        noise_hz=(family.noise_hz[0] * rng.uniform(0.7, 1.4), family.noise_hz[1] * rng.uniform(0.7, 1.3)),
        fm=rng.uniform(*family.fm),
        drive=rng.uniform(*family.drive),
    )


def make_note(
    rng: np.random.Generator, instrument: _Instrument, pitch: int, velocity: int, held: float, seconds: float, rate: int
) -> np.ndarray:
    """Return a note, (S,) samples at `rate` Hz: MIDI pitch and velocity, held so many of its seconds."""
    f0_hz = 440 * 2 ** ((pitch - 69) / 12)
    ratios_K, gains_K = instrument.ratios_K, instrument.gains_K.copy()
    gains_K *= np.maximum(ratios_K, 1) ** (0.7 * velocity / 127 - 0.5)  # harder notes are brighter
    gains_K *= 1 + instrument.formant_gain * sum(
        1 / (1 + ((ratios_K * f0_hz - hz) / (60 + 0.08 * hz)) ** 2) for hz in instrument.formants_hz
    )
    gains_K[ratios_K * f0_hz > 0.45 * rate] = 0
    # float32, because its sine and exponential are many times faster; only running phases need more
    t_N = (np.arange(round(seconds * rate)) / rate).astype(np.float32)
    wobble_N = np.sin(np.float32(2 * np.pi * instrument.vibrato_hz) * t_N + np.float32(2 * np.pi * rng.random()))
    cents_N = instrument.vibrato_cents * wobble_N * np.minimum(1, 4 * t_N) + rng.normal(0, 4)
    cycles_N = np.cumsum(f0_hz / rate * np.exp(math.log(2) / 1200 * cents_N), dtype=np.float64)
    if instrument.fm > 0:
        cycles_N += instrument.fm * np.exp(-t_N) * _sine(cycles_N) / (2 * np.pi)
    tone_N = np.zeros(len(t_N), np.float32)
    # one partial at a time stays in the cache; one too weak to hear, and the end of a decayed one, is left out
    for k in np.flatnonzero(gains_K > 4e-3 * gains_K.max()):
        decay, attack = float(instrument.decay_per_second_K[k]), float(instrument.attack_seconds_K[k])
        heard, rise = round(min(seconds, 8 / (decay + 1e-9)) * rate), round(8 * attack * rate)
        level_N = float(gains_K[k]) * np.exp(-decay * t_N[:heard])
        level_N[:rise] *= 1 - np.exp(t_N[: min(heard, rise)] / -attack)
        tone_N[:heard] += level_N * _sine(cycles_N[:heard] * ratios_K[k] + rng.random())
    tone_N /= np.abs(tone_N).max() + 1e-9
    struck = instrument.decay_per_second_K[0] > 0.3
    breath_N = instrument.noise * make_noise(rng, len(t_N), rate, *instrument.noise_hz)
    tone_N += breath_N * (8 * np.exp(-25 * t_N) if struck else np.minimum(1, 25 * t_N))
    tone_N *= 1 + instrument.tremolo * np.roll(wobble_N, rate // 17)
    tone_N *= np.exp(np.minimum(0, held - t_N) * 4 / instrument.release_seconds)
    return np.tanh(instrument.drive * tone_N) / np.tanh(instrument.drive) * (0.3 + 0.7 * velocity / 127)


def make_song(rng: np.random.Generator, name: str, seconds: float, rate: int, sung: bool = False) -> np.ndarray:
    """Return a stretch of a song of a genre of `GENRES`, (S,) samples at `rate` Hz; `sung`: a voice leads."""
    genre, length = GENRES[name], round(seconds * rate)
    step_seconds, swing = 15 / rng.uniform(*genre.tempo_bpm), rng.uniform(*genre.swing)
    first_step, key = int(rng.integers(16)), int(rng.integers(12))
    steps = first_step + np.arange(math.ceil(seconds / step_seconds))
    roots = key + rng.choice((0, 0, 5, 7, 9), size=steps[-1] // 8 + 1)  # of each half bar

    def hits(pattern: str) -> Iterator[tuple[float, int]]:
        for step in steps if pattern != _REST else ():
            # a song strays from its genre's bar now and then
            chance = int(pattern[step % 16].replace(".", "0")) / 9 or 0.03
            if rng.random() < chance:
                yield (step - first_step + swing * (step % 4 == 2)) * step_seconds, int(roots[step // 8]) % 12

    def play(family: str, pattern: str, held_steps: Range, pitches: Callable[[int], list[int]]) -> np.ndarray:
        instrument, track = draw_instrument(rng, family), np.zeros(length)
        tones: dict[int, np.ndarray] = {}
        held = min(seconds, max(0.08, rng.uniform(*held_steps) * step_seconds))
        for start, root in hits(pattern):
            for pitch in map(int, pitches(root)):
                if pitch not in tones:
                    tones[pitch] = make_note(rng, instrument, pitch, 90, held, held + 0.1, rate)
                _place(track, tones[pitch] * rng.uniform(0.7, 1), start, rate)
        return track

    intervals = genre.intervals[rng.integers(len(genre.intervals))]
    scale = (0, 2, 4, 7, 9) if 4 in intervals else (0, 3, 5, 7, 10)
    chord_octave, lead_octave = 12 * int(rng.integers(4, 6)), 12 * int(rng.integers(5, 7))
    lead_family = "vocal" if sung else str(rng.choice(genre.lead_families))
    parts = (
        _drums(rng, genre, hits, length, rate),
        play(genre.bass_family, genre.bass, genre.bass_steps, lambda root: [28 + root + rng.choice(genre.bass_moves)]),
        play(str(rng.choice(genre.chord_families)), genre.chord, genre.chord_steps,
             lambda root: [chord_octave + root + i for i in intervals]),
        play(lead_family, genre.lead, (1, 4), lambda root: [lead_octave + key + rng.choice(scale)]),
    )  # fmt: skip
    mix = np.zeros(length)
    for part, level_db in zip(parts, genre.levels_db, strict=True):
        mix += part / (np.sqrt(np.mean(part**2)) + 1e-6) * 10 ** ((level_db + rng.normal(0, 1.5)) / 20)
    mix = np.tanh(rng.uniform(*genre.drive) * mix / (np.abs(mix).max() + 1e-9))
    hiss = 10 ** (rng.uniform(-50, -36) / 20) * np.abs(mix).max() * make_noise(rng, length, rate, 200, 9000)
    return _tilt(mix + hiss, rate, rng.uniform(*genre.tilt_db))


def _drums(
    rng: np.random.Generator, genre: _Genre, hits: Callable[[str], Iterator[tuple[float, int]]], length: int, rate: int
) -> np.ndarray:
    t_N = np.arange(round(0.4 * rate)) / rate
    sweep_N = np.cumsum(rng.uniform(42, 65) + rng.uniform(60, 200) * np.exp(-t_N * rng.uniform(15, 45))) / rate
    kick_N = _sine(sweep_N) * np.exp(-t_N * rng.uniform(6, 18)) * rng.uniform(0.8, 1.4)
    rattle_N = make_noise(rng, len(t_N), rate, rng.uniform(300, 1500), rng.uniform(4000, 9000)) / 3
    body_N = rng.uniform(0.1, 0.8) * _sine(rng.uniform(150, 240) * t_N)
    snare_N = (rattle_N + body_N) * np.exp(-t_N * rng.uniform(12, 30)) * rng.uniform(0.6, 1)
    hiss_N = make_noise(rng, len(t_N), rate, rng.uniform(4000, 7500), 10500) / 3
    hat_N = hiss_N * np.exp(-t_N / rng.uniform(*genre.hat_seconds)) * rng.uniform(0.2, 0.6)
    track = np.zeros(length)
    for pattern, sound in ((genre.kick, kick_N), (genre.snare, snare_N), (genre.hat, hat_N)):
        for start, _ in hits(pattern):
            _place(track, sound * rng.uniform(0.7, 1), start, rate)
    return track


def make_speech(rng: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    """Return a voice that babbles, (S,) samples at `rate` Hz."""
    hop, length = 256, round(seconds * rate)
    frames = math.ceil(length / hop) + 1
    time_F, time_N = np.arange(frames) * hop / rate, np.arange((frames + 1) * hop) / rate
    lengths_S = rng.uniform(0.06, 0.2, math.ceil(seconds / 0.06) + 2)
    centres_S = np.cumsum(lengths_S) - lengths_S / 2
    kind_S = rng.choice(4, len(lengths_S), p=(0.56, 0.1, 0.16, 0.18))  # voiced, breathy, fricative, pause
    levels = ((1, 0.15, 0, 0), (0.01, 0.12, 0.02, 0), (0, 0, rng.uniform(0.15, 0.5), 0))
    voiced_F1, noisy_F1, hissed_F1 = (np.interp(time_F, centres_S, np.array(x)[kind_S])[:, None] for x in levels)
    syllable_F = np.sin(2 * np.pi * np.cumsum(rng.uniform(3, 6) + rng.normal(0, 2, frames)) * hop / rate)

    knots = np.arange(0, seconds + 1, 0.15)
    melody_N = np.interp(time_N, knots, rng.normal(0, 0.12, len(knots)) - 0.06 * knots)
    jitter_N = np.interp(time_N, time_F, rng.normal(0, 0.02, frames))
    cycles_N = np.cumsum(rng.uniform(80, 260) * np.exp(melody_N)) / rate + jitter_N
    glottis_N = np.exp(-(cycles_N % 1) * rng.uniform(6, 14))

    hz_B = np.fft.rfftfreq(2 * hop, 1 / rate)
    vowels_S = np.array(_VOWELS_HZ)[rng.integers(len(_VOWELS_HZ), size=len(lengths_S))] * rng.uniform(0.85, 1.2)
    tract_FB = np.full((frames, len(hz_B)), 0.02)
    for i, gain in enumerate((1.0, 0.6, 0.3)):
        formant_F1 = np.interp(time_F, centres_S, vowels_S[:, i])[:, None]
        tract_FB += gain / (1 + ((hz_B - formant_F1) / (45 + 0.04 * formant_F1)) ** 2)
    tract_FB *= hz_B > 70  # a voice has nothing below its fundamental
    hiss_F1 = np.interp(time_F, centres_S, rng.uniform(2500, 8000, len(lengths_S)))[:, None]
    hiss_FB = 1 / (1 + ((hz_B - hiss_F1) / 1500) ** 2)

    window_W = np.hanning(2 * hop + 1)[:-1]
    samples_FW = np.arange(frames)[:, None] * hop + np.arange(2 * hop)
    voice_FB = np.fft.rfft((glottis_N - glottis_N.mean())[samples_FW] * window_W)
    noise_FB = np.fft.rfft(rng.normal(0, 0.3, len(time_N))[samples_FW] * window_W)
    spectrum_FB = tract_FB * (voice_FB * voiced_F1 + noise_FB * noisy_F1) + hiss_FB * noise_FB * hissed_F1
    pieces_FW = np.fft.irfft(spectrum_FB * (0.52 + 0.48 * syllable_F[:, None]))
    speech = np.append(pieces_FW[:, :hop].ravel(), np.zeros(hop))
    speech[hop:] += pieces_FW[:, hop:].ravel()  # overlap-add: the second half of each frame, one hop later
    speech = speech[:length] / (np.abs(speech[:length]).max() + 1e-9)
    if rng.random() < 0.3:
        hum = np.sin(2 * np.pi * rng.choice((50, 60, 100, 120)) * time_N[:length])
        speech += 10 ** (rng.uniform(-45, -28) / 20) * (hum + make_noise(rng, length, rate, 80, rng.uniform(500, 5000)))
    return _tilt(speech, rate, rng.uniform(-1.5, 1.5))


def _sine(cycles_N: np.ndarray) -> np.ndarray:
    return np.sin(np.float32(2 * np.pi) * (cycles_N - np.floor(cycles_N)).astype(np.float32))


def _texture(rng: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    low_hz = 10 ** rng.uniform(1.5, 3.5)
    noise = make_noise(rng, round(seconds * rate), rate, low_hz, low_hz * 10 ** rng.uniform(0.3, 1.5))
    knots = np.arange(0, seconds + 1, rng.uniform(0.1, 0.8))
    level_db = np.interp(np.arange(len(noise)) / rate, knots, rng.uniform(-24, 0, len(knots)))
    return _tilt(noise * 10 ** (level_db / 20), rate, rng.uniform(-6, 1))


def make_noise(rng: np.random.Generator, length: int, rate: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Return noise between two frequencies, (length,) samples at `rate` Hz, of RMS 1."""
    padded = math.ceil(length / 1024) * 1024  # an FFT of a prime length is slow
    hz = np.fft.rfftfreq(padded, 1 / rate).astype(np.float32)
    band = 1 / (1 + np.square(np.square(low_hz / (hz + 1)))) / (1 + np.square(np.square(hz / high_hz)))
    spectrum = rng.standard_normal((len(hz), 2), np.float32).view(np.complex64)[:, 0] * band
    noise = np.fft.irfft(spectrum)[:length]
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
