"""Sources: every corpus layout becomes the same sorted clips wherever it lies, and a wrong layout is named."""

import pytest
from support import listed, sources, touch, without_place, write_list, write_tones

from megascale import storage
from megascale.errors import DataError, StorageError

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
