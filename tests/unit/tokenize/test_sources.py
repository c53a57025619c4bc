"""Sources: every corpus layout becomes the same sorted clips wherever it lies, and a wrong layout is named."""

import math

import pytest
from support import listed, sources, touch, without_place, write_list, write_tones

from megascale import storage
from megascale.errors import DataError, StorageError
from megascale.tokenize.sources import Clip, ClipsConfig, Recording, cut

PINNED_KEY = "a-6b9e6f7d3cb4"


def keys(recordings: list[Recording]) -> list[str]:
    return [clip.key for r in recordings for clip in cut(r, 30.0, ClipsConfig())]


# ------------------------------------------------------------------------------------------------------------- files


def test_files_lists_audio_only_sorted_and_deep(tmp_path):
    touch(
        tmp_path, "b.wav", "a/z.FLAC", "a/y.mp3", "a/deep/x.ogg", "notes.txt", "a/cover.jpg", ".hidden.wav", "a/._y.wav"
    )
    recordings = listed("files", tmp_path)
    assert sources(recordings) == ["a/deep/x.ogg", "a/y.mp3", "a/z.FLAC", "b.wav"]
    assert [r.url for r in recordings] == [f"{tmp_path}/{name}" for name in sources(recordings)]
    assert all(r.labels == {} and r.split is None and r.duration_seconds is None for r in recordings)


def test_files_takes_a_glob(tmp_path):
    touch(tmp_path, "a/x.wav", "b/y.wav", "b/deep/z.wav", "b/y.txt")
    assert sources(listed("files", f"{tmp_path}/*/*.wav")) == ["a/x.wav", "b/y.wav"]
    assert sources(listed("files", f"{tmp_path}/**/*")) == ["a/x.wav", "b/deep/z.wav", "b/y.wav"]
    assert [r.url for r in listed("files", f"{tmp_path}/b/*.wav")] == [f"{tmp_path}/b/y.wav"]


def test_files_takes_a_prefix_of_another_store(tmp_path):
    for name in ("a/x.wav", "b/y.wav"):
        storage.publish_bytes(f"memory:/{tmp_path}/{name}", b"")
    recordings = listed("files", f"memory:/{tmp_path}")
    assert sources(recordings) == ["a/x.wav", "b/y.wav"]
    assert recordings[0].url == f"memory:/{tmp_path}/a/x.wav"


def test_label_from_folder_is_the_parents_name(tmp_path):
    write_tones(tmp_path, 4, seconds=0.1)
    recordings = listed("files", tmp_path, label_from_folder=True)
    assert [(r.source, r.labels) for r in recordings] == [
        ("high/high-001.wav", {"class": "high"}),
        ("high/high-003.wav", {"class": "high"}),
        ("low/low-000.wav", {"class": "low"}),
        ("low/low-002.wav", {"class": "low"}),
    ]
    assert sorted(r.labels["class"] for r in recordings) == ["high", "high", "low", "low"]


def test_label_from_folder_where_the_url_is_the_class_folder(tmp_path, monkeypatch):
    touch(tmp_path, "rock/a.wav")
    monkeypatch.chdir(tmp_path / "rock")
    for url in (f"{tmp_path}/rock", f"{tmp_path}/rock/*.wav", ".", "*.wav"):
        assert [r.labels for r in listed("files", url, label_from_folder=True)] == [{"class": "rock"}]


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


# -------------------------------------------------------------------------------------------------------------- list


def test_list_reads_stretches_splits_and_labels(tmp_path):
    head = "url,start,duration,split,class,note\n"
    text = head + 'b.wav,,,,low,\na.wav,10.5,4,train,high,"one, two"\na.wav,0,10.5,valid,high,\n'
    recordings = listed("list", write_list(tmp_path, text))
    assert without_place(recordings) == [
        ("a.wav", {"class": "high", "note": ""}, "valid", 0.0, 10.5),
        ("a.wav", {"class": "high", "note": "one, two"}, "train", 10.5, 4.0),
        ("b.wav", {"class": "low", "note": ""}, None, 0.0, None),
    ]
    assert [r.url for r in recordings] == [f"{tmp_path}/{n}" for n in ("a.wav", "a.wav", "b.wav")]


def test_list_takes_absolute_paths_and_urls(tmp_path):
    recordings = listed("list", write_list(tmp_path, "url\n/abs/a.wav\ns3://b/c.wav\nsub/d.wav\n"))
    assert [r.url for r in recordings] == ["/abs/a.wav", "s3://b/c.wav", f"{tmp_path}/sub/d.wav"]


@pytest.mark.parametrize(
    "text",
    [
        b"url,start\r\na.wav,1\r\n",
        b"\xef\xbb\xbfurl,start\na.wav,1\n",  # as spreadsheets export "CSV UTF-8"
        b"url,start\ra.wav,1\r",
        b"url, start\na.wav, 1\n",
    ],
    ids=["windows", "byte order mark", "old mac", "spaces"],
)
def test_list_of_another_program_is_read_alike(tmp_path, text):
    assert without_place(listed("list", write_list(tmp_path, text))) == [("a.wav", {}, None, 1.0, None)]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("url,start\na.wav,0\nb.wav,soon\n", 3, "start and duration are numbers of seconds"),
        ("url,duration\na.wav,long\n", 2, "start and duration are numbers of seconds"),
        ("url,start\na.wav,-1\n", 2, "start must not be negative, and duration must be above 0"),
        ("url,duration\na.wav,1\nb.wav,1\nc.wav,0\n", 4, "start must not be negative, and duration must be above 0"),
        ("url,class\na.wav,x\n,y\n", 3, "no value in column 'url'"),
        ("path,class\na.wav,x\n", 2, "no value in column 'url'"),
        (
            "url\nhttps://me:secret@host/a.wav\n",
            2,
            "a URL with credentials in it, which would stand in every output",
        ),
        ("url,start\na.wav,0\n\n\nb.wav,soon\n", 5, "start and duration are numbers of seconds"),
        ('url,start,note\na.wav,0,"two\nlines"\nb.wav,soon,\n', 4, "start and duration are numbers of seconds"),
    ],
    ids=[
        "start",
        "duration",
        "negative",
        "nothing",
        "no url",
        "no url column",
        "credentials",
        "after empty lines",
        "after a long cell",
    ],
)
def test_list_error_names_the_line(tmp_path, text, line, what):
    path = write_list(tmp_path, text)
    with pytest.raises(DataError) as failure:
        listed("list", path)
    assert str(failure.value) == f"{path}: line {line}: {what}"


@pytest.mark.parametrize("row", ["a.wav,nan,1", "a.wav,inf,1", "a.wav,0,inf", "a.wav,0,nan"])
def test_list_refuses_times_that_are_not_finite(tmp_path, row):
    path = write_list(tmp_path, f"url,start,duration\n{row}\n")
    with pytest.raises(DataError, match=f"^{path}: line 2: "):
        listed("list", path)


def test_list_refuses_the_same_stretch_twice(tmp_path):
    path = write_list(tmp_path, "url,start\na.wav,0\nb.wav,0\na.wav,0.0\n")
    with pytest.raises(DataError, match=f"^{path}: a.wav at 0.0 s is listed more than once$"):
        listed("list", path)


def test_list_that_is_no_text_or_no_parquet_is_named(tmp_path):
    binary = write_list(tmp_path, b"url\n\xff\xfe.wav\n")
    with pytest.raises(StorageError, match=f"^{binary}: not UTF-8 text$"):
        listed("list", binary)
    parquet = write_list(tmp_path, b"url\na.wav\n", "clips.parquet")
    with pytest.raises(DataError, match=f"^{parquet}: "):
        listed("list", parquet)


# ------------------------------------------------------------------------------------------------------------ nothing


@pytest.mark.parametrize("kind", ["files", "gtzan", "music_speech"])
def test_folder_without_audio_is_named(tmp_path, kind):
    touch(tmp_path, "readme.txt")
    with pytest.raises(DataError, match=rf"^{tmp_path}: no audio found \(source.kind={kind}\)$"):
        listed(kind, tmp_path)


@pytest.mark.parametrize("kind", ["files", "gtzan", "music_speech"])
def test_missing_folder_is_named(tmp_path, kind):
    with pytest.raises(StorageError, match=f"^{tmp_path}/none: no such folder"):
        listed(kind, tmp_path / "none")


@pytest.mark.parametrize("kind", ["files", "gtzan", "nsynth", "music_speech"])
def test_empty_folder_is_named(tmp_path, kind):
    with pytest.raises((DataError, StorageError), match=f"^{tmp_path}: "):
        listed(kind, tmp_path)


def test_empty_and_missing_lists_are_named(tmp_path):
    for text in ("", "url,start\n"):
        path = write_list(tmp_path, text)
        with pytest.raises(DataError, match=rf"^{path}: no audio found \(source.kind=list\)$"):
            listed("list", path)
    with pytest.raises(StorageError, match=r"none\.csv: no such file"):
        listed("list", tmp_path / "none.csv")
