"""AudioSet, GTZAN, NSynth and GTZAN music/speech: the same clips however a copy is laid out, and a wrong one is named."""

import json
from pathlib import Path

import pytest
from support import listed, touch, without_place, write_list

from megascale.errors import DataError, StorageError
from megascale.tokenize.sources import SourceConfig, list_recordings

# ---------------------------------------------------------------------------------------------------------- audioset

AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=5, num_segs=5, num_unique_labels=3, num_positive_labels=8
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0_abc-def_, 50.000, 60.000, "/m/05zppz"
Yes_its_an_, 0.000, 10.000, "/m/04rlf"
YYYYYYYYYYY, 5.000, 15.000, "/m/04rlf,/m/09x0r"
zMissing_00, 5.000, 15.000, "/m/04rlf"
"""
AUDIOSET_IDS = ("--PJHxphWEs", "-0_abc-def_", "Yes_its_an_", "YYYYYYYYYYY")
AUDIOSET_TAGS = [["/m/09x0r", "/t/dd00088"], ["/m/05zppz"], ["/m/04rlf"], ["/m/04rlf", "/m/09x0r"]]


@pytest.mark.parametrize(
    "naming", ["{}.wav", "Y{}.wav", "{}_30.000.flac", "{}_30000_40000.wav", "Y{}_30.wav", "deep/{}.mp3"]
)
def test_audioset_finds_clips_however_a_copy_names_them(tmp_path, naming):
    (tmp_path / "eval.csv").write_text(AUDIOSET)
    names = [naming.format(youtube_id) for youtube_id in AUDIOSET_IDS]
    touch(tmp_path / "audio", *names, naming.format("not_in_list"))
    config = SourceConfig(kind="audioset", url=f"{tmp_path}/eval.csv", audio_url=f"{tmp_path}/audio")
    recordings, notes = list_recordings(config)
    expected = sorted(zip(names, AUDIOSET_TAGS, strict=True))
    assert [(r.source, r.labels["tags"]) for r in recordings] == expected
    assert notes == {"listed, but not in audio_url": 1}
    assert all((r.start_seconds, r.duration_seconds) == (0.0, None) for r in recordings), (
        "files are cut to their segment"
    )


def test_audioset_names_its_tags_with_the_ontology(tmp_path):
    (tmp_path / "eval.csv").write_text(AUDIOSET)
    touch(tmp_path / "audio", "--PJHxphWEs.wav")
    (tmp_path / "labels.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gargling, loud"\n2,/m/05zppz,x\n3,/m/04rlf,Music\n'
    )
    options = {"audio_url": f"{tmp_path}/audio", "ontology_url": f"{tmp_path}/labels.csv"}
    (recording,) = listed("audioset", tmp_path / "eval.csv", **options)
    assert recording.labels == {"tags": ["/m/09x0r", "/t/dd00088"], "names": ["Speech", "Gargling, loud"]}


def test_audioset_tag_that_the_ontology_lacks_is_named(tmp_path):
    (tmp_path / "eval.csv").write_text(AUDIOSET)
    touch(tmp_path / "audio", "--PJHxphWEs.wav")
    (tmp_path / "labels.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n")
    options = {"audio_url": f"{tmp_path}/audio", "ontology_url": f"{tmp_path}/labels.csv"}
    with pytest.raises(DataError, match="/t/dd00088"):
        listed("audioset", tmp_path / "eval.csv", **options)


def test_audioset_errors_are_named(tmp_path):
    touch(tmp_path / "audio", "--PJHxphWEs.wav")
    options = {"audio_url": f"{tmp_path}/audio"}
    broken = write_list(tmp_path, "# x\n--PJHxphWEs, 30.000, 40.000\n", "broken.csv")
    with pytest.raises(DataError, match=rf"^{broken}: '--PJHxphWEs,30.000,40.000': expected YTID, start, end, labels$"):
        listed("audioset", broken, **options)
    other = write_list(tmp_path, '# x\n00000000000, 0, 10, "/m/04rlf"\n', "other.csv")
    with pytest.raises(DataError, match=f"^{other}: no audio found"):
        listed("audioset", other, **options)
    wide = write_list(tmp_path, f'--PJHxphWEs, 30.000, 40.000, "{"x" * 200_000}\n', "wide.csv")  # a quote left open
    with pytest.raises(DataError, match=f"^{wide}: after 0 segments: field larger than field limit"):
        listed("audioset", wide, **options)
    for text in ("a,b\n1,2\n", ""):
        wrong = write_list(tmp_path, text, "wrong.csv")
        with pytest.raises(DataError, match=f"^{wrong}: expected columns index, mid, display_name$"):
            listed("audioset", broken, ontology_url=str(wrong), **options)
    with pytest.raises(StorageError, match=f"^{tmp_path}/none: no such folder"):
        listed("audioset", broken, audio_url=f"{tmp_path}/none")


# -------------------------------------------------------------------------------------- gtzan, nsynth, music and speech


@pytest.mark.parametrize("prefix", ["genres/", "Data/genres_original/", "genres_original/", ""])
def test_gtzan_is_the_same_in_each_of_its_layouts(tmp_path, prefix):
    touch(tmp_path, *(f"{prefix}{g}/{g}.0000{i}.wav" for g in ("blues", "rock") for i in range(2)))
    touch(
        tmp_path,
        "Data/images_original/blues/blues00000.png",
        f"{prefix}blues/._blues.00000.wav",
        "bextract.mf",
        "x.wav",
    )
    recordings = listed("gtzan", tmp_path)
    assert without_place(recordings) == [
        (f"{g}/{g}.0000{i}.wav", {"genre": g}, None, 0.0, None) for g in ("blues", "rock") for i in range(2)
    ]
    assert recordings[0].url == f"{tmp_path}/{prefix}blues/blues.00000.wav"
    assert Path(recordings[0].url).exists()


def write_nsynth(folder: Path, split: str, notes: list[str]) -> None:
    facts = {
        note: {
            "note_str": note,
            "instrument_family_str": note.split("_")[0],
            "instrument_source_str": note.split("_")[1],
            "instrument_str": note.rsplit("-", 2)[0],
            "pitch": int(note.rsplit("-", 2)[1]),
            "velocity": int(note.rsplit("-", 1)[1]),
            "qualities": [0, 1],
        }
        for note in notes
    }
    root = folder / f"nsynth-{split}"
    root.mkdir(parents=True)
    (root / "examples.json").write_text(json.dumps(facts))


def test_nsynth_reads_splits_and_labels(tmp_path):
    write_nsynth(tmp_path, "train", ["organ_electronic_104-031-127", "bass_synthetic_033-022-050"])
    write_nsynth(tmp_path, "test", ["guitar_acoustic_010-060-025"])
    recordings = listed("nsynth", tmp_path)
    assert [(r.source, r.split) for r in recordings] == [
        ("nsynth-test/audio/guitar_acoustic_010-060-025.wav", "test"),
        ("nsynth-train/audio/bass_synthetic_033-022-050.wav", "train"),
        ("nsynth-train/audio/organ_electronic_104-031-127.wav", "train"),
    ]
    assert recordings[0].labels == {
        "instrument_family_str": "guitar",
        "instrument_source_str": "acoustic",
        "instrument_str": "guitar_acoustic_010",
        "pitch": 60,
        "velocity": 25,
    }
    assert recordings[0].url == f"{tmp_path}/nsynth-test/audio/guitar_acoustic_010-060-025.wav"


def test_nsynth_without_its_files_is_named(tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}: no nsynth-train, nsynth-valid or nsynth-test"):
        listed("nsynth", tmp_path)
    for text in ("{broken", "[1, 2]", '{"note": {"pitch": 3}}', '{"note": 3}'):
        touch(tmp_path, "nsynth-valid/examples.json")
        (tmp_path / "nsynth-valid" / "examples.json").write_text(text)
        with pytest.raises(DataError, match=f"^{tmp_path}/nsynth-valid/examples.json: not NSynth's examples.json: "):
            listed("nsynth", tmp_path)


@pytest.mark.parametrize("prefix", ["music_speech/", ""])
def test_music_speech_is_the_same_in_each_of_its_layouts(tmp_path, prefix):
    touch(tmp_path, f"{prefix}music_wav/bagpipe.wav", f"{prefix}speech_wav/allison.wav", f"{prefix}music_wav/.x.wav")
    touch(tmp_path, f"{prefix}other/x.wav", f"{prefix}music_wav/readme.txt")
    recordings = listed("music_speech", tmp_path)
    assert without_place(recordings) == [
        ("music_wav/bagpipe.wav", {"class": "music"}, None, 0.0, None),
        ("speech_wav/allison.wav", {"class": "speech"}, None, 0.0, None),
    ]
    assert all(Path(r.url).exists() for r in recordings)
