"""The procedural corpora: layouts, splits, and files that depend on nothing but the seed and their name."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from megascale.corpora import CorpusSizes, write_corpora

GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")
FAMILIES = (
    "bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal"
)  # fmt: skip
SIZES = CorpusSizes(
    pretrain_clips=10,
    pretrain_seconds=0.5,
    gtzan_per_genre=2,
    gtzan_seconds=0.5,
    nsynth_train_per_family=3,
    nsynth_valid_per_family=1,
    nsynth_test_per_family=3,
    nsynth_seconds=0.3,
    music_speech_per_class=2,
    music_speech_seconds=0.5,
)
CLIPS = 10 + 2 * 10 + (3 * 11 + 10 + 3 * 10) + 2 * 2


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora")
    write_corpora(root, SIZES, seed=7, num_processes=1)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def examples(root: Path, split: str) -> dict[str, dict]:
    return json.loads((root / "nsynth" / f"nsynth-{split}" / "examples.json").read_text())


def test_layouts_are_exact(corpora: Path) -> None:
    expected = {f"pretrain/clip-{i:05d}.wav" for i in range(10)}
    expected |= {f"gtzan/genres/{genre}/{genre}.{i:05d}.wav" for genre in GENRES for i in range(2)}
    expected |= {f"music_speech/{name}_wav/{name}{i:03d}.wav" for name in ("music", "speech") for i in range(2)}
    for split in ("train", "valid", "test"):
        notes = examples(corpora, split)
        expected |= {f"nsynth/nsynth-{split}/examples.json"}
        expected |= {f"nsynth/nsynth-{split}/audio/{note}.wav" for note in notes}
    assert set(contents(corpora)) == expected
    assert len(expected) == CLIPS + 3


def test_examples_have_nsynths_fields(corpora: Path) -> None:
    notes = {note: facts for split in ("train", "valid", "test") for note, facts in examples(corpora, split).items()}
    for note, facts in notes.items():
        assert set(facts) == {
            "note", "note_str", "instrument", "instrument_str", "pitch", "velocity", "sample_rate", "qualities",
            "qualities_str", "instrument_family", "instrument_family_str", "instrument_source", "instrument_source_str",
        }  # fmt: skip
        assert note == facts["note_str"]
        assert note == f"{facts['instrument_str']}-{facts['pitch']:03d}-{facts['velocity']:03d}"
        assert facts["instrument_str"].startswith(f"{facts['instrument_family_str']}_{facts['instrument_source_str']}_")
        assert facts["instrument_family_str"] == FAMILIES[facts["instrument_family"]]
        assert len(facts["qualities"]) == 10
    assert len({facts["note"] for facts in notes.values()}) == len(notes)
    names = {facts["instrument"]: facts["instrument_str"] for facts in notes.values()}
    assert len(names) == len({facts["instrument_str"] for facts in notes.values()})


def test_nsynth_splits_share_no_instrument(corpora: Path) -> None:
    instruments, families = {}, {}
    for split in ("train", "valid", "test"):
        notes = examples(corpora, split).values()
        instruments[split] = {facts["instrument_str"] for facts in notes}
        families[split] = {facts["instrument_family_str"] for facts in notes}
    assert instruments["train"].isdisjoint(instruments["valid"] | instruments["test"])
    assert families["train"] == set(FAMILIES)
    assert families["valid"] == families["test"] == set(FAMILIES) - {"synth_lead"}


def test_audio_has_its_format_and_is_neither_silent_nor_clipped(corpora: Path) -> None:
    for path in corpora.rglob("*.wav"):
        info = soundfile.info(path)
        samples, rate = soundfile.read(path)
        is_note = "nsynth" in path.parts
        assert (info.format, info.subtype, info.channels) == ("WAV", "PCM_16", 1), path
        assert rate == (16000 if is_note else 22050), path
        assert len(samples) == round(rate * (0.3 if is_note else 0.5)), path
        assert 10 ** (-12.1 / 20) < np.abs(samples).max() < 10 ** (-0.9 / 20), path
        assert np.sqrt(np.mean(samples**2)) > 0.003, path
        assert (samples[-len(samples) // 4 :] != 0).mean() > 0.5, f"{path}: ends in digital silence"


def test_files_depend_on_the_seed_alone(corpora: Path, tmp_path: Path) -> None:
    write_corpora(tmp_path / "again", SIZES, seed=7, num_processes=2)
    assert contents(tmp_path / "again") == contents(corpora)

    write_corpora(tmp_path / "other", SIZES, seed=8, num_processes=1)
    first, other = contents(corpora), contents(tmp_path / "other")
    shared = [name for name in first if name in other and name.endswith(".wav")]
    assert len(shared) >= 34
    assert not [name for name in shared if first[name] == other[name]]


def test_no_two_clips_are_the_same(corpora: Path) -> None:
    assert len(set(contents(corpora).values())) == CLIPS + 3


def test_an_interrupted_run_goes_on(corpora: Path, tmp_path: Path) -> None:
    write_corpora(tmp_path, SIZES, seed=7, num_processes=1)
    lost = [tmp_path / "pretrain" / "clip-00004.wav", tmp_path / "gtzan" / "genres" / "jazz" / "jazz.00001.wav"]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    calls: list[tuple[int, int]] = []
    write_corpora(tmp_path, SIZES, seed=7, num_processes=1, progress=lambda done, total: calls.append((done, total)))
    assert contents(tmp_path) == contents(corpora)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert calls == [(CLIPS - 2, CLIPS), (CLIPS, CLIPS)]


@pytest.mark.parametrize("name", CorpusSizes.model_fields)
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValidationError, match="greater than"):
        CorpusSizes(**{name: 0})


def test_there_must_be_a_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_processes must be above 0"):
        write_corpora(tmp_path, CorpusSizes(), seed=0, num_processes=0)


def test_shortest_sounds_can_be_rendered(tmp_path: Path) -> None:
    shortest = {name: 0.1 if name.endswith("_seconds") else 1 for name in CorpusSizes.model_fields}
    write_corpora(tmp_path, CorpusSizes(**shortest), seed=0, num_processes=1)
    assert {len(soundfile.read(path)[0]) for path in tmp_path.rglob("*.wav")} == {2205, 1600}
