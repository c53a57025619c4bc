"""Tokens held in memory: the codes of the folder, in no more bytes than were promised, where there is room for them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_token_folder

from megascale.data.folder import TokenFolder
from megascale.data.packed import gather_codes, pack_clips, packed_bytes
from megascale.data.resident import ResidentTokens, check_room, resident_bytes
from megascale.errors import ConfigError

LENGTHS = [*range(1, 21)] * 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 3, 4, 5, 8])
def stored(request, tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """400 clips of 1 to 20 frames, and their codes_QT; some parts of a sweep are of one length, none of one shard."""
    path = tmp_path_factory.mktemp("tokens")
    return path, write_token_folder(path, 400, num_codebooks=request.param, frames=LENGTHS, clips_per_shard=150)


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4, 5, 8])
def test_some_clips_are_held_at_the_bitrate_that_is_read(stored, num_codebooks):
    path, codes = stored
    if num_codebooks > len(codes[0]):
        pytest.skip("more than are stored")
    folder, clips = TokenFolder(str(path), 0.75 * num_codebooks), np.arange(1, 400, 3)
    held = ResidentTokens(folder, clips, CPU)
    drawn = np.random.default_rng(0).permutation(clips)
    lengths_B = folder.frames_N[drawn].astype(np.int64)
    starts_B = lengths_B // 3
    codes_BTQ = held.codes(drawn, starts_B, lengths_B - starts_B)
    for codes_TQ, clip, start in zip(codes_BTQ, drawn, starts_B, strict=True):
        expected = codes[clip][:num_codebooks, start:].T
        assert np.array_equal(codes_TQ[: len(expected)], expected)


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4, 5, 8])
def test_what_a_gpu_would_gather_are_the_same_codes(stored, num_codebooks):
    """`gather_codes` asks nothing of its device, so it is tried on a CPU."""
    path, codes = stored
    if num_codebooks > len(codes[0]):
        pytest.skip("more than are stored")
    folder, clips = TokenFolder(str(path), 0.75 * num_codebooks), np.arange(400)
    data = torch.from_numpy(pack_clips(folder.whole(clips), folder.frames_N))
    assert data.numel() == resident_bytes(folder, clips, "gpu")
    sizes_B = packed_bytes(folder.frames_N.astype(np.int64) * num_codebooks)
    frame_BT = torch.from_numpy(folder.frames_N.astype(np.int64))[:, None] - torch.arange(1, 3)
    frame_BT = frame_BT.clamp(min=0)  # the last two of each clip, the last one first
    codes_BTQ = gather_codes(data, torch.from_numpy(np.cumsum(sizes_B) - sizes_B), frame_BT, num_codebooks)
    assert codes_BTQ.dtype == torch.int64
    for codes_TQ, frame_T, codes_QT in zip(codes_BTQ, frame_BT, codes, strict=True):
        assert np.array_equal(codes_TQ.numpy(), codes_QT[:num_codebooks, frame_T.numpy()].T)


def test_ten_seconds_take_3000_bytes_on_a_cpu_and_1875_on_a_gpu_of_a_corpus_stored_at_any_bitrate(tmp_path):
    write_token_folder(tmp_path, 10, num_codebooks=8, frames=750)
    folder, clips = TokenFolder(str(tmp_path), 1.5), np.arange(1, 10)
    assert resident_bytes(folder, clips, "gpu") == 9 * 1875
    assert resident_bytes(folder, clips, "cpu") == 9 * 3000
    assert ResidentTokens(folder, clips, CPU)._data.nbytes == 9 * 3000


def test_reading_shows_how_far_it_is(stored, capsys):
    folder = TokenFolder(str(stored[0]), 0.75)
    ResidentTokens(folder, np.arange(400), CPU, title="holding tokens")
    assert "holding tokens" in capsys.readouterr().err
    ResidentTokens(folder, np.arange(400), CPU)
    assert not capsys.readouterr().err


def test_too_little_memory_is_told_in_numbers(monkeypatch):
    check_room(1000, "cpu", 1000)
    with pytest.raises(ConfigError, match=r"^data\.resident=cpu: the training clips take 1000000.00 GB for each of 1 "):
        check_room(10**15, "cpu", 0)
    with pytest.raises(ConfigError, match=r"training about 1000000\.00 GB, and "):
        check_room(1000, "cpu", 10**15)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))  # each of so many ranks would take it
    with pytest.raises(ConfigError, match=r"take 0\.00 GB for each of 1000000000 ranks, .* and 0\.00 GB are free"):
        check_room(1000, "cpu", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_gpu_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match=r"^data\.resident=gpu: there is no CUDA GPU here$"):
        check_room(1, "gpu", 0)
