"""The order of clips: a pure function of (seed, step), no clip twice in an epoch, none left out for good."""

import itertools

import numpy as np
import pytest

from megascale.data.order import Order, _permutation, default_streams
from megascale.errors import ConfigError, DataError

CORPORA = [
    Order((8,) * 8, seed=1, streams=4, global_batch=8, window=4),
    Order((7, 0, 5, 11, 0, 0, 3, 0), seed=2, streams=2, global_batch=4, window=8),
    Order((40,), seed=3, streams=3, global_batch=6),
    Order((3, 2, 1), seed=4, streams=1, global_batch=6),
    Order((0, 0, 9, 0), seed=5, streams=1, global_batch=2, window=1),
    Order((1,) * 50, seed=6, streams=8, global_batch=8, window=3),
]
LARGE = Order((100,) * 64, seed=7, streams=16, global_batch=32, window=128)


def epoch_of(order: Order, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch."""
    steps = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
    return [order.batch(step)[1] for step in steps]


def rebuilt(order: Order) -> Order:
    """The same order in a process that has drawn nothing yet."""
    _permutation.cache_clear()
    return Order(order.shard_sizes, order.seed, order.streams, order.global_batch, order.window)


@pytest.mark.parametrize("order", CORPORA)
def test_batch_depends_on_seed_and_step_alone(order):
    steps = list(range(3 * order.batches_per_epoch))
    forward = [order.batch(step) for step in steps]
    backward = [rebuilt(order).batch(step) for step in reversed(steps)]
    for (epoch, clips), (epoch_again, clips_again) in zip(forward, reversed(backward), strict=True):
        assert epoch == epoch_again
        assert np.array_equal(clips, clips_again)


def test_order_is_the_same_on_every_machine_and_version():
    # golden values: a resumed run must not change its data because the package was upgraded
    order = Order((5, 0, 4, 6), seed=11, streams=2, global_batch=4, window=4)
    golden = [[7, 0, 11, 9], [8, 1, 10, 12], [2, 4, 14, 13], [8, 6, 13, 0]]
    assert [order.batch(step)[1].tolist() for step in range(4)] == golden


@pytest.mark.parametrize("order", CORPORA)
def test_no_clip_comes_twice_in_an_epoch(order):
    for epoch in range(5):
        clips = np.concatenate(epoch_of(order, epoch))
        assert len(clips) == order.batches_per_epoch * order.global_batch
        assert len(np.unique(clips)) == len(clips)
        assert clips.min() >= 0
        assert clips.max() < order.num_clips


@pytest.mark.parametrize("order", CORPORA)
def test_an_epoch_leaves_out_less_than_a_clip_per_stream_and_a_batch(order):
    assert order.num_clips - order.batches_per_epoch * order.global_batch < order.streams + order.global_batch


@pytest.mark.parametrize("order", CORPORA)
def test_every_clip_comes_within_some_epochs(order):
    # an epoch leaves out an eighth of these corpora at most, at random places: 40 leave out one clip with p < 8^-40
    seen = np.unique(np.concatenate([clip for epoch in range(40) for clip in epoch_of(order, epoch)]))
    assert np.array_equal(seen, np.arange(order.num_clips))


def test_whole_epochs_cover_the_corpus_exactly_where_nothing_is_left_over():
    order = CORPORA[0]
    for epoch in range(3):
        assert np.array_equal(np.sort(np.concatenate(epoch_of(order, epoch))), np.arange(64))


def test_epoch_is_counted_by_whole_batches():
    order = Order((10, 11), seed=0, streams=2, global_batch=4)
    assert order.batches_per_epoch == 5
    assert [order.batch(step)[0] for step in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equal_parts_of_the_batches_read_shards_of_their_own(world_size):
    """Rank r serves the r-th part of every global batch: over an epoch, ranks share only the shards they meet in."""
    parts = np.stack(epoch_of(LARGE, 1)).reshape(-1, world_size, LARGE.global_batch // world_size)
    shards_of_rank = [np.unique(parts[:, rank] // 100) for rank in range(world_size)]
    assert len(np.unique(np.concatenate(shards_of_rank))) == 64
    assert sum(len(shards) for shards in shards_of_rank) <= 64 + world_size


def test_a_stream_reads_few_shards_at_a_time():
    """What makes reading cheap: a stream's next clips come from its window of 128 clips, so from 3 shards of 100."""
    for stream in range(LARGE.streams):
        batches = [LARGE.batch(step)[1].reshape(LARGE.streams, -1)[stream] for step in range(32)]
        assert len(np.unique(np.concatenate(batches) // 100)) <= 3


def test_epochs_and_seeds_have_different_orders():
    first, second = np.concatenate(epoch_of(LARGE, 0)), np.concatenate(epoch_of(LARGE, 1))
    other = Order(LARGE.shard_sizes, 8, LARGE.streams, LARGE.global_batch, LARGE.window)
    other_seed = np.concatenate(epoch_of(other, 0))
    # two random orders of 6,400 clips agree at one place on average; ten or more has p < 1e-6
    assert (first == second).sum() < 10
    assert (first == other_seed).sum() < 10


def test_a_batch_draws_from_many_shards():
    # 16 streams 400 clips apart in a sequence of shards of 100: each stream is in shards of its own
    for step in range(0, 200, 23):
        assert len(np.unique(LARGE.batch(step)[1] // 100)) >= 16


def test_neighbours_of_a_shard_are_pulled_apart():
    """A corpus is often sorted by class inside its shards: the clip after the next one must not be its neighbour."""
    clips = np.stack([LARGE.batch(step)[1] for step in range(100)]).reshape(100, LARGE.streams, -1)
    in_turn = clips.transpose(1, 0, 2).reshape(LARGE.streams, -1)
    # a window holds 128 clips: clip i is followed by i + 1 in 1 of 128; without the shuffle, in 99 of 100
    assert (np.diff(in_turn, axis=1) == 1).mean() < 0.05


def test_shards_follow_each_other_differently_in_each_epoch():
    order = Order((4,) * 32, seed=9, streams=1, global_batch=128, window=1)  # nothing but the order of shards
    turns = [order.batch(epoch)[1][::4] // 4 for epoch in range(3)]
    followers = [set(itertools.pairwise(shards.tolist())) for shards in turns]
    # 31 random pairs of 32 x 31 possible ones: two epochs share one on average, ten or more with p < 1e-6
    assert all(len(a & b) < 10 for a, b in itertools.combinations(followers, 2))
    in_turn = {(shard, (shard + 1) % 32) for shard in range(32)}
    assert all(len(a & in_turn) < 10 for a in followers)


def test_windows_are_shuffled_differently_in_each_epoch_and_stream():
    order = Order((64,), seed=9, streams=2, global_batch=64, window=64)  # one shard: nothing but the shuffle
    turns = [half for epoch in range(2) for half in order.batch(epoch)[1].reshape(2, 32)]
    for a, b in itertools.combinations(turns, 2):
        # had two of them one permutation, they would differ by a turn alone
        assert len(np.unique((a - b) % 64)) > 8


@pytest.mark.parametrize(("streams", "global_batch"), [(3, 8), (16, 8), (5, 4)])
def test_streams_that_do_not_divide_the_batch_are_refused(streams, global_batch):
    with pytest.raises(ConfigError, match=f"^data.streams={streams}: must divide train.global_batch={global_batch}$"):
        Order((100,), 0, streams, global_batch)


@pytest.mark.parametrize("shard_sizes", [(), (0,), (0, 0), (3, 4)])
def test_too_few_clips_are_refused(shard_sizes):
    with pytest.raises(DataError, match=f"train.global_batch=8: the corpus has only {sum(shard_sizes)} clips to train"):
        Order(shard_sizes, 0, 4, 8)


def test_a_corpus_of_one_batch_is_enough():
    order = Order((3, 5), 0, 4, 8)
    assert order.batches_per_epoch == 1
    assert sorted(order.batch(0)[1].tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("global_batch", "streams"), [(1, 1), (2, 2), (48, 48), (64, 64), (96, 48), (256, 64), (67, 1), (134, 2)]
)
def test_default_streams_divide_the_batch(global_batch, streams):
    assert default_streams(global_batch) == streams
