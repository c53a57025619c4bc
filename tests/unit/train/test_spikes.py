"""A jump is a spike; noise, a falling loss and a new level are none."""

import math

import numpy as np
import pytest

from megascale.train.spikes import SpikeDetector


def spikes(losses: list[float], stds: float = 6.0) -> list[int]:
    detector = SpikeDetector(stds)
    return [i for i, loss in enumerate(losses) if detector.update(loss) is not None]


def noisy(count: int, seed: int = 0) -> list[float]:
    return [float(x) for x in 3 + 0.1 * np.random.default_rng(seed).standard_normal(count)]


def test_noise_and_a_falling_loss_are_no_spikes():
    assert spikes(noisy(2000)) == []
    assert spikes([7 * math.exp(-i / 100) + 0.01 * x for i, x in enumerate(noisy(1000))]) == []


def test_jump_is_told_with_what_it_was_held_against():
    detector, before = SpikeDetector(6.0), noisy(60)
    for loss in before:
        detector.update(loss)
    spike = detector.update(5.0)
    assert spike is not None
    assert spike.loss == 5.0
    assert spike.mean == pytest.approx(np.mean(before[-50:]))
    assert spike.std == pytest.approx(np.std(before[-50:]))


def test_threshold_is_the_configured_number_of_standard_deviations():
    before = [2.0, 4.0] * 10  # mean 3, standard deviation 1
    assert spikes([*before, 5.9], stds=3) == []
    assert spikes([*before, 6.1], stds=3) == [20]
    assert spikes([*before, 6.1], stds=4) == []


def test_nothing_is_told_before_there_is_a_history():
    assert spikes([*noisy(9), 100.0]) == []
    assert spikes([*noisy(10), 100.0]) == [10]


def test_spike_does_not_hide_the_next_one():
    assert spikes([*noisy(50), 5.0, *noisy(3, seed=1), 5.0]) == [50, 54]


def test_level_that_lasts_is_no_spike_for_long():
    found = spikes([*noisy(50), *[5 + x - 3 for x in noisy(200, seed=1)]])
    assert found == list(range(50, 60))


def test_loss_that_stands_still_has_no_spikes_of_rounding():
    assert spikes([3.0] * 20 + [3.001]) == []
    assert spikes([3.0] * 20 + [3.1]) == [20]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_loss_that_is_no_number_is_left_to_others(broken):
    assert spikes([*noisy(50), broken, *noisy(50, seed=1)]) == []
