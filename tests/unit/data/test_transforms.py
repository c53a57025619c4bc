"""Crop, chunk drop and masking: exact counts, no place favoured, and nothing drawn from a global generator."""

import numpy as np
import pytest
from pydantic import ValidationError

from megascale.data.transforms import (
    DropConfig,
    MaskConfig,
    draw_crop,
    draw_drop_share,
    draw_kept_frames,
    draw_mask,
)

KINDS = ("token", "frame", "span")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


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
    for seed in range(5):
        masked_TQ = draw_mask(num_frames, num_codebooks, MaskConfig(kind=kind, ratio=ratio), rng(seed))
        assert masked_TQ.shape == (num_frames, num_codebooks)
        assert masked_TQ.dtype == bool
        assert masked_TQ.sum(axis=0).tolist() == [count] * num_codebooks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_frames", "count"), [(1, 1), (2, 1), (3, 1)])
def test_the_shortest_clips_hide_one_frame_of_each_codebook(kind, num_frames, count):
    masked_TQ = draw_mask(num_frames, 4, MaskConfig(kind=kind), rng())
    assert masked_TQ.sum(axis=0).tolist() == [count] * 4


def test_token_masks_differ_between_codebooks_and_the_other_kinds_hide_whole_frames():
    masked_TQ = draw_mask(75, 8, MaskConfig(kind="token"), rng())
    assert len({tuple(masked_T) for masked_T in masked_TQ.T}) == 8
    for kind in ("frame", "span"):
        masked_TQ = draw_mask(75, 8, MaskConfig(kind=kind), rng())
        assert (masked_TQ == masked_TQ[:, :1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_is_hidden_more_often_than_another(kind):
    num_draws, num_frames = 4000, 40
    config = MaskConfig(kind=kind, span_frames=5)
    generator = rng(1)
    hidden_TQ = sum(draw_mask(num_frames, 2, config, generator).astype(int) for _ in range(num_draws))
    # each count is binomial, p = 1/4: five standard deviations are 137, and 80 counts pass them with p < 5e-5
    allowed = 5 * (num_draws * 0.25 * 0.75) ** 0.5
    assert np.abs(hidden_TQ - num_draws * 0.25).max() < allowed


def test_codebooks_of_a_token_mask_are_drawn_apart():
    generator = rng(2)
    both = np.mean([draw_mask(40, 2, MaskConfig(), generator).all(axis=1).sum() for _ in range(1000)])
    # 10 of 40 twice: 2.5 frames in common on average, standard deviation 1.2 / sqrt(1000) = 0.04
    assert abs(both - 2.5) < 0.2


def test_span_hides_runs():
    for seed in range(20):
        runs = lengths_of_runs(draw_mask(750, 1, MaskConfig(kind="span", span_frames=10), rng(seed))[:, 0])
        # 188 frames in runs of 10: 19 if none touch; one is cut to 8, one may be cut in two by the clip's ends, and a
        # run that begins inside another makes one longer run of both
        assert sum(runs) == 188
        assert len(runs) <= 21
        assert sum(run < 10 for run in runs) <= 3
    scattered = lengths_of_runs(draw_mask(750, 1, MaskConfig(kind="frame"), rng())[:, 0])
    assert len(scattered) > 100


@pytest.mark.parametrize("span_frames", [1, 3, 40, 1000])
def test_span_of_any_length_hides_the_exact_count(span_frames):
    for num_frames in (1, 2, 3, 40):
        config = MaskConfig(kind="span", span_frames=span_frames, ratio=0.5)
        assert draw_mask(num_frames, 1, config, rng()).sum() == max(1, round(num_frames / 2))


def test_drop_removes_one_run_of_the_share_asked_for():
    for seed in range(50):
        kept_T = draw_kept_frames(100, 0.2, rng(seed))
        assert kept_T.dtype == np.int64
        dropped_T = np.setdiff1d(np.arange(100), kept_T)
        assert len(kept_T) == 80
        assert (np.diff(kept_T) > 0).all()
        assert np.array_equal(dropped_T, np.arange(dropped_T[0], dropped_T[0] + 20))


def test_drop_may_take_the_first_and_the_last_frames_and_any_between():
    starts = {int(np.setdiff1d(np.arange(10), draw_kept_frames(10, 0.3, rng(seed)))[0]) for seed in range(300)}
    # eight starts, each missed by 300 draws with p = 4e-18
    assert starts == set(range(8))


def test_no_share_drops_nothing():
    assert np.array_equal(draw_kept_frames(75, 0.0, rng()), np.arange(75))


@pytest.mark.parametrize(
    ("num_frames", "share", "kept"), [(1, 0.3, 1), (2, 0.3, 1), (3, 0.3, 2), (1, 0.99, 1), (2, 0.99, 1)]
)
def test_drop_leaves_at_least_one_frame(num_frames, share, kept):
    for seed in range(10):
        assert len(draw_kept_frames(num_frames, share, rng(seed))) == kept


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
def test_crop_of_a_clip_no_longer_than_asked_is_the_whole_clip(num_frames):
    for crop_frames in (num_frames, num_frames + 1, 750):
        assert draw_crop(num_frames, crop_frames, rng()) == slice(0, num_frames)


def test_crop_reaches_every_stretch_and_never_past_the_ends():
    crops = [draw_crop(12, 10, rng(seed)) for seed in range(100)]
    assert {(crop.start, crop.stop) for crop in crops} == {(0, 10), (1, 11), (2, 12)}


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_their_generator_alone(kind):
    def draws(seed: int) -> list[np.ndarray]:
        generator = rng(seed)
        share = draw_drop_share(DropConfig(p=1), generator)
        kept_T = draw_kept_frames(75, share, generator)
        return [np.array(share), kept_T, draw_mask(75, 2, MaskConfig(kind=kind), generator)]

    np.random.seed(1)
    first = draws(3)
    np.random.seed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, draws(3), strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, draws(4), strict=True))
