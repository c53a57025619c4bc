"""A token folder as training reads it: by offset, through few open files, and only what the manifest names."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import write_token_folder

from megascale.data import cache
from megascale.data.folder import TokenFolder, split_held_out, unigram_counts
from megascale.data.order import Order
from megascale.errors import DataError, TokenError


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A folder of 40 random clips in 5 shards, and their codes_QT."""
    path = tmp_path_factory.mktemp("tokens")
    return path, write_token_folder(path, 40, num_codebooks=4, frames=20)


@pytest.fixture
def copy(stored, tmp_path) -> Path:
    """The same folder, to be damaged."""
    return Path(shutil.copytree(stored[0], tmp_path / "copy"))


@pytest.mark.parametrize(("bitrate_kbps", "num_codebooks"), [(0.75, 1), (1.5, 2), (3.0, 4)])
def test_any_clip_is_read_in_any_order_at_any_bitrate_stored(stored, bitrate_kbps, num_codebooks):
    folder = TokenFolder(str(stored[0]), bitrate_kbps)
    clips = np.array([39, 0, 8, 7, 23, 39])
    codes_BTQ = folder.whole(clips)
    assert codes_BTQ.dtype == np.int16
    assert np.array_equal(codes_BTQ, np.stack([stored[1][clip][:num_codebooks].T for clip in clips]))
    assert [folder.key(clip) for clip in (39, 0, 8)] == ["clip-0039", "clip-0000", "clip-0008"]


@pytest.mark.parametrize("num_stored", [1, 2, 3, 4, 5, 7, 8, 16, 31, 32])
def test_any_stretches_of_any_clips_are_read_at_once_from_any_number_of_codebooks(tmp_path, num_stored):
    """At most of them the first code does not lie at a byte's start."""
    stored = write_token_folder(tmp_path, 40, num_stored, frames=[*range(41, 81)])
    rng = np.random.default_rng(num_stored)
    for num_codebooks in sorted({1, 2, num_stored - 1, num_stored} & {*range(1, num_stored + 1)}):
        folder = TokenFolder(str(tmp_path), 0.75 * num_codebooks)
        clips = rng.integers(0, 40, 100)
        for lengths_B in (np.full(100, 17), np.full(100, 41), rng.integers(1, 42, 100)):
            starts_B = rng.integers(0, folder.frames_N[clips] - lengths_B + 1)
            codes_BTQ = folder.codes(clips, starts_B, lengths_B)
            assert codes_BTQ.shape == (100, lengths_B.max(), num_codebooks)
            for codes_TQ, clip, start, length in zip(codes_BTQ, clips, starts_B, lengths_B, strict=True):
                assert np.array_equal(codes_TQ[:length], stored[clip][:num_codebooks, start : start + length].T)
                assert not codes_TQ[length:].any()


def test_more_codebooks_than_stored_are_refused(stored):
    with pytest.raises(DataError, match=f"^{stored[0]}: stored with 4 codebooks, data.bitrate_kbps=12.0 needs 16$"):
        TokenFolder(str(stored[0]), 12.0)


def test_shard_of_another_codec_is_refused_before_training(copy):
    index = copy / "tokens-000003.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"codec": "cd" * 32}))
    with pytest.raises(TokenError, match=f"^{index}: made by codec cdcdcdcd, the manifest says abababab$"):
        TokenFolder(str(copy), 1.5)


@pytest.mark.parametrize("where", [0, 600, -1])
def test_shard_with_a_changed_byte_is_refused_by_name(copy, where):
    path = copy / "tokens-000002.tar"
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    folder = TokenFolder(str(copy), 1.5)
    assert folder.whole(np.array([0])).shape == (1, 20, 2), "the other shards can be read"
    for _ in range(2):
        with pytest.raises(DataError, match=f"^{path}: its sha256 is not the one in the manifest"):
            folder.whole(np.array([0, 16]))


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer"])
def test_shard_of_another_size_is_refused_by_name(copy, how):
    path = copy / "tokens-000001.tar"
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes({"empty": b"", "cut": data[:-512], "longer": data + b"\0"}[how])
    with pytest.raises(DataError, match=f"^{path}: missing, or not the size that the manifest says$"):
        TokenFolder(str(copy), 1.5)


def test_few_shards_are_open_at_a_time_and_none_is_hashed_twice(stored, monkeypatch):
    hashed, sha256 = [], cache.hashlib.sha256
    monkeypatch.setattr(cache, "_MAX_MAPPED", 2)
    monkeypatch.setattr(cache.hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    folder = TokenFolder(str(stored[0]), 1.5)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for clip in [*range(40), *range(0, 40, 3)]:
        assert np.array_equal(folder.whole(np.array([clip]))[0], stored[1][clip][:2].T)
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 2
    everywhere = np.random.default_rng(0).permutation(40)
    codes_BTQ = folder.whole(everywhere)
    assert np.array_equal(codes_BTQ, np.stack([stored[1][clip][:2].T for clip in everywhere]))
    assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 2, "also when one batch needs more shards"
    assert len(hashed) == 5


def rewrite(path: Path, change: Callable[[bytearray, dict[str, Any]], None]) -> None:
    """Change a shard and its index, and let index and manifest say that this is what was committed."""
    index_path, manifest_path = path.with_suffix(".json"), path.parent / "manifest.json"
    data, index, manifest = (
        bytearray(path.read_bytes()),
        *(json.loads(p.read_text()) for p in (index_path, manifest_path)),
    )
    change(data, index)
    (facts,) = (facts for facts in manifest["shards"] if facts["name"] == path.name)
    for each in (index, facts):
        each |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_bytes(data)
    index_path.write_text(json.dumps(index))
    manifest_path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"ECDC", b"ECDX", r"not an \.ecdc stream"),
        (
            b"encodec_24khz+abababab",
            b"encodec_24khz+cdcdcdcd",
            "written by codec 'encodec_24khz.cdcdcdcd', the manifest",
        ),
        (b'"al": 6400', b'"al": 6080', "longer than its header says: "),
        (b'"al": 6400', b'"al": 6720', "truncated: "),
        (b'"nc": 4', b'"nc": 5', "truncated: "),
        (b'"lm": false', b'"lm": true ', "entropy-coded"),
    ],
)
def test_stream_that_is_not_what_its_index_says_is_named_when_its_shard_is_first_read(copy, old, new, reason):
    path = copy / "tokens-000002.tar"

    def change(data: bytearray, index: dict[str, Any]) -> None:
        start = index["clips"][3]["offset"]
        at = data.index(old, start)
        assert at < start + 100
        data[at : at + len(old)] = new

    rewrite(path, change)
    folder = TokenFolder(str(copy), 1.5)
    assert folder.whole(np.array([0])).shape == (1, 20, 2), "the other shards can be read"
    for clip in (19, 16):  # the clip itself, and another one of its shard
        with pytest.raises(TokenError, match=rf"^{path}:clip-0019\.ecdc: .*{reason}"):
            folder.whole(np.array([clip]))


def test_stream_of_the_right_size_with_other_frames_and_codebooks_is_named(copy):
    def change(data: bytearray, index: dict[str, Any]) -> None:
        start = index["clips"][3]["offset"]
        for old, new in ((b'"al": 6400', b'"al": 3200'), (b'"nc": 4', b'"nc": 8')):
            at = data.index(old, start)
            data[at : at + len(old)] = new

    rewrite(copy / "tokens-000002.tar", change)
    where = f"{copy}/tokens-000002.tar:clip-0019.ecdc"
    with pytest.raises(
        TokenError, match=f"^{where}: 10 frames of 8 codebooks; its index and the manifest say 20 of 4$"
    ):
        TokenFolder(str(copy), 1.5).whole(np.array([16]))


def test_index_with_other_frames_than_the_stream_is_named(copy):
    rewrite(copy / "tokens-000001.tar", lambda data, index: index["clips"][2].update(frames=21))
    where = f"{copy}/tokens-000001.tar:clip-0010.ecdc"
    with pytest.raises(
        TokenError, match=f"^{where}: 20 frames of 4 codebooks; its index and the manifest say 21 of 4$"
    ):
        TokenFolder(str(copy), 1.5).whole(np.array([8]))


@pytest.mark.parametrize(
    "wrong", [{"frames": 100}, {"frames": 0}, {"frames": 10**12}, {"size": 5000}, {"offset": -1}, {"offset": 10**9}]
)
def test_index_that_contradicts_itself_is_refused_by_name_before_training(copy, wrong):
    rewrite(copy / "tokens-000001.tar", lambda data, index: index["clips"][2].update(wrong))
    with pytest.raises(
        DataError, match=rf"^{copy}/tokens-000001\.json: clip-0010: .* frames of 4 codebooks cannot be "
    ):
        TokenFolder(str(copy), 1.5)


def test_a_clip_takes_few_bytes_of_memory(tmp_path):
    write_token_folder(tmp_path, 4000, frames=1, clips_per_shard=1000)
    TokenFolder(str(tmp_path), 1.5)  # what is imported or cached at the first use is no clip's
    tracemalloc.start()
    folder = TokenFolder(str(tmp_path), 1.5)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # 42 bytes of numbers, 9 of the key, and what the folder takes as a whole
    assert held / len(folder) < 80


def keys(folder: TokenFolder, clips: np.ndarray) -> set[str]:
    return {folder.key(clip) for clip in clips}


def test_held_out_clips_stay_held_out_when_the_corpus_grows(tmp_path):
    write_token_folder(tmp_path / "small", 100, frames=1)
    write_token_folder(tmp_path / "grown", 400, frames=1, clips_per_shard=30)
    small, grown = (TokenFolder(str(tmp_path / name), 1.5) for name in ("small", "grown"))
    held = [keys(folder, split_held_out(folder, 0.2)[1]) for folder in (small, grown)]
    assert held[0] == {key for key in held[1] if key < "clip-0100"}
    # five standard deviations of a binomial share: sqrt(0.2 x 0.8 / 400) = 0.02
    assert abs(len(held[1]) / 400 - 0.2) < 0.1
    # a larger share holds out the same clips and more
    assert held[1] < keys(grown, split_held_out(grown, 0.4)[1])


def test_clips_of_one_recording_lie_on_one_side_and_stay_there_when_the_corpus_grows(tmp_path):
    write_token_folder(tmp_path / "small", 100, frames=1, clips_per_recording=5)
    write_token_folder(tmp_path / "grown", 400, frames=1, clips_per_recording=5)
    sides = []
    for name in ("small", "grown"):
        folder = TokenFolder(str(tmp_path / name), 1.5)
        train, valid, _ = split_held_out(folder, 0.3)
        kept, held = ({f"recording-{clip // 5:04d}" for clip in side} for side in (train, valid))
        assert kept and held and not kept & held
        sides.append(held)
    assert sides[0] == {recording for recording in sides[1] if recording < "recording-0020"}


def test_split_parts_the_corpus_and_counts_what_each_shard_keeps(stored):
    folder = TokenFolder(str(stored[0]), 1.5)
    train, valid, sizes = split_held_out(folder, 0.25)
    assert len(valid) > 0
    assert np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(40))
    assert sizes == tuple(sum(clip // 8 == shard for clip in train) for shard in range(5))
    train, valid, sizes = split_held_out(folder, 0.0)
    assert (len(train), len(valid), sizes) == (40, 0, (8, 8, 8, 8, 8))
    train, valid, sizes = split_held_out(folder, 0.999)
    assert (len(train), len(valid), sizes) == (0, 40, (0, 0, 0, 0, 0)), "shards that keep nothing are counted too"


def test_folder_without_clips_is_refused_for_training(tmp_path):
    write_token_folder(tmp_path, 0, codes=np.zeros((0, 2, 1), dtype=int))
    _, _, sizes = split_held_out(TokenFolder(str(tmp_path), 1.5), 0.1)
    with pytest.raises(DataError, match="the corpus has only 0 clips to train on"):
        Order(sizes, 0, 1, 1)


def test_unigram_counts_are_counts(stored):
    folder = TokenFolder(str(stored[0]), 1.5)
    clips = np.array([0, 5, 11, 39])
    counts_QV = unigram_counts(folder, clips)
    assert counts_QV.shape == (2, 1024)
    for q in range(2):
        codes = [int(code) for clip in clips for code in stored[1][clip][q]]
        assert counts_QV[q].tolist() == [codes.count(code) for code in range(1024)]


def test_unigram_counts_of_a_large_corpus_come_from_clips_spread_over_it(stored):
    folder = TokenFolder(str(stored[0]), 1.5)
    counts_QV = unigram_counts(folder, np.arange(40), num_clips=10)
    assert np.array_equal(counts_QV, unigram_counts(folder, np.arange(0, 40, 4)))
    first_and_last_shard = [*range(8), *range(32, 40)]
    assert np.array_equal(
        unigram_counts(folder, np.arange(40), num_shards=2), unigram_counts(folder, np.array(first_and_last_shard))
    )


ENDS_IN_THE_MIDDLE = """
import sys, threading
sys.path[:0] = [{tests!r}, {root!r}]
import numpy as np
from pathlib import Path
from stores import HookedStore, hooked_copy
from megascale.data.folder import TokenFolder

with hooked_copy(Path({stored!r})) as url:
    folder, hangs = TokenFolder(url, 1.5), threading.Event()
    folder.whole(np.array([0]))
    HookedStore.hook = staticmethod(lambda name: (hangs.set(), threading.Event().wait()))
    folder.want([1, 2, 3, 4, 5])
    assert hangs.wait(30)
    print("end", flush=True)
    {end}
"""


@pytest.mark.parametrize(("end", "code"), [("sys.exit(0)", 0), ("raise ValueError", 1)])
def test_downloads_that_hang_do_not_keep_the_process_alive_and_its_temporary_folder_goes(tmp_path, end, code):
    stored, temporary = tmp_path / "tokens", tmp_path / "temporary"
    write_token_folder(stored, 48, frames=20)
    temporary.mkdir()
    root = Path(__file__).parents[3]
    script = ENDS_IN_THE_MIDDLE.format(tests=str(root / "tests"), root=str(root), stored=str(stored), end=end)
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "end\n"), done.stderr
    assert [path for path in temporary.rglob("*.tar") if path.is_file()] == []
