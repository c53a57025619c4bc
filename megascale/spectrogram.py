"""Log-mel spectrograms, one frame per frame of the codec.

S samples, F spectrogram frames, M mel bands.
"""

from collections.abc import Iterator

import numpy as np

from megascale.tokens import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, num_frames

MELS = 64
_WINDOW = 1024
_BLOCK_FRAMES = 2048  # 27 s; their windows take 34 MB as float64, where those of 10 minutes would take 740 MB


def log_mel(audio_S: np.ndarray) -> np.ndarray:
    """Return the log-mel spectrogram of 24 kHz mono audio, float32 (M, F), one frame per codec frame.

    A frame's window is centred on the 320 samples of the codec's frame.
    """
    return np.concatenate(list(log_mel_blocks(audio_S)), axis=1)


def log_mel_blocks(audio_S: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the log-mel spectrogram in stretches of time, float32 (M, up to _BLOCK_FRAMES)."""
    count = num_frames(len(audio_S))
    before = (_WINDOW - SAMPLES_PER_FRAME) // 2
    after = (count - 1) * SAMPLES_PER_FRAME + _WINDOW - before - len(audio_S)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(audio_S, (before, after)), _WINDOW)[::SAMPLES_PER_FRAME]
    filters, taper = mel_filters(), np.hanning(_WINDOW)
    for first in range(0, count, _BLOCK_FRAMES):
        power = np.abs(np.fft.rfft(windows[first : first + _BLOCK_FRAMES] * taper, axis=1)) ** 2
        yield np.log(filters @ power.T + 1e-6).astype(np.float32)


def mel_filters() -> np.ndarray:
    """Triangular filters, (M, bins), even in mel = 2595 log10(1 + f/700)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    bins_hz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ)
    rising = (bins_hz - edges_hz[:-2, None]) / (edges_hz[1:-1] - edges_hz[:-2])[:, None]
    falling = (edges_hz[2:, None] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))
