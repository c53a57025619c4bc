"""Crop, chunk drop and masking: exact counts, no place favoured, each clip drawn apart, the same on every device."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megascale import seeding
from megascale.data.transforms import (
    DropConfig,
    MaskConfig,
    choose_smallest,
    choose_smallest_on_cpu,
    draw_drop_share,
    draw_kept_frames,
    draw_masks,
    draw_masks_by_sorting,
    draw_starts,
    removed_frames,
    valid_frames,
)
from megascale.errors import ConfigError

KINDS = ("token", "frame", "span")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def seeds(num_clips: int, seed: int = 0, epoch: int = 0) -> Tensor:
    """Seeds of so many clips."""
    return seeding.clip_seeds(torch.arange(num_clips), seed, "test", epoch)


def lengths(*values: int, clips: int = 1) -> np.ndarray:
    return np.array(values * clips, dtype=np.int64)


def masks(num_frames: int, num_codebooks: int, config: MaskConfig, clips: int = 5, seed: int = 0) -> np.ndarray:
    """masked_BTQ of clips of one length."""
    return draw_masks(seeds(clips, seed), lengths(num_frames, clips=clips), num_codebooks, config).numpy()


def evenly(counts: np.ndarray, num_draws: int, share: float) -> bool:
    """Whether counts of independent draws are a share of them: five standard deviations of a binomial."""
    return bool(np.abs(counts - num_draws * share).max() < 5 * (num_draws * share * (1 - share)) ** 0.5)


def lengths_of_runs(masked_T: np.ndarray) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], masked_T, [False]]).astype(int)))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_frames", "ratio", "count"), [(750, 0.25, 188), (75, 0.25, 19), (40, 0.5, 20), (9, 0.1, 1)]
)
@pytest.mark.parametrize("num_codebooks", [1, 2, 16])
def test_every_codebook_hides_exactly_its_share(kind, num_frames, ratio, count, num_codebooks):
    masked_BTQ = masks(num_frames, num_codebooks, MaskConfig(kind=kind, ratio=ratio))
    assert masked_BTQ.shape == (5, num_frames, num_codebooks)
    assert masked_BTQ.dtype == bool
    assert (masked_BTQ.sum(axis=1) == count).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_frames", "count"), [(1, 1), (2, 1), (3, 1)])
def test_the_shortest_clips_hide_one_frame_of_each_codebook(kind, num_frames, count):
    assert (masks(num_frames, 4, MaskConfig(kind=kind)).sum(axis=1) == count).all()


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_several_lengths_are_masked_as_each_would_be_alone(kind):
    config, lengths_B = MaskConfig(kind=kind, span_frames=7), lengths(40, 3, 75, 1, 40)
    together_BTQ = draw_masks(seeds(5), lengths_B, 2, config)
    assert together_BTQ.shape == (5, 75, 2)
    for clip, length in enumerate(lengths_B):
        alone_BTQ = draw_masks(seeds(5)[clip : clip + 1], lengths_B[clip : clip + 1], 2, config)
        assert torch.equal(together_BTQ[clip, :length], alone_BTQ[0])
        assert not together_BTQ[clip, length:].any(), "padding is never hidden"


def test_token_masks_differ_between_codebooks_and_the_other_kinds_hide_whole_frames():
    masked_TQ = masks(75, 8, MaskConfig(kind="token"), clips=1)[0]
    assert len({tuple(masked_T) for masked_T in masked_TQ.T}) == 8
    for kind in ("frame", "span"):
        masked_TQ = masks(75, 8, MaskConfig(kind=kind), clips=1)[0]
        assert (masked_TQ == masked_TQ[:, :1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_is_hidden_more_often_than_another(kind):
    hidden_TQ = masks(40, 2, MaskConfig(kind=kind, span_frames=5), clips=4000).sum(axis=0)
    assert evenly(hidden_TQ, 4000, 0.25)  # 80 counts pass five deviations with p < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_codebooks_clips_epochs_and_seeds_are_drawn_apart(kind):
    """Of two masks that each hide 10 of 40 frames, 2.5 frames are common on average, with a deviation of 1.2."""
    config, lengths_B = MaskConfig(kind=kind, span_frames=1), lengths(40, clips=2000)
    first, other_epoch, other_seed = (
        draw_masks(seeds(2000, seed, epoch), lengths_B, 2, config) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    pairs = [(first, other_epoch), (first, other_seed), (first, first.roll(1, dims=0))]
    if kind == "token":
        pairs.append((first, first.roll(1, dims=2)))
    for a, b in pairs:
        common = (a & b)[..., 0].sum(dim=1).double().mean()
        assert abs(common - 2.5) < 5 * 1.2 / 2000**0.5


@pytest.mark.parametrize("largest", [1, 3, 40, 2**31 - 1])
@pytest.mark.parametrize("count", [1, 7, 29, 30])
def test_of_equal_keys_the_first_are_hidden_wherever_the_masks_are_drawn(largest, count):
    """`choose_smallest`, which a GPU uses, asks nothing of its device, so it is tried on a CPU."""
    keys_BQT = rng(count).integers(-largest, largest, (20, 3, 30), dtype=np.int32)
    expected = np.zeros(keys_BQT.shape, dtype=bool)
    np.put_along_axis(expected, keys_BQT.argsort(axis=-1, kind="stable")[..., :count], True, axis=-1)
    assert np.array_equal(choose_smallest_on_cpu(keys_BQT, count), expected)
    assert np.array_equal(choose_smallest(torch.from_numpy(keys_BQT), np.full(20, count), None), expected)
    longer_BQT = np.concatenate([keys_BQT, np.full((20, 3, 5), -largest, dtype=np.int32)], axis=-1)
    found = choose_smallest(torch.from_numpy(longer_BQT), np.full(20, count), torch.arange(35).expand(20, -1) < 30)
    assert np.array_equal(found[..., :30], expected)
    assert not found[..., 30:].any(), "padding is never hidden"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_drawn_by_sorting_as_on_a_gpu_are_the_same_bits(kind):
    """It asks nothing of its device, so it is tried on a CPU: clips of one length and of several, few and many."""
    for number in range(100):
        draw = rng(number)
        lengths_B = (
            draw.integers(1, 60, draw.integers(1, 9)) if number % 2 else lengths(int(draw.integers(1, 60)), clips=5)
        )
        config = MaskConfig(kind=kind, ratio=float(draw.uniform(0.01, 0.99)), span_frames=int(draw.integers(1, 70)))
        arguments = (seeds(len(lengths_B), number), lengths_B, int(draw.integers(1, 33)), config)
        assert torch.equal(draw_masks_by_sorting(*arguments), draw_masks(*arguments))


def test_clip_that_is_too_long_to_be_masked_is_told():
    with pytest.raises(
        ConfigError, match=r"^data\.clip_seconds: a clip of 1048576 frames; at most 1048575 can be masked$"
    ):
        draw_masks(seeds(1), lengths(1 << 20), 1, MaskConfig())


def test_token_masks_of_two_codebooks_meet_at_every_pair_of_frames_alike():
    masked_BTQ = masks(8, 2, MaskConfig(ratio=0.25), clips=8000).astype(np.int64)
    both_TT = masked_BTQ[..., 0].T @ masked_BTQ[..., 1]  # how often frame t of one and frame u of the other are hidden
    assert evenly(both_TT, 8000, 1 / 16)


def test_span_hides_runs():
    for masked_T in masks(750, 1, MaskConfig(kind="span", span_frames=10), clips=20)[..., 0]:
        runs = lengths_of_runs(masked_T)
        # 188 frames in runs of 10: 19 if none touch; one is cut to 8, one may be cut in two by the clip's ends, and a
        # run that begins inside another makes one longer run of both
        assert sum(runs) == 188
        assert len(runs) <= 21
        assert sum(run < 10 for run in runs) <= 3
    scattered = lengths_of_runs(masks(750, 1, MaskConfig(kind="frame"), clips=1)[0, :, 0])
    assert len(scattered) > 100


@pytest.mark.parametrize("span_frames", [1, 3, 40, 1000])
def test_span_of_any_length_hides_the_exact_count(span_frames):
    for num_frames in (1, 2, 3, 40):
        config = MaskConfig(kind="span", span_frames=span_frames, ratio=0.5)
        assert (masks(num_frames, 1, config).sum(axis=1) == max(1, round(num_frames / 2))).all()


def kept(num_frames: int, share: float, clips: int = 50) -> np.ndarray:
    """kept_BT of clips of one length."""
    lengths_B = lengths(num_frames, clips=clips)
    return draw_kept_frames(seeds(clips), lengths_B, removed_frames(lengths_B, share)).numpy()


def test_drop_removes_one_run_of_the_share_asked_for():
    for kept_T in kept(100, 0.2):
        assert kept_T.dtype == np.int64
        dropped_T = np.setdiff1d(np.arange(100), kept_T)
        assert len(kept_T) == 80
        assert (np.diff(kept_T) > 0).all()
        assert np.array_equal(dropped_T, np.arange(dropped_T[0], dropped_T[0] + 20))


def test_drop_takes_the_first_the_last_and_any_frames_between_alike():
    starts_B = [int(np.setdiff1d(np.arange(10), kept_T)[0]) for kept_T in kept(10, 0.3, clips=4000)]
    assert evenly(np.bincount(starts_B, minlength=8), 4000, 1 / 8)
    assert len(set(starts_B)) == 8


def test_no_share_drops_nothing():
    assert np.array_equal(kept(75, 0.0), np.tile(np.arange(75), (50, 1)))


@pytest.mark.parametrize(
    ("num_frames", "share", "left"), [(1, 0.3, 1), (2, 0.3, 1), (3, 0.3, 2), (1, 0.99, 1), (2, 0.99, 1)]
)
def test_drop_leaves_at_least_one_frame(num_frames, share, left):
    assert kept(num_frames, share).shape == (50, left)


def test_clips_of_several_lengths_lose_their_share_each_and_are_padded_with_zeros():
    lengths_B = lengths(40, 10, 1)
    removed_B = removed_frames(lengths_B, 0.3)
    assert removed_B.tolist() == [12, 3, 0]
    kept_BT = draw_kept_frames(seeds(3), lengths_B, removed_B)
    assert kept_BT.shape == (3, 28)
    for clip, left in enumerate((28, 7, 1)):
        alone_BT = draw_kept_frames(seeds(3)[clip : clip + 1], lengths_B[clip : clip + 1], removed_B[clip : clip + 1])
        assert torch.equal(kept_BT[clip, :left], alone_BT[0])
        assert not kept_BT[clip, left:].any()


def test_frames_of_clips_of_one_length_are_all_valid_and_need_no_mask():
    assert valid_frames(lengths(5, 5), torch.device("cpu")) is None
    assert valid_frames(lengths(1, 3), torch.device("cpu")).tolist() == [[True, False, False], [True, True, True]]


def test_drop_share_lies_in_its_bounds_as_often_as_p_says():
    config = DropConfig()
    shares = np.array([draw_drop_share(config, rng(seed)) for seed in range(2000)])
    dropped = shares[shares > 0]
    assert dropped.min() >= 0.1
    assert dropped.max() <= 0.3
    # five standard deviations of a binomial share, sqrt(0.25 / 2000) = 0.011
    assert abs(len(dropped) / 2000 - 0.5) < 0.056
    # uniform in 0.1..0.3: mean 0.2, standard deviation of the mean of 1000 draws 0.0018
    assert abs(dropped.mean() - 0.2) < 0.01
    assert (dropped < 0.12).any()
    assert (dropped > 0.28).any()


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, 50)])
def test_drop_can_be_turned_off_and_made_certain(p, expected):
    assert sum(draw_drop_share(DropConfig(p=p), rng(seed)) > 0 for seed in range(50)) == expected


def test_drop_of_a_fixed_share():
    config = DropConfig(p=1, min_share=0.25, max_share=0.25)
    assert {draw_drop_share(config, rng(seed)) for seed in range(5)} == {0.25}


def test_shares_the_wrong_way_round_are_refused():
    with pytest.raises(ValidationError, match=r"min_share=0.4 must not be above max_share=0.3"):
        DropConfig(min_share=0.4)


@pytest.mark.parametrize("changes", [{"ratio": 0}, {"ratio": 1}, {"span_frames": 0}, {"kind": "word"}])
def test_impossible_masks_are_refused(changes):
    with pytest.raises(ValidationError):
        MaskConfig(**changes)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 75])
def test_part_that_is_the_whole_clip_begins_at_its_start(num_frames):
    assert not draw_starts(seeds(50), lengths(num_frames, clips=50), lengths(num_frames, clips=50)).any()


def test_crops_begin_at_every_place_alike_and_each_clips_apart_from_its_neighbours():
    starts_B = draw_starts(seeds(8000), lengths(12, clips=8000), lengths(9, clips=8000)).numpy()
    assert set(starts_B) == {0, 1, 2, 3}
    assert evenly(np.bincount(starts_B), 8000, 1 / 4)
    pairs = np.bincount(4 * starts_B[::2] + starts_B[1::2])
    assert evenly(pairs, 4000, 1 / 16)


def test_draws_for_different_purposes_are_unrelated():
    lengths_B = lengths(4, clips=8000)
    drawn = [
        draw_starts(seeding.clip_seeds(torch.arange(8000), 0, *ids), lengths_B, lengths_B - 3).numpy()
        for ids in (("crop", 0), ("drop", 0), ("crop", 1))
    ]
    for a, b in itertools.combinations(drawn, 2):
        assert evenly(np.bincount(4 * a + b, minlength=16), 8000, 1 / 16)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_their_seeds_alone(kind):
    def draws(seed: int) -> list[Tensor]:
        lengths_B = lengths(75, 60, 75)
        kept_BT = draw_kept_frames(seeds(3, seed), lengths_B, removed_frames(lengths_B, 0.2))
        return [kept_BT, draw_masks(seeds(3, seed), lengths_B, 2, MaskConfig(kind=kind))]

    torch.manual_seed(1)
    first = draws(3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, draws(4), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths_B", [lengths(75, 75, 75), lengths(75, 60, 3)])
def test_a_gpu_draws_the_same_bits(kind, lengths_B):
    removed_B, config = removed_frames(lengths_B, 0.2), MaskConfig(kind=kind)
    here, there = (
        [
            draw_starts(seeds_B, lengths_B, lengths_B - removed_B),
            draw_kept_frames(seeds_B, lengths_B, removed_B),
            draw_masks(seeds_B, lengths_B, 2, config),
        ]
        for seeds_B in (seeds(3), seeding.clip_seeds(torch.arange(3, device="cuda"), 0, "test", 0))
    )
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
