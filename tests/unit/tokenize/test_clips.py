"""Clips: where recordings are cut, and keys that are unique, safe and the same wherever a corpus lies."""

import math

import pytest
from support import listed, touch, without_place

from megascale import storage
from megascale.tokenize.clips import Clip, ClipsConfig, Recording, cut

PINNED_KEY = "a-6b9e6f7d3cb4"


def keys(recordings: list[Recording]) -> list[str]:
    return [clip.key for r in recordings for clip in cut(r, 30.0, ClipsConfig())]


# -------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_unique_stable_and_safe_in_a_shard(tmp_path):
    names = [
        "a.b.c.wav",
        "a_b_c.wav",
        "a/b/c.wav",
        "a b c.wav",
        "abc.wav",
        "abc.flac",
        "ä–ö.wav",
        "日本.wav",
        f"{'x' * 150}.wav",
    ]
    touch(tmp_path, *names)
    recordings = listed("files", tmp_path)
    assert len(recordings) == len(names)
    made = keys(recordings)
    assert len(set(made)) == len(made) == 3 * len(names)
    for key in made:
        # WebDataset ends a key at its first dot, and a USTAR name holds 100 bytes
        assert set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
        assert len(key) + len(".ecdc") <= 100
    assert keys(listed("files", tmp_path)) == made


def test_key_of_a_clip_is_pinned():
    # keys fix held-out shares, masks and the names inside shards: they may not change between releases
    clip = cut(Recording("/x/low/a.wav", "low/a.wav"), 30.0, ClipsConfig())[1]
    assert clip.key == PINNED_KEY


def test_names_and_keys_are_the_same_wherever_the_corpus_lies(tmp_path):
    names = ("low/a.wav", "low/b c.wav", "high/d.wav")
    touch(tmp_path / "here", *names)
    touch(tmp_path / "far" / "away", *names)
    for name in names:
        storage.publish_bytes(f"memory:/{tmp_path}/{name}", b"")
    places = [f"{tmp_path}/here", f"{tmp_path}/far/away/", f"file://{tmp_path}/here", f"memory:/{tmp_path}"]
    corpora = [listed("files", place, label_from_folder=True) for place in places]
    assert all(without_place(corpus) == without_place(corpora[0]) for corpus in corpora)
    assert all(keys(corpus) == keys(corpora[0]) for corpus in corpora)


# --------------------------------------------------------------------------------------------------------------- cut


def lengths(clips: list[Clip]) -> list[tuple[float, float | None]]:
    return [(c.start_seconds, c.duration_seconds) for c in clips]


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (30.0, [(0, 10), (10, 10), (20, 10)]),
        (25.5, [(0, 10), (10, 10), (20, 5.5)]),
        (21.0, [(0, 10), (10, 10), (20, 1.0)]),
        (20.5, [(0, 10), (10, 10)]),  # a rest under min_seconds is left out
        (10.0, [(0, 10)]),
        (9.99, [(0, 9.99)]),
        (0.3, [(0, 0.3)]),  # a short recording is kept whole: only a rest is left out
        (30.013, [(0, 10), (10, 10), (20, 10)]),
        (29.9999999999, [(0, 10), (10, 10), (20, 10)]),  # a length rounded in floating point
    ],
)
def test_recording_is_cut_to_clips_and_a_rest(total, expected):
    clips = cut(Recording("/x/a.wav", "a.wav"), total, ClipsConfig())
    assert [(s, pytest.approx(d, abs=1e-6)) for s, d in expected] == lengths(clips)


def test_no_clip_ends_after_its_recording():
    for samples in range(1, 400):
        for seconds in (0.1, 0.7, 1 / 3, 2.5):
            total = samples / 22.05
            clips = cut(Recording("/x", "a.wav"), total, ClipsConfig(seconds=seconds, min_seconds=0.0))
            assert len({c.key for c in clips}) == len(clips)
            ends = [c.start_seconds + c.duration_seconds for c in clips]
            # starts are kept to a microsecond, less than a fiftieth of a sample
            assert ends[-1] <= total + 2e-6
            assert all(abs(b.start_seconds - e) < 2e-6 for e, b in zip(ends, clips[1:], strict=False))
            assert math.isclose(ends[-1], total, abs_tol=1.1e-3), "with min_seconds=0 only a millisecond may be lost"


def test_cut_of_a_stretch_stays_inside_it():
    recording = Recording("/x/a.wav", "a.wav", {"class": "x"}, "train", start_seconds=5.0, duration_seconds=21.5)
    clips = cut(recording, None, ClipsConfig())
    assert lengths(clips) == [(5.0, 10.0), (15.0, 10.0), (25.0, 1.5)]
    assert {c.recording for c in clips} == {clips[0].key}, "windows of one recording can be averaged"
    assert {(c.url, c.source, c.split, c.labels["class"]) for c in clips} == {("/x/a.wav", "a.wav", "train", "x")}
    from_five = cut(Recording("/x/a.wav", "a.wav", start_seconds=5.0), 26.5, ClipsConfig())
    assert lengths(from_five) == lengths(clips)


def test_two_stretches_of_one_file_are_two_recordings():
    a, b = (
        cut(Recording("/x/a.wav", "a.wav", start_seconds=s, duration_seconds=5.0), None, ClipsConfig())
        for s in (0.0, 5.0)
    )
    assert a[0].key != b[0].key
    assert a[0].recording != b[0].recording


def test_recordings_are_kept_whole_where_clips_have_no_length():
    clips = cut(Recording("/x/a.wav", "a.wav"), None, ClipsConfig(seconds=None))
    assert lengths(clips) == [(0.0, None)]
    stretch = Recording("/x/a.wav", "a.wav", start_seconds=3.0, duration_seconds=50.0)
    assert lengths(cut(stretch, None, ClipsConfig(seconds=None))) == [(3.0, 50.0)]
