"""Token folders to batches: the same clips, crops, masks and drops for any ranks, micro-batches, and resume."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_token_folder

from megascale.data.folder import TokenFolder, split_held_out
from megascale.data.loader import Batch, DataConfig, PretrainBatches, collate, make_batch, prefetch, validation_batches
from megascale.data.order import Order
from megascale.data.resident import ResidentTokens
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import DataError

CLIPS, FRAMES, CROP = 40, 60, 30
CONFIG = DataConfig(url="", clip_seconds=0.4)  # 30 frames


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A folder of 40 random clips in 5 shards, and their codes_QT."""
    path = tmp_path_factory.mktemp("tokens")
    return path, write_token_folder(path, CLIPS, num_codebooks=4, frames=FRAMES)


@pytest.fixture
def folder(stored) -> TokenFolder:
    return TokenFolder(str(stored[0]), 1.5)


def batches_of(
    folder: TokenFolder,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int = 8,
    seed: int = 3,
    drop: DropConfig = DropConfig(p=0.5),  # noqa: B008
    streams: int = 4,
    global_batch: int = 8,
    config: DataConfig = CONFIG,
    mask: MaskConfig = MaskConfig(),  # noqa: B008
    resident: ResidentTokens | None = None,
) -> PretrainBatches:
    train, _, sizes = split_held_out(folder, 0.0)
    order = Order(sizes, seed, streams, global_batch)
    return PretrainBatches(folder, config, mask, drop, order, train, micro_batch, rank, world_size, resident)


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cut_from(codes_TQ: torch.Tensor, positions_T: torch.Tensor, stored_NQT: np.ndarray) -> tuple[int, int]:
    """Which stored clip these codes come from, and where its crop began; every code must be in its place."""
    for clip, codes_QT in enumerate(stored_NQT):
        for start in range(FRAMES - CROP + 1):
            if np.array_equal(codes_QT[:2, start + positions_T.numpy()].T, codes_TQ.numpy()):
                return clip, start
    raise AssertionError("these codes are in no clip")


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_any_ranks_and_micro_batches_and_memory_give_the_same_global_batch(folder, world_size, micro_batch, held):
    resident = ResidentTokens(folder, np.arange(CLIPS), torch.device("cpu")) if held else None
    for step in range(12):  # two epochs and a half, some steps with a drop and some without
        whole = joined(batches_of(folder).micro_batches(step))
        cut: list[Batch] = []
        for rank in range(world_size):
            source = batches_of(TokenFolder(folder.url, 1.5), rank, world_size, micro_batch, resident=resident)
            mine = source.micro_batches(step)
            assert [len(batch["codes_BTQ"]) for batch in mine] == [micro_batch] * (8 // world_size // micro_batch)
            cut += mine
        assert equal(whole, joined(cut))


def test_batch_after_resume_is_the_batch_of_the_straight_run(folder):
    straight = list(prefetch(batches_of(folder).micro_batches, 0, 12))
    for start in (1, 5, 9):
        resumed = prefetch(batches_of(TokenFolder(folder.url, 1.5)).micro_batches, start, 12)
        for expected, got in zip(straight[start:], resumed, strict=True):
            assert all(equal(a, b) for a, b in zip(expected, got, strict=True))


def test_steps_epochs_and_seeds_differ(folder):
    drawn = [joined(batches_of(folder, drop=DropConfig(p=0)).micro_batches(step)) for step in range(10)]
    drawn.append(joined(batches_of(folder, drop=DropConfig(p=0), seed=4).micro_batches(0)))
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert not torch.equal(a["codes_BTQ"], b["codes_BTQ"])
            assert not torch.equal(a["masked_BTQ"], b["masked_BTQ"])


def test_crop_and_mask_belong_to_the_clip_not_to_its_place_in_the_batch(stored, folder):
    def by_clip(streams: int, global_batch: int, epoch: int = 0) -> dict[int, tuple[int, torch.Tensor]]:
        source = batches_of(folder, streams=streams, global_batch=global_batch, drop=DropConfig(p=0))
        found = {}
        for step in range(CLIPS // global_batch):
            batch = joined(source.micro_batches(epoch * CLIPS // global_batch + step))
            for codes_TQ, masked_TQ in zip(batch["codes_BTQ"], batch["masked_BTQ"], strict=True):
                clip, start = cut_from(codes_TQ, torch.arange(CROP), stored[1])
                found[clip] = (start, masked_TQ)
        return found

    one, other = by_clip(4, 8), by_clip(1, 10)
    assert sorted(one) == sorted(other) == list(range(CLIPS))
    for clip in one:
        assert one[clip][0] == other[clip][0]
        assert torch.equal(one[clip][1], other[clip][1])
    assert len({start for start, _ in one.values()}) > 10, "crops start anywhere"
    later = by_clip(4, 8, epoch=1)
    assert sum(one[clip][0] == later[clip][0] for clip in one) < 10, "and are drawn anew in each epoch"
    assert not any(torch.equal(one[clip][1], later[clip][1]) for clip in one)


def test_drop_cuts_one_length_from_the_whole_batch_and_keeps_positions(stored, folder):
    lengths, gaps = set(), 0
    for step in range(10):
        batch = joined(batches_of(folder, drop=DropConfig(p=1), micro_batch=2).micro_batches(step))
        length = batch["codes_BTQ"].shape[1]
        assert 21 <= length <= 27, "10-30% of 30 frames are gone"
        assert "valid_BT" not in batch, "clips of one length need no padding"
        assert (batch["masked_BTQ"].sum(dim=1) == round(0.25 * length)).all()
        for codes_TQ, positions_T in zip(batch["codes_BTQ"], batch["positions_BT"], strict=True):
            cut_from(codes_TQ, positions_T, stored[1])
            assert positions_T.diff().tolist().count(1) >= length - 2, "one run is gone, so there is one gap at most"
            gaps += int((positions_T.diff() > 1).sum())
        lengths.add(length)
    assert len(lengths) > 2, "the share is drawn anew for every batch"
    assert gaps > 40, "most runs are dropped from the middle"


def test_closed_gap_drops_the_same_frames_and_renumbers_the_rest(folder):
    kept, closed = (
        joined(batches_of(folder, drop=DropConfig(p=1, close_gap=close)).micro_batches(1)) for close in (False, True)
    )
    assert torch.equal(kept["codes_BTQ"], closed["codes_BTQ"])
    assert torch.equal(closed["positions_BT"], torch.arange(kept["codes_BTQ"].shape[1]).expand(8, -1))
    assert not torch.equal(kept["positions_BT"], closed["positions_BT"])


def test_validation_is_the_same_each_time_and_drops_nothing(folder):
    clips = np.arange(3, 10)
    first, second = (
        list(validation_batches(TokenFolder(folder.url, 1.5), CONFIG, MaskConfig(), clips, 2, seed=3)) for _ in range(2)
    )
    assert [len(batch["codes_BTQ"]) for batch in first] == [2, 2, 2, 1]
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    other_batches = list(validation_batches(folder, CONFIG, MaskConfig(), clips, 7, seed=3))
    assert equal(joined(first), joined(other_batches))
    for batch in first:
        assert torch.equal(batch["positions_BT"], torch.arange(30).expand(len(batch["codes_BTQ"]), -1))
        assert (batch["masked_BTQ"].sum(dim=1) == round(0.25 * 30)).all()


def row(frames: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full((frames, 2), 7, dtype=np.int16), np.arange(5, 5 + frames)


def test_equal_lengths_are_not_padded():
    batch = collate([row(4), row(4)])
    assert set(batch) == {"codes_BTQ", "positions_BT"}
    assert (batch["codes_BTQ"].dtype, batch["positions_BT"].dtype) == (torch.int64, torch.int64)
    assert torch.equal(batch["codes_BTQ"], torch.full((2, 4, 2), 7))
    assert torch.equal(batch["positions_BT"], torch.arange(5, 9).expand(2, 4))


def test_padding_is_never_valid():
    batch = collate([row(2), row(5), row(1)])
    expected_BT = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert torch.equal(batch["valid_BT"], expected_BT)
    assert torch.equal(batch["codes_BTQ"], 7 * expected_BT[..., None].expand(3, 5, 2))


LENGTHS = [9, FRAMES, 31, 1, FRAMES, 30, 17, FRAMES] * 5


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """40 clips of six lengths, some shorter than a crop, and their codes_QT."""
    path = tmp_path_factory.mktemp("ragged")
    return path, write_token_folder(path, CLIPS, num_codebooks=5, frames=LENGTHS)


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("close_gap", [False, True])
def test_clips_of_several_lengths_are_padded_where_they_are_short(ragged, share, close_gap):
    folder = TokenFolder(str(ragged[0]), 2.25)
    drop = DropConfig(p=float(share > 0), min_share=share, max_share=share, close_gap=close_gap)
    source, seen = batches_of(folder, drop=drop), Counter()
    for step in range(5):
        batch, keys = joined(source.micro_batches(step)), source.keys(step)
        for i, key in enumerate(keys):
            clip = int(key.removeprefix("clip-"))
            crop = min(LENGTHS[clip], CROP)
            left = crop - min(round(share * crop), crop - 1)
            assert batch["valid_BT"][i].tolist() == [True] * left + [False] * (batch["valid_BT"].shape[1] - left)
            assert (batch["masked_BTQ"][i, :left].sum(dim=0) == max(1, round(0.25 * left))).all()
            for name in ("codes_BTQ", "positions_BT", "masked_BTQ"):
                assert not batch[name][i, left:].any(), "padding holds nothing"
            alone = make_batch(folder, folder, np.array([clip]), CROP, MaskConfig(), (3, 0), share, close_gap)
            for name in ("codes_BTQ", "positions_BT", "masked_BTQ"):
                assert torch.equal(batch[name][i, :left], alone[name][0])
            seen[left] += 1
    assert len(seen) == 4, "30 frames and three shorter lengths"


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stored_as", ["equal", "ragged"])
@pytest.mark.parametrize("kind", ["token", "span"])
def test_resident_batches_are_those_of_the_stream_bit_by_bit(request, num_codebooks, stored_as, kind, tmp_path):
    if stored_as == "ragged":
        path = request.getfixturevalue("ragged")[0]
    else:
        path = tmp_path
        write_token_folder(path, CLIPS, num_codebooks=num_codebooks + 1, frames=FRAMES)
    folder = TokenFolder(str(path), 0.75 * num_codebooks)
    train, valid, sizes = split_held_out(folder, 0.2)
    assert len(valid)
    resident = ResidentTokens(folder, train, torch.device("cpu"))
    order, mask = Order(sizes, 3, 4, 8), MaskConfig(kind=kind, span_frames=4)
    streamed, held = (
        PretrainBatches(folder, CONFIG, mask, DropConfig(p=0.5), order, train, 4, 1, 2, source)
        for source in (None, resident)
    )
    for step in range(8):
        for a, b in zip(streamed.micro_batches(step), held.micro_batches(step), strict=True):
            assert equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_made_on_a_gpu_are_those_of_the_stream_bit_by_bit(ragged):
    folder = TokenFolder(str(ragged[0]), 2.25)
    resident = ResidentTokens(folder, np.arange(CLIPS), torch.device("cuda", 0))
    for clips in (np.array([1, 4, 7, 12]), np.arange(CLIPS)):
        here, there = (
            make_batch(folder, source, clips, CROP, MaskConfig(), (3, 0), 0.2) for source in (folder, resident)
        )
        assert all(value.is_cuda for value in there.values())
        assert equal(here, {name: value.cpu() for name, value in there.items()})


def test_prefetch_yields_every_step_in_order():
    assert list(prefetch(lambda step: step * step, 3, 9)) == [9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, 5, 5)) == []


def test_prefetch_works_ahead_but_no_further_than_asked():
    made: list[int] = []
    ahead = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            ahead.set()
        return step

    batches = prefetch(make, 0, 100, depth=2)
    assert next(batches) == 0
    assert ahead.wait(10), "steps 1 and 2 wait in the queue, step 3 in the thread's hand"
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    batches.close()


def test_error_of_a_step_is_raised_at_that_step_and_not_before():
    def make(step: int) -> int:
        if step == 4:
            raise DataError("shard 4 is damaged")
        return step

    batches = prefetch(make, 2, 9)
    assert [next(batches), next(batches)] == [2, 3]
    with pytest.raises(DataError, match=r"^shard 4 is damaged$"):
        next(batches)


def test_prefetch_stops_its_thread_when_the_consumer_leaves_early():
    before = threading.active_count()
    batches = prefetch(lambda step: step, 0, 1000)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
