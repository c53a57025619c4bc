"""The baseline: log-mel statistics and a logistic regression that never sees the test set."""

import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support import tone

from megascale.downstream import baselines
from megascale.downstream.baselines import log_mel_statistics, logistic_regression
from megascale.spectrogram import log_mel

RATE_HZ, MELS = 24_000, 64
SPLITS = ("train", "valid", "test")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)


def test_statistics_are_mean_and_deviation_of_each_band():
    audio = tone(0.5, RATE_HZ, 440)
    statistics, spectrogram = log_mel_statistics([audio]), log_mel(audio)
    assert statistics.shape == (2 * MELS,)
    assert statistics.dtype == np.float32
    # float32 holds seven digits of values up to 14
    assert statistics[:MELS] == pytest.approx(spectrogram.mean(axis=1), abs=1e-5)
    assert statistics[MELS:] == pytest.approx(spectrogram.std(axis=1), abs=1e-5)


def test_statistics_are_over_the_frames_of_all_clips_of_a_recording():
    clips = [tone(0.5, RATE_HZ, 440), tone(1.25, RATE_HZ, 880), tone(0.1, RATE_HZ, 220)]
    spectrogram = np.concatenate([log_mel(clip) for clip in clips], axis=1)
    statistics = log_mel_statistics(iter(clips))
    assert statistics[:MELS] == pytest.approx(spectrogram.mean(axis=1), abs=1e-5)  # as above
    assert statistics[MELS:] == pytest.approx(spectrogram.std(axis=1), abs=1e-5)


def test_ten_minutes_take_less_than_a_quarter_of_a_gigabyte():
    audio = np.zeros(600 * RATE_HZ, dtype=np.float32)
    tracemalloc.start()
    try:
        log_mel_statistics([audio])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 250e6


def test_silence_gives_finite_features_that_can_be_classified():
    silence = log_mel_statistics([np.zeros(RATE_HZ, dtype=np.float32)])
    assert np.isfinite(silence).all()
    assert not silence[MELS:].any(), "what never changes has no deviation, not even a rounding error"
    features = np.stack([silence, silence, silence, silence])
    targets = np.array([0, 1, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic_regression(dict.fromkeys(SPLITS, features), dict.fromkeys(SPLITS, targets), ["a", "b"])
    assert found["accuracy"] == 0.5


# ------------------------------------------------------------------------------------------------ the classifier


def noisy_problem(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Two classes in 30 dimensions of which 2 tell anything: few samples, so that strengths differ."""
    rng = np.random.default_rng(seed)
    features, targets = {}, {}
    for split, count in (("train", 40), ("valid", 30), ("test", 200)):
        targets[split] = np.arange(count) % 2
        features[split] = rng.standard_normal((count, 30))
        features[split][:, :2] += 0.8 * targets[split][:, None]
    return features, targets


def accuracies(split: str, features: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> list[float]:
    found = []
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        model.fit(features["train"], targets["train"])
        found.append(float(model.score(features[split], targets[split])))
    return found


def test_strength_is_chosen_on_valid_even_where_test_would_choose_another():
    features, targets = noisy_problem(seed=6)
    on_valid, on_test = accuracies("valid", features, targets), accuracies("test", features, targets)
    best = int(np.argmax(on_valid))
    assert best not in (np.argmax(on_test), np.argmax(accuracies("train", features, targets))), "no test of the choice"
    found = logistic_regression(features, targets, ["a", "b"])
    assert found["C"] == STRENGTHS[best]
    assert found["accuracy"] == pytest.approx(on_test[best])


def test_model_does_not_depend_on_the_test_labels():
    features, targets = noisy_problem(seed=1)
    found = logistic_regression(features, targets, ["a", "b"])
    turned = logistic_regression(features, targets | {"test": 1 - targets["test"]}, ["a", "b"])
    assert turned["C"] == found["C"]
    # the same predictions against turned labels
    assert turned["confusion"] == found["confusion"][::-1]


def test_result_has_every_score():
    features, targets = noisy_problem(seed=0)
    found = logistic_regression(features, targets, ["a", "b"])
    assert {"accuracy", "macro_f1", "per_class", "confusion", "count", "C"} <= found.keys()
    assert found["count"] == 200


def test_bag_of_codes_is_the_root_of_each_codes_share_over_all_windows():
    first_QT, second_QT = np.array([[0, 1, 1], [5, 5, 5]]), np.array([[1], [7]])
    bag = baselines.bag_of_codes([first_QT, second_QT]).reshape(2, 1024)
    expected = np.zeros((2, 1024))
    expected[0, [0, 1]], expected[1, [5, 7]] = [0.25, 0.75], [0.75, 0.25]
    assert np.array_equal(bag, np.sqrt(expected).astype(np.float32))
