"""The learning-rate schedule: where it starts, peaks and ends, and that it never leaves (0, 1]."""

import itertools
import math

import pytest
from pydantic import ValidationError

from megascale.train.schedule import OptimConfig, lr_factor


def factors(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(**settings)
    return [lr_factor(step, num_steps, config) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule):
    rise = factors(100, schedule=schedule, warmup_share=0.1)[:11]
    assert rise == pytest.approx([(i + 1) / 11 for i in range(11)])  # floats
    assert rise[10] == 1.0


def test_cosine_halves_midway_and_ends_at_its_final_share():
    f = factors(1000, warmup_share=0.0, final_share=0.1)
    assert f[0] == 1.0
    assert f[500] == pytest.approx(0.55)  # floats
    assert f[250] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    # the last of n steps lies (pi / 2n)^2 above the end
    assert f[-1] == pytest.approx(0.1, abs=3e-6)
    assert f[-1] > 0.1


@pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5])
def test_cosine_only_falls_after_warmup(warmup_share):
    f = factors(200, warmup_share=warmup_share)
    fall = f[round(warmup_share * 200) :]
    assert all(a > b for a, b in itertools.pairwise(fall))


def test_trapezoid_is_flat_then_falls_in_equal_steps_towards_zero():
    f = factors(100, schedule="trapezoid", warmup_share=0.1, decay_share=0.2)
    assert f[10:81] == [1.0] * 71
    assert f[80:] == pytest.approx([i / 20 for i in range(20, 0, -1)])  # floats


def test_final_share_of_one_stays_at_the_peak_after_warmup():
    assert factors(50, warmup_share=0.1, final_share=1.0)[5:] == [1.0] * 45


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
@pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("end", [{"final_share": 0.0, "decay_share": 1.0}, {"final_share": 1.0, "decay_share": 0.001}])
def test_every_step_of_every_schedule_moves_the_weights(num_steps, schedule, warmup_share, end):
    f = factors(num_steps, schedule=schedule, warmup_share=warmup_share, **end)
    assert all(0 < value <= 1 for value in f)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"lr": float("nan")},
        {"warmup_share": 1.0},
        {"final_share": 1.5},
        {"decay_share": 0},
        {"schedule": "linear"},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"clip_norm": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        OptimConfig(**settings)
