"""Public datasets as they lie on disk, untouched: to tokens, and from there to a classifier by their own protocols."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import command, run
from support import tone
from test_tokenize import hashes, same_codec, tokenize

TAGS = ("/m/09x0r", "/m/04rlf", "/t/dd00088")


def write_wav(path: Path, number: int, rate_hz: int = 22_050) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(1.0, rate_hz, 110 * 1.1 ** (number % 30), seed=number), rate_hz, subtype="PCM_16")


def write_gtzan(folder: Path) -> None:
    """Three genres of six files, `jazz.00054` broken as it is in every copy."""
    for g, genre in enumerate(("blues", "jazz", "rock")):
        for i in range(6):
            write_wav(folder / genre / f"{genre}.{i:05d}.wav", 10 * g + i)
    (folder / "jazz" / "jazz.00054.wav").write_bytes(b"\x0f\xa4\x00\x1b" * 5000)


def write_lists(folder: Path) -> list[str]:
    """Lists of the fault-filtered kind; the test list names the broken file."""
    parts = {"train": range(3), "valid": range(3, 4), "test": range(4, 6)}
    overrides = []
    for side, numbers in parts.items():
        names = [f"{g}/{g}.{i:05d}.wav" for g in ("blues", "jazz", "rock") for i in numbers]
        names += ["jazz/jazz.00054.wav"] if side == "test" else []
        (folder / f"{side}_filtered.txt").write_text("\n".join(names) + "\n")
        overrides.append(f"task.lists.{side}={folder}/{side}_filtered.txt")
    return overrides


def finetune(tokens: Path, output: Path, *overrides: str) -> dict[str, Any]:
    given = [f"data.url={tokens}", f"output.url={output}", "arm=scratch", "checkpoint=null", "train.epochs=1"]
    shape = [f"model.{key}" for key in ("layers=1", "width=32", "heads=2", "mlp_width=64")]
    printed = run(command("finetune.py", "configs/finetune/smoke.yaml", *given, *shape, *overrides))
    result = json.loads((output / "result.json").read_text())
    assert f"split: {result['split_check']['summary']}" in printed
    return result


@pytest.fixture(scope="module")
def gtzan(tmp_path_factory) -> Path:
    """GTZAN as its archive unpacks, and its tokens."""
    folder = tmp_path_factory.mktemp("gtzan")
    write_gtzan(folder / "archive" / "genres")
    run(tokenize(folder / "archive", folder / "tokens", "source.kind=gtzan"))
    return folder


def test_gtzans_broken_file_is_quarantined_and_kaggles_copy_gives_the_same_shards(gtzan, tmp_path):
    write_gtzan(tmp_path / "kaggle" / "Data" / "genres_original")
    (tmp_path / "kaggle" / "Data" / "features_30_sec.csv").write_text("filename,length\n")
    picture = tmp_path / "kaggle" / "Data" / "images_original" / "blues" / "blues00000.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"\x89PNG")
    run(tokenize(tmp_path / "kaggle", tmp_path / "tokens", "source.kind=gtzan", same_codec(gtzan / "tokens")))
    for tokens in (gtzan / "tokens", tmp_path / "tokens"):
        (bad,) = [json.loads(line) for line in (tokens / "quarantine.jsonl").read_text().splitlines()]
        assert bad["url"].endswith("/jazz/jazz.00054.wav")
    shards = [
        {k: v for k, v in hashes(t).items() if k.endswith(".tar")} for t in (gtzan / "tokens", tmp_path / "tokens")
    ]
    assert shards[0] == shards[1] and len(shards[0]) == 2


def test_gtzan_by_its_lists_says_which_file_is_missing(gtzan, tmp_path):
    result = finetune(
        gtzan / "tokens", tmp_path / "run", "task.label=genre", "task.protocol=lists", *write_lists(tmp_path)
    )
    assert result["classes"] == ["blues", "jazz", "rock"]
    assert result["split_check"]["recordings"] == {"train": 9, "valid": 3, "test": 6}
    assert result["split_check"]["missing"] == ["jazz/jazz.00054.wav"]
    assert result["count"] == 6


def test_nsynth_by_family_and_by_pitch_on_its_official_splits(gtzan, tmp_path):
    number = 0
    for split, instruments in (("train", 4), ("valid", 1), ("test", 1)):
        examples = {}
        for family in ("bass", "organ", *(["synth_lead"] if split == "train" else [])):
            for instrument in range(instruments):
                for pitch in (40, 60):
                    # valid and test share instruments, as the real ones do
                    name = f"{family}_acoustic_{instrument + (0 if split == 'train' else 100):03d}"
                    note = f"{name}-{pitch:03d}-{100 if split == 'valid' else 127:03d}"
                    examples[note] = {
                        "note_str": note,
                        "instrument_str": name,
                        "instrument_family_str": family,
                        "instrument_source_str": "acoustic",
                        "pitch": pitch,
                        "velocity": 100,
                    }
                    write_wav(tmp_path / "nsynth" / f"nsynth-{split}" / "audio" / f"{note}.wav", number, 16_000)
                    number += 1
        (tmp_path / "nsynth" / f"nsynth-{split}" / "examples.json").write_text(json.dumps(examples))
    tokens = tmp_path / "tokens"
    run(tokenize(tmp_path / "nsynth", tokens, "source.kind=nsynth", same_codec(gtzan / "tokens")))
    of_family = ["task.label=instrument_family_str", "task.protocol=official", "task.absent_from_test=[synth_lead]"]
    family = finetune(tokens, tmp_path / "family", *of_family)
    assert family["classes"] == ["bass", "organ", "synth_lead"]
    assert family["per_class"]["synth_lead"]["count"] == 0
    found = family["split_check"]
    assert found["classes_absent"]["test"] == ["synth_lead"]
    shared = found["groups_on_two_sides"]
    assert (found["group"], shared["train-test"], shared["train-valid"], shared["valid-test"]) == (
        "instrument_str",
        0,
        0,
        2,
    )
    pitch = finetune(tokens, tmp_path / "pitch", "task.label=pitch", "task.protocol=official")
    assert pitch["classes"] == ["40", "60"] and pitch["count"] == 4


@pytest.mark.slow
def test_audioset_by_its_tags(gtzan, tmp_path):
    source = ["source.kind=audioset", f"source.audio_url={tmp_path}/audio", same_codec(gtzan / "tokens")]
    for name, first in (("balanced_train", 0), ("eval", 24)):
        ids = [f"{chr(97 + i % 24)}_-{i:08d}" for i in range(first, first + 24)]
        rows = [f'{name}, {10 * i}.000, {10 * i + 10}.000, "{",".join(tags_of(i))}"' for i, name in enumerate(ids)]
        header = ["# Segments csv created Sun Mar  5 10:54:31 2017", "# num_ytids=24", "# YTID, start_seconds, ..."]
        (tmp_path / f"{name}_segments.csv").write_text("\n".join([*header, *rows]) + "\n")
        for i, youtube_id in enumerate(ids[:-1], start=first):  # one is not to be had any more
            write_wav(tmp_path / "audio" / f"{youtube_id}.wav", i)
        run(tokenize(tmp_path / f"{name}_segments.csv", tmp_path / name, *source))
    tags = ["task.label=tags", "task.kind=multi", "task.valid_share=0.25", "task.test_share=0.25"]
    divided = finetune(tmp_path / "eval", tmp_path / "divided", *tags)
    official = finetune(
        tmp_path / "balanced_train",
        tmp_path / "official",
        *tags,
        "task.protocol=official",
        f"data.test_url={tmp_path}/eval",
    )
    for result in (divided, official):
        assert result["classes"] == sorted(TAGS)
        assert 0 < result["map"] <= 1 and np.isfinite(result["d_prime"] or 0.0)
    assert sum(divided["split_check"]["recordings"].values()) == 23
    assert official["split_check"]["recordings"]["test"] == official["count"] == 23
    assert sum(official["split_check"]["recordings"].values()) == 46


def tags_of(number: int) -> list[str]:
    return [TAGS[number % 2], *([TAGS[2]] if number % 3 == 0 else [])]
