"""What a split holds that it should not is counted and told; what nothing can be learned or scored from is refused."""

import json

import numpy as np
import pytest

from megascale.data.index import StoredClip
from megascale.downstream.protocols import SPLITS, TaskConfig, split_clips
from megascale.downstream.split_check import check_split
from megascale.errors import DataError

TASK = TaskConfig(label="family", protocol="official")
MULTI = TaskConfig(label="tags", protocol="official", kind="multi")


def clip(name: str, split: str, codes: int | None = None, window: int = 0, **labels: object) -> StoredClip:
    """A clip of 2 x 5 codes, drawn from its name unless a number for them is given."""
    seed = hash_of(f"{name}-{window}") if codes is None else codes
    codes_QT = np.random.default_rng(seed).integers(0, 1024, (2, 5)).astype(np.int16)
    return StoredClip(f"{name}-{window}", codes_QT, name, f"{name}.wav", labels, split)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little")


def corpus(**labels: object) -> list[StoredClip]:
    """Four recordings of two families on each side."""
    families = ("bass", "organ")
    return [clip(f"{split}-{i}", split, **{"family": families[i % 2], **labels}) for split in SPLITS for i in range(4)]


def check(clips: list[StoredClip], task: TaskConfig = TASK) -> dict:
    found = check_split(clips, split_clips(clips, task, seed=0), task)
    json.dumps(found, allow_nan=False)
    assert "\n" not in found["summary"]
    return found


def refusal(clips: list[StoredClip], task: TaskConfig = TASK) -> str:
    with pytest.raises(DataError) as failure:
        check(clips, task)
    return str(failure.value)


def test_split_without_leaks_says_so():
    found = check([*corpus(), clip("train-0", "train", window=1, family="bass")])
    assert found["recordings"] == {"train": 4, "valid": 4, "test": 4}
    clean = {"count": 0, "train-valid": 0, "train-test": 0, "valid-test": 0, "example": None}
    assert found["recordings_on_two_sides"] == found["equal_codes_on_two_sides"] == clean
    assert found["group"] is None
    assert found["summary"] == (
        "4 train, 4 valid, 4 test recordings; no recording on two sides; no equal codes on two sides"
    )


# ---------------------------------------------------------------------------------------------------------------- leaks


def test_recording_on_two_sides_would_be_seen():
    """No protocol lets one through; the check does not take their word for it."""
    clips = [*corpus(), clip("train-0", "train", window=1, family="bass")]
    splits = split_clips(clips, TASK, seed=0)
    splits["test"] = [*splits["test"], splits["train"].pop()]
    found = check_split(clips, splits, TASK)
    assert found["recordings_on_two_sides"] == {
        "count": 1,
        "train-valid": 0,
        "train-test": 1,
        "valid-test": 0,
        "example": ["train-0.wav", "train-0.wav"],
    }
    assert "recording on two sides: 1 in train and test, such as train-0.wav;" in found["summary"]


def test_nsynths_instruments_on_two_sides_are_counted():
    def instruments(train: str, valid: str, test: str) -> dict:
        named = dict(zip(SPLITS, (train, valid, test), strict=True))
        return check(
            [
                clip(c.recording, c.split, **c.labels, instrument_str=f"{named[c.split]}-{c.recording[-1]}")
                for c in corpus()
            ]
        )

    apart = instruments("a", "b", "c")
    assert (apart["group"], apart["groups_on_two_sides"]["count"]) == ("instrument_str", 0)
    assert "no instrument_str on two sides" in apart["summary"]
    official = instruments("a", "b", "b")["groups_on_two_sides"]
    assert (official["count"], official["train-test"], official["valid-test"]) == (4, 0, 4)
    leaking = instruments("a", "b", "a")
    assert leaking["groups_on_two_sides"]["train-test"] == 4
    assert "instrument_str on two sides: 4 in train and test, such as a-0" in leaking["summary"]


def test_label_to_look_for_can_be_named_and_must_be_there():
    clips = [clip(c.recording, c.split, **c.labels, artist="same", instrument_str=c.key) for c in corpus()]
    named = TASK.model_copy(update={"group": "artist"})
    found = check(clips, named)
    assert found["group"] == "artist"
    assert found["groups_on_two_sides"] == {
        "count": 1,
        "train-valid": 1,
        "train-test": 1,
        "valid-test": 1,
        "example": ["same", "same"],
    }
    assert refusal(corpus(), named) == "task.group=artist: no clip has this label"


def test_clip_without_the_group_is_no_leak():
    clips = [*corpus(), clip("x", "train", family="bass", artist="one")]
    assert check(clips, TASK.model_copy(update={"group": "artist"}))["groups_on_two_sides"]["count"] == 0


def test_label_that_is_classified_is_no_group():
    task = TaskConfig(label="instrument_str", protocol="official")
    clips = [clip(c.recording, c.split, instrument_str=c.labels["family"]) for c in corpus()]
    assert check(clips, task)["group"] is None


def test_equal_codes_under_two_names_on_two_sides_are_counted():
    clips = [
        *corpus(),
        clip("copy-a", "train", codes=1, family="bass"),
        clip("copy-b", "test", codes=1, family="bass"),
        clip("copy-c", "test", codes=1, family="bass"),
        clip("twice-a", "train", codes=2, family="bass"),
        clip("twice-b", "train", codes=2, family="bass"),
    ]
    found = check(clips)
    assert found["equal_codes_on_two_sides"] | {"example": None} == {
        "count": 1,
        "train-valid": 0,
        "train-test": 1,
        "valid-test": 0,
        "example": None,
    }
    assert "equal codes on two sides: 1 in train and test, such as copy-a.wav and copy-" in found["summary"]


def test_codes_of_another_shape_are_not_equal():
    clips = corpus()
    zeros = [np.zeros(shape, np.int16) for shape in ((2, 6), (3, 4))]
    for split, codes_QT in zip(("train", "test"), zeros, strict=True):
        clips.append(StoredClip(split, codes_QT, split, f"{split}.wav", {"family": "bass"}, split))
    assert check(clips)["equal_codes_on_two_sides"]["count"] == 0


# -------------------------------------------------------------------------------------------------------------- classes


def test_class_absent_from_test_is_refused_unless_it_is_named():
    lead = [*corpus(), clip("lead", "train", family="synth_lead")]
    assert refusal(lead) == (
        "task.label=family: no test clip is of 'synth_lead', which training holds; task.classes can leave it out, "
        'task.absent_from_test=["synth_lead"] lets it be'
    )
    named = TASK.model_copy(update={"absent_from_test": ["synth_lead"]})
    found = check(lead, named)
    assert found["classes_absent"] == {"valid": ["synth_lead"], "test": ["synth_lead"]}
    assert found["summary"].endswith("no valid clip of synth_lead; no test clip of synth_lead")
    assert check(corpus(), named)["classes_absent"]["test"] == [], "it may be there, too"
    more = [*lead, *(clip(f"x{i}", "train", family=f"x{i}") for i in range(2))]
    told = refusal(more, named)
    assert "no test clip is of 'x0' (nor of 1 more classes), which" in told
    assert told.endswith('task.absent_from_test=["synth_lead", "x0", "x1"] lets it be')
    all_named = TASK.model_copy(update={"absent_from_test": ["synth_lead", "x0", "x1"]})
    assert check(more, all_named)["summary"].endswith("no test clip of 3, the first synth_lead")


def test_class_absent_from_validation_is_told():
    found = check([*corpus(), *(clip(f"{split}-v", split, family="vocal") for split in ("train", "test"))])
    assert found["classes_absent"] == {"valid": ["vocal"], "test": []}
    assert found["summary"].endswith("no valid clip of vocal")


@pytest.mark.parametrize("side", ["valid", "test"])
def test_class_missing_from_training_is_refused(side):
    assert refusal([*corpus(), clip("x", side, family="vocal")]) == (
        f"task.label=family: no training clip is of 'vocal', which the {side} split holds; task.classes can leave it out"
    )
    several = [clip(f"x{i}", side, family=f"x{i}") for i in range(3)]
    assert "no training clip is of 'x0' (nor of 2 more classes), which" in refusal([*corpus(), *several])


@pytest.mark.parametrize("side", SPLITS)
def test_split_of_a_single_class_is_refused(side):
    clips = [c for c in corpus() if c.split != side or c.labels["family"] == "bass"]
    if side == "train":
        clips = [c for c in clips if c.labels["family"] == "bass"]
    assert refusal(clips) == f"task.label=family: all 2 clips of the {side} split are of 'bass'"


def test_several_labels_need_clips_with_and_without_one():
    def tagged(**tags: list[list[str]]) -> list[StoredClip]:
        return [clip(f"{split}-{i}", split, tags=row) for split in SPLITS for i, row in enumerate(tags[split])]

    good = {"train": [["a", "b"], ["a"]], "valid": [["a"], []], "test": [["b", "a"], ["a"]]}
    assert check(tagged(**good), MULTI)["classes_absent"] == {"valid": ["b"], "test": []}
    rare = good | {"train": [["a", "b", "rare"], ["a"]]}
    assert check(tagged(**rare), MULTI)["classes_absent"]["test"] == ["rare"], "the mean is over classes that occur"
    assert refusal(tagged(**good | {"test": [["a", "b"], ["b", "a"]]}), MULTI) == (
        "task.label=tags: all 2 clips of the test split are of 'a', 'b'"
    )
    assert refusal(tagged(**good | {"valid": [[], []]}), MULTI).endswith("all 2 clips of the valid split are of none")
    assert "no training clip is of 'c'" in refusal(tagged(**good | {"test": [["a"], ["c"]]}), MULTI)


# ---------------------------------------------------------------------------------------------------------------- lists


def test_what_lists_and_corpus_do_not_share_is_told(tmp_path):
    urls = {}
    for side in SPLITS:
        names = [f"{side}-{i}.wav" for i in range(3)] + (["jazz/jazz.00054.wav"] if side == "test" else [])
        (tmp_path / side).write_text("\n".join(names))
        urls[side] = str(tmp_path / side)
    task = TaskConfig.model_validate({"label": "family", "protocol": "lists", "lists": urls})
    found = check(corpus(), task)
    assert (found["missing"], found["unlisted"]) == (["jazz/jazz.00054.wav"], 3)
    assert found["summary"].endswith("listed, but not among the clips: jazz/jazz.00054.wav; 3 recordings in no list")
    (tmp_path / "train").write_text("train-0.wav\ntrain-1.wav\ngone.wav\n")
    assert "listed, but not among the clips: 2, the first gone.wav; 4 rec" in check(corpus(), task)["summary"]
