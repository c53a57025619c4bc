"""What a model must beat: a logistic regression on log-mel statistics, or on how often each code occurs.

S samples, M mel bands, N recordings, Q codebooks, T frames of codes, V codebook size.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from megascale.downstream.scores import score
from megascale.spectrogram import MELS, log_mel_blocks
from megascale.tokens import CODEBOOK_SIZE

_STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def log_mel_statistics(clips: Iterable[np.ndarray]) -> np.ndarray:
    """Return mean and standard deviation of each log-mel band over the frames of a recording's clips, float32 (2M,).

    One clip at a time is held.
    """
    count, sum_M, squares_M = 0, np.zeros(MELS), np.zeros(MELS)
    shift_M1 = None
    for audio_S in clips:
        for block_MF in log_mel_blocks(audio_S):
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
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fits = []
    for strength in _STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        model.fit(features["train"], targets["train"])
        fits.append((float(model.score(features["valid"], targets["valid"])), strength, model))
    _, strength, model = max(fits, key=lambda fit: fit[0])
    return score(targets["test"], model.predict(features["test"]), classes) | {"C": strength}
