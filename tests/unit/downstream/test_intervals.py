"""The 95% interval of a mean accuracy, against what the books say, and against how often it holds the truth."""

from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats

from megascale.downstream import intervals


def interval(accuracies: list[float], count: int = 100) -> tuple[float, float]:
    return intervals.interval([{"accuracy": value, "count": count} for value in accuracies])


def wilson(right: float, count: int) -> tuple[float, float]:
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z to seven digits
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


@pytest.mark.parametrize(("right", "count"), [(69, 100), (11, 13), (13, 13), (0, 13), (1, 4096)])
@pytest.mark.parametrize("seeds", [1, 5])
def test_interval_of_one_seed_or_of_seeds_that_agree_is_wilsons(right, count, seeds):
    found = interval([right / count] * seeds, count)
    assert found == pytest.approx(wilson(right, count), abs=1e-6)  # z is given to seven digits
    book = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    assert found == pytest.approx((book.low, book.high))


def test_where_recordings_are_many_the_interval_of_several_seeds_is_students_t():
    values, many = [0.41, 0.47, 0.44, 0.5], 10**12
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values, many) == pytest.approx((wanted.low, wanted.high), abs=1e-6)  # Wilson's is 1e-6 wide by then


def test_squares_of_both_half_widths_add_up():
    # mean 0.6, sample deviation 0.1, t(0.975, 2 degrees) = 4.3027
    student = 4.3027 * 0.1 / np.sqrt(3)
    low, high = wilson(60, 100)
    wanted = 0.6 - np.hypot(0.6 - low, student), 0.6 + np.hypot(high - 0.6, student)
    assert interval([0.5, 0.6, 0.7]) == pytest.approx(wanted, abs=1e-4)  # t is given to five digits


def test_disagreement_of_seeds_never_narrows_the_interval():
    agreeing, one_off = interval([9 / 12] * 5, 12), interval([9 / 12] * 4 + [10 / 12], 12)
    low, high = wilson(4 * 9 / 5 + 10 / 5, 12)
    assert one_off[0] < low and one_off[1] > high
    assert one_off[1] - one_off[0] > 0.95 * (agreeing[1] - agreeing[0])  # its mean lies a little nearer to 1
    assert interval([0.0, 1.0], 2) == (0.0, 1.0), "and it stays among shares"


@pytest.mark.parametrize(("count", "seeds", "spread"), [(50, 1, 0.0), (20, 3, 0.3), (50, 3, 0.0), (200, 5, 0.3)])
@pytest.mark.parametrize("redrawn", [False, True])
def test_interval_holds_the_true_accuracy_19_times_in_20(count, seeds, spread, redrawn):
    """Recordings are more or less hard, classifiers of seeds more or less able; seeds test the same ones, or others."""
    rng, trials = np.random.default_rng(0), 1000
    hardness = rng.standard_normal((trials, seeds if redrawn else 1, count))
    ability = spread * rng.standard_normal((trials, seeds, 1))
    luck = rng.standard_normal((trials, seeds, count))
    accuracies = (hardness + luck < 0.8 + ability).mean(axis=2)
    truth = NormalDist().cdf(0.8 / np.sqrt(2 + spread**2))
    found = [interval(list(of_trial), count) for of_trial in accuracies]
    held = np.mean([low <= truth <= high for low, high in found])
    assert held > 0.93  # 0.95, less what 1000 trials leave open (0.007)


def test_summary_is_the_mean_over_seeds():
    results = [{"accuracy": a, "macro_f1": f, "count": 20} for a, f in ((0.5, 0.2), (0.7, 0.4))]
    found = intervals.summarise(results)
    assert (found["accuracy"], found["macro_f1"], found["count"]) == pytest.approx((0.6, 0.3, 20))
    assert found["accuracy_ci95"] == list(interval([0.5, 0.7], 20))
