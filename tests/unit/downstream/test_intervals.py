"""The 95% interval of a mean accuracy, against what the books say."""

import numpy as np
import pytest
import scipy.stats

from megascale.downstream import intervals


def interval(accuracies: list[float], count: int = 100) -> tuple[float, float]:
    return intervals.interval([{"accuracy": value, "count": count} for value in accuracies])


@pytest.mark.parametrize(("right", "count"), [(69, 100), (11, 13), (13, 13), (0, 13), (1, 4096)])
def test_interval_of_one_seed_is_wilsons(right, count):
    # Wilson (1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    wanted = ((middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count))
    assert interval([share], count) == pytest.approx(wanted, abs=1e-6)  # z is given to seven digits


def test_interval_of_several_seeds_is_students_t():
    # mean 0.6, sample deviation 0.1, t(0.975, 2 degrees) = 4.3027
    half = 4.3027 * 0.1 / np.sqrt(3)
    assert interval([0.5, 0.6, 0.7]) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-4)  # t is given to five digits
    values = [0.41, 0.47, 0.44, 0.5]
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((wanted.low, wanted.high))
