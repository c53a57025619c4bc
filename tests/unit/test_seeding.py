"""Seeding: a draw depends on its arguments alone, on every machine."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from megascale import seeding

PINNED_RAW = [14820236545663818995, 18026731573478843711]
PINNED_TORCH = 5707677879592738289
PINNED_SHARE = 0.9768436072693493
PINNED_HASH = 284129225945956533
PINNED_BITS = [2858657024226, 4821126038448]


def first(*arguments: int | str) -> list[int]:
    seed, purpose, *ids = arguments
    return seeding.generator(seed, purpose, *ids).integers(2**62, size=4).tolist()


def test_same_arguments_give_the_same_draws():
    assert first(1, "mask", 2, "clip") == first(1, "mask", 2, "clip")
    a, b = seeding.torch_generator(1, "mask", 2), seeding.torch_generator(1, "mask", 2)
    assert torch.equal(torch.rand(8, generator=a), torch.rand(8, generator=b))


@pytest.mark.parametrize(
    "other",
    [
        (2, "mask", 3, "ab"),
        (1, "crop", 3, "ab"),
        (1, "mask", 4, "ab"),
        (1, "mask", "3", "ab"),
        (1, "mask", 3, "a", "b"),
        (1, "mask", 3),
        (1, "mask", "ab", 3),
        (-1, "mask", 3, "ab"),
    ],
)
def test_any_changed_argument_gives_other_draws(other):
    assert first(1, "mask", 3, "ab") != first(*other)
    seed, purpose, *ids = other
    assert (
        seeding.torch_generator(1, "mask", 3, "ab").initial_seed()
        != seeding.torch_generator(seed, purpose, *ids).initial_seed()
    )


def test_draws_ignore_and_leave_alone_the_global_generators():
    expected = first(0, "order"), torch.rand(3, generator=seeding.torch_generator(0, "order")).tolist()
    np.random.seed(5)
    torch.manual_seed(5)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    got = first(0, "order"), torch.rand(3, generator=seeding.torch_generator(0, "order")).tolist()
    assert got == expected
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_draws_are_pinned_across_machines_and_releases():
    # Philox and mt19937 are counter and word exact everywhere; a change here would change every resumed run's order
    raw = seeding.generator(7, "order", 3, "clip").bit_generator.random_raw(2).tolist()
    assert raw == PINNED_RAW
    assert seeding.torch_generator(7, "order", 3, "clip").initial_seed() == PINNED_TORCH
    assert seeding.hash_share("held out", "clip-0001") == PINNED_SHARE


def test_another_process_with_another_hash_seed_draws_the_same():
    code = "from megascale import seeding; print(seeding.generator(7, 'order', 'clip').integers(2**62), "
    code += "seeding.torch_generator(7, 'order').initial_seed(), seeding.hash_share('a', 1))"
    there = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "12345"}, capture_output=True, text=True, check=True
    )
    here = f"{seeding.generator(7, 'order', 'clip').integers(2**62)} "
    here += f"{seeding.torch_generator(7, 'order').initial_seed()} {seeding.hash_share('a', 1)}\n"
    assert there.stdout == here


def test_neighbouring_ids_give_unrelated_streams():
    draws = np.stack([seeding.generator(0, "mask", i).random(4096) for i in range(8)])
    correlation = np.corrcoef(draws) - np.eye(8)
    # independent streams of 4096 correlate with a deviation of 1/64; six deviations never happen by chance
    assert np.abs(correlation).max() < 6 / 64


def test_hash_share_holds_out_the_asked_share():
    shares = np.array([seeding.hash_share("held out", f"clip-{i}") for i in range(20_000)])
    assert shares.min() >= 0
    assert shares.max() < 1
    for asked in (0.01, 0.1, 0.5):
        # a binomial share of 20,000; five deviations
        assert abs((shares < asked).mean() - asked) < 5 * (asked * (1 - asked) / 20_000) ** 0.5


def test_hash_share_of_a_clip_does_not_depend_on_the_others():
    assert seeding.hash_share("held out", "k") == seeding.hash_share("held out", "k")
    assert seeding.hash_share("held out", "k") != seeding.hash_share("held out", "l")


def test_draws_of_many_are_splitmix64():
    # the reference implementation's first outputs from this seed (Vigna, splitmix64.c)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = seeding.random_bits(torch.tensor(1234567), torch.arange(3), 63)
    assert drawn.tolist() == [word >> 1 for word in expected]
    assert [
        word % 2**64 for word in seeding.random_bits(torch.tensor(1234567), torch.arange(3), 64).tolist()
    ] == expected


@pytest.mark.parametrize("count", [1, 23, 31, 43, 63])
def test_random_bits_are_as_many_as_asked_for_and_each_is_set_half_the_time(count):
    drawn = seeding.random_bits(seeding.clip_seeds(torch.arange(100), 0, "bits")[:, None], torch.arange(100), count)
    assert drawn.min() >= 0
    for bit in range(count):
        # a binomial share of 10,000; five deviations
        assert abs(float((drawn >> bit & 1).double().mean()) - 0.5) < 5 * 0.5 / 100
    assert not (drawn >> count).any()


def test_seeds_of_clips_differ_by_clip_seed_purpose_and_id():
    hashes_B = torch.arange(-500, 500)
    drawn = [
        seeding.clip_seeds(hashes_B, *ids) for ids in ((0, "mask", 0), (1, "mask", 0), (0, "crop", 0), (0, "mask", 1))
    ]
    assert len(torch.cat(drawn).unique()) == 4000


def test_integers_below_are_uniform_for_each_bound():
    drawn = seeding.integers_below(seeding.clip_seeds(torch.arange(10_000), 0, "below"), torch.arange(10_000) % 10 + 1)
    for bound in range(1, 11):
        counts = torch.bincount(drawn[bound - 1 :: 10], minlength=bound).double()
        assert len(counts) == bound
        # binomial shares of 1,000; five deviations
        assert ((counts / 1000 - 1 / bound).abs() <= 5 * (1 / bound * (1 - 1 / bound) / 1000) ** 0.5).all()


def test_draws_of_many_are_pinned():
    # a change here would change every resumed run's crops, drops and masks
    assert seeding.hash_int64("clip-0001") == PINNED_HASH
    seeds_B = seeding.clip_seeds(torch.tensor([seeding.hash_int64("clip-0001"), 5]), 7, "mask", 3)
    assert seeding.random_bits(seeds_B, torch.tensor(2), 43).tolist() == PINNED_BITS
