"""Batches from a remote token folder: those of a local one, from shards that were fetched before they were needed."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import HookedStore, hooked_copy, wait_until
from support import write_token_folder

from megascale.data import loader
from megascale.data.folder import TokenFolder, split_held_out, unigram_counts
from megascale.data.index import read_manifest
from megascale.data.loader import Batch, DataConfig, PretrainBatches, validation_batches
from megascale.data.order import Order
from megascale.data.transforms import DropConfig, MaskConfig

NUM_SHARDS, STEPS_PER_EPOCH = 10, 10


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """80 clips in ten shards of one size."""
    path = tmp_path_factory.mktemp("tokens")
    write_token_folder(path, 8 * NUM_SHARDS, num_codebooks=4, frames=60)
    return path


@pytest.fixture
def fetched(stored) -> Iterator[Counter[str]]:
    """How often each shard is fetched; the folder lies at `hooked://folder`."""
    count: Counter[str] = Counter()
    with hooked_copy(stored):
        HookedStore.hook = staticmethod(lambda name: count.update([name]) if name.endswith(".tar") else None)
        yield count


@pytest.fixture
def remote(fetched, tmp_path) -> Iterator[Callable[..., TokenFolder]]:
    """Open remote folders that are closed after the test, each with a cache that holds so many shards."""
    opened: list[TokenFolder] = []

    def open_folder(bound: float, cache: str = "cache") -> TokenFolder:
        size = read_manifest("hooked://folder").shards[0].size
        opened.append(TokenFolder("hooked://folder", 1.5, str(tmp_path / cache), bound * size / 1e9))
        return opened[-1]

    yield open_folder
    for folder in opened:
        folder.close()


class CountingOrder(Order):
    """Counts how often each step's batch is computed."""

    asked: Counter[int] = Counter()

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        self.asked[step] += 1
        return super().batch(step)


def batches_of(folder: TokenFolder, rank: int = 0, world_size: int = 1, cache_gb: float = 50.0) -> PretrainBatches:
    config = DataConfig(url="", clip_seconds=0.4, cache_gb=cache_gb)
    train, _, sizes = split_held_out(folder, 0.0)
    order = CountingOrder(sizes, seed=6, streams=4, global_batch=8, window=8)
    return PretrainBatches(folder, config, MaskConfig(), DropConfig(p=0.5), order, train, 2, rank, world_size)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bound", [0.5, 1, 4, NUM_SHARDS])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_batches_are_those_of_the_local_folder_bit_by_bit(stored, remote, bound, rank, world_size):
    local = batches_of(TokenFolder(str(stored), 1.5), rank, world_size)
    ours = batches_of(remote(bound), rank, world_size)
    for step in (*range(12), 3, 25):  # over the end of an epoch, back, and far ahead
        for expected, got in zip(local.micro_batches(step), ours.micro_batches(step), strict=True):
            assert equal(expected, got)


@pytest.mark.parametrize("bound", [1, 4, NUM_SHARDS])
def test_held_out_clips_and_counts_are_those_of_the_local_folder(stored, remote, bound):
    here, there, clips = TokenFolder(str(stored), 1.5), remote(bound), np.arange(0, 80, 3)
    config = DataConfig(url="", clip_seconds=0.4)
    drawn = [list(validation_batches(folder, config, MaskConfig(), clips, 4, seed=3)) for folder in (here, there)]
    assert all(equal(a, b) for a, b in zip(*drawn, strict=True))
    assert np.array_equal(unigram_counts(here, clips), unigram_counts(there, clips))


def test_each_shard_is_fetched_once_where_the_bound_permits(remote, fetched):
    batches = batches_of(remote(NUM_SHARDS))
    for step in range(3 * STEPS_PER_EPOCH):
        batches.micro_batches(step)
    assert len(fetched) == NUM_SHARDS and set(fetched.values()) == {1}


def test_a_sweep_fetches_ahead(remote, fetched):
    clips = remote(8 * NUM_SHARDS).sweep(np.arange(80))
    next(clips)
    wait_until(lambda: len(fetched) == NUM_SHARDS)


def test_a_sweep_over_more_than_the_bound_fetches_each_shard_once(remote, fetched):
    unigram_counts(remote(4), np.arange(80))
    assert len(fetched) == NUM_SHARDS and set(fetched.values()) == {1}


def test_shards_of_the_next_steps_and_epoch_come_before_they_are_needed(remote, fetched):
    folder = remote(3 * NUM_SHARDS)
    batches, order = batches_of(folder, rank=1, world_size=2), Order((8,) * NUM_SHARDS, 6, 4, 8, window=8)

    def needed(first: int, stop: int) -> set[str]:
        clips = np.concatenate([order.batch(step)[1][4:] for step in range(first, stop)])
        return {folder.shards[shard].name for shard in folder.shards_of(clips)}

    assert needed(0, 1) < needed(0, STEPS_PER_EPOCH) < needed(0, 16) < needed(0, 32)
    batches.micro_batches(0)
    wait_until(lambda: fetched.keys() == needed(0, 16))  # no more than 16 steps are looked at before a step
    batches.micro_batches(1)
    wait_until(lambda: fetched.keys() == needed(0, 32))
    fetched.clear()
    for step in range(2, 32):
        batches.micro_batches(step)
    assert not fetched


def test_what_is_wanted_is_what_the_next_steps_need_and_nothing_else(remote, monkeypatch):
    monkeypatch.setattr(loader, "_STEPS_AHEAD", 3)
    folder = remote(NUM_SHARDS)
    wanted: list[list[int]] = []
    monkeypatch.setattr(folder, "want", lambda shards: wanted.append(list(shards)))
    batches, order = batches_of(folder), Order((8,) * NUM_SHARDS, 6, 4, 8, window=8)
    for step in (0, 1, 2, 3, 9, 10, 4, 50):  # on, over the end of an epoch, back, and far ahead
        batches.micro_batches(step)
        needed = folder.shards_of(np.concatenate([order.batch(step + i)[1] for i in range(3)]))
        assert sorted(wanted[-1]) == sorted(needed)
    assert wanted[0] == folder.shards_of(np.concatenate([order.batch(i)[1] for i in range(3)])), "in order of need"


def test_looking_ahead_computes_each_step_once(remote):
    CountingOrder.asked.clear()
    batches = batches_of(remote(4))
    for step in range(50):
        batches.micro_batches(step)
    assert max(CountingOrder.asked.values()) == 2, "once ahead, once when it is made"
    assert len(CountingOrder.asked) <= 50 * 16


def test_bound_below_one_batch_is_told_once(remote, capsys):
    batches = batches_of(remote(1), cache_gb=2e-6)
    for step in range(3):
        batches.micro_batches(step)
    printed = capsys.readouterr().err
    assert printed.startswith("data.cache_gb=2e-06: one batch of a rank lies in shards of ")
    assert printed.count("fetched again and again") == 1
