"""Log-mel spectrograms: values computed by hand, and one frame per frame of the codec."""

import cmath
import math

import numpy as np
import pytest
from support import tone

from megascale import spectrogram
from megascale.spectrogram import log_mel
from megascale.tokens import num_frames

RATE_HZ, WINDOW, HOP, MELS = 24_000, 1024, 320, 64


def mel(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)


def hz(mels: float) -> float:
    return 700 * (10 ** (mels / 2595) - 1)


def band_edges_hz(band: int) -> tuple[float, float, float]:
    """Low edge, centre and high edge of a triangle; triangles overlap by half, even in mel from 0 to 12 kHz."""
    low, centre, high = (hz(mel(RATE_HZ / 2) * (band + i) / (MELS + 1)) for i in range(3))
    return low, centre, high


def log_mel_by_hand(audio: np.ndarray, band: int, frame: int) -> float:
    """One value of the spectrogram, sample by sample and bin by bin."""
    first = frame * HOP + HOP // 2 - WINDOW // 2
    inside = [float(audio[first + n]) if 0 <= first + n < len(audio) else 0.0 for n in range(WINDOW)]
    windowed = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / (WINDOW - 1))) for n, x in enumerate(inside)]
    low, centre, high = band_edges_hz(band)
    total = 0.0
    for k in range(WINDOW // 2 + 1):
        frequency = k * RATE_HZ / WINDOW
        if low < frequency < high:
            rising, falling = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
            value = sum(x * cmath.exp(-2j * math.pi * k * n / WINDOW) for n, x in enumerate(windowed))
            total += min(rising, falling) * abs(value) ** 2
    return math.log(total + 1e-6)


@pytest.mark.parametrize(("band", "frame"), [(0, 0), (7, 3), (40, 5), (63, 9)])
def test_log_mel_is_the_value_computed_by_hand(band, frame):
    audio = tone(0.13, RATE_HZ, 440)  # 3120 samples: the last of its 10 frames is padded
    # float32 holds seven digits of a logarithm between -14 and 11
    assert log_mel(audio)[band, frame] == pytest.approx(log_mel_by_hand(audio, band, frame), abs=1e-4)


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 1024, 24_000, 24_001])
def test_log_mel_has_one_frame_per_codec_frame(samples):
    found_MF = log_mel(np.ones(samples, dtype=np.float32))
    assert found_MF.shape == (MELS, num_frames(samples))
    assert found_MF.dtype == np.float32


def test_log_mel_frame_looks_at_the_samples_of_its_codec_frame():
    for frame in (0, 4, 9):
        audio = np.zeros(3200, dtype=np.float32)
        audio[frame * HOP + HOP // 2] = 1.0
        assert log_mel(audio).sum(axis=0).argmax() == frame


def test_tone_is_loudest_in_the_band_around_its_frequency():
    for band in (5, 20, 45):
        frequency = band_edges_hz(band)[1]
        audio = np.sin(2 * np.pi * frequency * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
        assert log_mel(audio).mean(axis=1).argmax() == band


def test_every_band_hears_something():
    noise = np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32)
    assert log_mel(noise).min() > math.log(1e-6) + 1  # an empty filter would give log 1e-6 throughout


def test_where_a_spectrogram_is_cut_to_blocks_changes_nothing(monkeypatch):
    audio = tone(1.0, RATE_HZ, 440)
    whole = log_mel(audio)
    monkeypatch.setattr(spectrogram, "_BLOCK_FRAMES", 16)
    # a matrix product of another size may add up in another order
    assert log_mel(audio) == pytest.approx(whole, abs=1e-5)
