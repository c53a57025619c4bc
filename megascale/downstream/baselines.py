"""What a model must beat: a logistic regression on log-mel statistics, or on how often each code occurs.

S samples, F spectrogram frames, M mel bands, N recordings, Q codebooks, T frames of codes, V codebook size.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from megascale.downstream.scores import score
from megascale.tokens import CODEBOOK_SIZE, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, num_frames

_WINDOW = 1024
_MELS = 64
_BLOCK_FRAMES = 2048  # 27 s; their windows take 34 MB as float64, where those of 10 minutes would take 740 MB
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def log_mel(audio_S: np.ndarray) -> np.ndarray:
    """Return the log-mel spectrogram of 24 kHz mono audio, float32 (M, F), one frame per codec frame.

    A frame's window is centred on the 320 samples of the codec's frame.
    """
    return np.concatenate(list(_log_mel_blocks(audio_S)), axis=1)


def log_mel_statistics(clips: Iterable[np.ndarray]) -> np.ndarray:
    """Return mean and standard deviation of each log-mel band over the frames of a recording's clips, float32 (2M,).

    One clip at a time is held.
    """
    count, sum_M, squares_M = 0, np.zeros(_MELS), np.zeros(_MELS)
    shift_M1 = None
    for audio_S in clips:
        for block_MF in _log_mel_blocks(audio_S):
            # sums of what is left of the first frame: a band that never changes deviates by 0, not by rounding errors
            shift_M1 = block_MF[:, :1].astype(np.float64) if shift_M1 is None else shift_M1
            shifted_MF = block_MF - shift_M1
            count += shifted_MF.shape[1]
            sum_M += shifted_MF.sum(axis=1)
            squares_M += (shifted_MF**2).sum(axis=1)
    assert shift_M1 is not None, "a recording has at least one clip"
    mean_M = sum_M / count
    deviation_M = np.sqrt(np.maximum(0, squares_M / count - mean_M**2))
    return np.concatenate([mean_M + shift_M1[:, 0], deviation_M]).astype(np.float32)


def bag_of_codes(clips: Iterable[np.ndarray]) -> np.ndarray:
    """Return how often each code of each codebook occurs in a recording's clips (codes_QT, int), float32 (Q V,).

    Square roots of shares, so that few frequent codes don't outweigh all others (the Hellinger map).
    """
    counts_QV = sum(
        np.stack([np.bincount(codes_T, minlength=CODEBOOK_SIZE) for codes_T in codes_QT]) for codes_QT in clips
    )
    assert isinstance(counts_QV, np.ndarray), "a recording has at least one clip"
    return np.sqrt(counts_QV / counts_QV.sum(axis=1, keepdims=True)).astype(np.float32).reshape(-1)


def _log_mel_blocks(audio_S: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the log-mel spectrogram in stretches of time, float32 (M, up to _BLOCK_FRAMES)."""
    count = num_frames(len(audio_S))
    before = (_WINDOW - SAMPLES_PER_FRAME) // 2
    after = (count - 1) * SAMPLES_PER_FRAME + _WINDOW - before - len(audio_S)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(audio_S, (before, after)), _WINDOW)[::SAMPLES_PER_FRAME]
    filters, taper = mel_filters(), np.hanning(_WINDOW)
    for first in range(0, count, _BLOCK_FRAMES):
        power = np.abs(np.fft.rfft(windows[first : first + _BLOCK_FRAMES] * taper, axis=1)) ** 2
        yield np.log(filters @ power.T + 1e-6).astype(np.float32)


def logistic_regression(
    features: dict[str, np.ndarray], targets: dict[str, np.ndarray], classes: list[str]
) -> dict[str, Any]:
    """Fit on `train`, choose the regularisation on `valid`, score on `test`.

    Args:
        features: by split, (N, K).
        targets: by split, (N,) class numbers.
        classes: their names.

    Returns:
        As `scores.score`, and the chosen strength `C`.
    """
    fits = []
    for strength in _STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        model.fit(features["train"], targets["train"])
        fits.append((float(model.score(features["valid"], targets["valid"])), strength, model))
    _, strength, model = max(fits, key=lambda fit: fit[0])
    return score(targets["test"], model.predict(features["test"]), classes) | {"C": strength}


def mel_filters() -> np.ndarray:
    """Triangular filters, (M, bins), even in mel = 2595 log10(1 + f/700)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, _MELS + 2) / 2595) - 1)
    bins_hz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ)
    rising = (bins_hz - edges_hz[:-2, None]) / (edges_hz[1:-1] - edges_hz[:-2])[:, None]
    falling = (edges_hz[2:, None] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))
