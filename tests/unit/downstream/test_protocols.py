"""Splits and scores: nothing that is tested was trained on, and a score is what its name says."""

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from megascale.data.index import StoredClip
from megascale.downstream.protocols import (
    SPLITS,
    TaskConfig,
    average_windows,
    classes_of,
    score,
    split_clips,
    taking_part,
)
from megascale.errors import DataError

PAPER = TaskConfig(label="genre", protocol="paper")
STRATIFIED = TaskConfig(label="genre", protocol="stratified", valid_share=0.2, test_share=0.3)
OFFICIAL = TaskConfig(label="genre", protocol="official")


def clip(recording: str, label: object = "rock", split: str | None = None, window: int = 0) -> StoredClip:
    labels = {"genre": label, "year": 1999}
    return StoredClip(f"{recording}-{window}", None, recording, f"{recording}.wav", labels, split)


def corpus(counts: dict[str, int], windows: int = 1, together: bool = True) -> list[StoredClip]:
    """`counts` recordings of each class; windows of a recording side by side, or (not together) far apart."""
    names = [(f"{genre}-{i:03d}", genre) for genre, count in counts.items() for i in range(count)]
    if together:
        return [clip(name, genre, window=w) for name, genre in names for w in range(windows)]
    return [clip(name, genre, window=w) for w in range(windows) for name, genre in names]


def sides(clips: list[StoredClip], config: TaskConfig, seed: int = 0) -> dict[str, str]:
    """Side of every key."""
    return {clips[i].key: side for side, members in split_clips(clips, config, seed).items() for i in members}


def message(clips: list[StoredClip], config: TaskConfig = PAPER) -> str:
    with pytest.raises(DataError) as failure:
        split_clips(clips, config, seed=0)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_every_clip_takes_part_unless_classes_are_named():
    clips = corpus({"rock": 3, "jazz": 2, "folk": 1}, windows=2)
    assert taking_part(iter(clips), PAPER) == clips
    named = PAPER.model_copy(update={"classes": ["jazz", "folk"]})
    chosen = taking_part(iter(clips), named)
    assert chosen == [c for c in clips if c.labels["genre"] != "rock"]
    assert classes_of(chosen, "genre") == ["folk", "jazz"]


def test_clip_without_the_label_takes_no_part_where_classes_are_named():
    clips = corpus({"rock": 3, "1": 2, "None": 1})
    unlabelled = StoredClip("x", None, "x", "x.wav", {}, None)
    assert taking_part([*clips, unlabelled], PAPER.model_copy(update={"classes": ["rock", "None"]})) == [
        c for c in clips if c.labels["genre"] != "1"
    ]


def test_class_that_is_named_and_has_no_clip_is_refused():
    named = PAPER.model_copy(update={"classes": ["rock", "polka"]})
    with pytest.raises(DataError, match=r"task\.classes: no clip has the genre 'polka'"):
        taking_part(corpus({"rock": 3}), named)
    with pytest.raises(ValidationError, match="at least 2"):
        TaskConfig(label="genre", classes=["rock"])


@pytest.mark.parametrize("config", [PAPER, STRATIFIED])
@pytest.mark.parametrize("together", [True, False])
def test_no_recording_lies_on_two_sides_and_every_clip_lies_on_one(config, together):
    clips = corpus({"rock": 20, "jazz": 31, "folk": 10}, windows=3, together=together)
    splits = split_clips(clips, config, seed=0)
    assert sorted(i for members in splits.values() for i in members) == list(range(len(clips)))
    recordings = {name: {clips[i].recording for i in members} for name, members in splits.items()}
    assert sum(len(found) for found in recordings.values()) == 61


@pytest.mark.parametrize("config", [PAPER, STRATIFIED])
@pytest.mark.parametrize("seed", range(5))
def test_every_class_lies_on_every_side(config, seed):
    clips = corpus({"rock": 100, "jazz": 3, "folk": 7})
    for members in split_clips(clips, config, seed).values():
        assert {clips[i].labels["genre"] for i in members} == {"rock", "jazz", "folk"}


def test_paper_is_80_10_10_of_each_class():
    clips = corpus({f"genre-{i}": 100 for i in range(10)}, windows=2)
    splits = split_clips(clips, PAPER, seed=3)
    assert {name: len(members) // 2 for name, members in splits.items()} == {"train": 800, "valid": 100, "test": 100}
    for side, count in zip(SPLITS, (80, 10, 10), strict=True):
        of_class = Counter(clips[i].labels["genre"] for i in splits[side])
        assert set(of_class.values()) == {2 * count}


def test_stratified_takes_the_shares_of_the_config_by_recording():
    clips = corpus({"rock": 20}, windows=1) + corpus({"jazz": 10}, windows=7)
    splits = split_clips(clips, STRATIFIED, seed=0)
    counts = {name: Counter(clips[i].labels["genre"] for i in members) for name, members in splits.items()}
    assert counts["valid"] == {"rock": 4, "jazz": 2 * 7}
    assert counts["test"] == {"rock": 6, "jazz": 3 * 7}


def test_official_is_the_split_of_the_corpus_and_other_clips_are_left_out():
    clips = [clip(f"r{i}", split=split) for i, split in enumerate(["test", "train", None, "valid", "extra", "train"])]
    assert split_clips(clips, OFFICIAL, seed=0) == {"train": [1, 5], "valid": [3], "test": [0]}
    assert split_clips(clips, OFFICIAL, seed=9) == split_clips(clips, OFFICIAL, seed=0)


def test_split_is_a_function_of_the_seed():
    clips = corpus({"rock": 40, "jazz": 40})
    assert sides(clips, PAPER, seed=1) == sides(clips, PAPER, seed=1)
    assert sides(clips, PAPER, seed=1) != sides(clips, PAPER, seed=2)


@pytest.mark.parametrize("config", [PAPER, STRATIFIED])
def test_split_does_not_depend_on_the_order_of_the_clips(config):
    clips = corpus({"rock": 20, "jazz": 30}, windows=2)
    shuffled = [clips[i] for i in np.random.default_rng(0).permutation(len(clips))]
    assert sides(shuffled, config) == sides(clips, config)


def test_split_of_one_class_does_not_depend_on_the_other_classes():
    alone = sides(corpus({"rock": 20}), PAPER)
    assert {key: side for key, side in sides(corpus({"jazz": 30, "rock": 20}), PAPER).items() if key in alone} == alone


def test_class_with_too_few_recordings_is_named():
    found = message(corpus({"rock": 20, "jazz": 2}, windows=9))
    assert found == "class 'jazz': 2 recordings are too few to train, choose and test with"


def test_official_without_a_split_says_which_there_are():
    assert message([clip("a", split="train"), clip("b", split="dev")], OFFICIAL) == (
        "task.protocol=official: the valid split is empty (2 clips in all); the corpus's own splits: dev, train"
    )
    assert message([clip("a")], OFFICIAL).endswith("the corpus's own splits: none")


def test_official_recording_on_two_sides_is_refused():
    clips = [clip("a", split="train"), clip("b", split="valid"), clip("c", split="test"), clip("a", split="test")]
    assert message(clips, OFFICIAL) == "a.wav: windows of recording 'a' are in the splits 'train' and 'test'"


@pytest.mark.parametrize("config", [PAPER, OFFICIAL])
def test_recording_of_two_classes_is_refused(config):
    clips = [*corpus({"rock": 10, "jazz": 10}), clip("rock-003", "jazz", window=1)]
    assert message(clips, config) == (
        "rock-003.wav: windows of recording 'rock-003' are labelled (genre) 'rock' and 'jazz'"
    )


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.2), (0.0, 0.1), (0.1, 1.0)])
def test_shares_that_leave_nothing_to_train_on_are_refused(shares):
    with pytest.raises(ValidationError):
        TaskConfig(label="genre", protocol="stratified", valid_share=shares[0], test_share=shares[1])


def test_classes_are_sorted_names():
    assert classes_of([clip("a", "rock"), clip("b", "jazz"), clip("c", "rock")], "genre") == ["jazz", "rock"]
    assert classes_of([clip("a", 2), clip("b", 10)], "genre") == ["10", "2"]


@pytest.mark.parametrize(
    ("clips", "label", "text"),
    [
        ([clip("a"), clip("b")], "mood", "a.wav: has no label 'mood' (task.label); its labels: genre, year"),
        ([clip("a"), clip("b")], "genre", "task.label=genre: 1 class; a classifier needs at least two"),
        ([], "genre", "task.label=genre: 0 class; a classifier needs at least two"),
        (
            [clip("a", ["/m/1", "/m/2"]), clip("b", ["/m/1"])],
            "genre",
            "a.wav: task.label=genre holds several values; a clip needs one class",
        ),
    ],
)
def test_labels_that_cannot_be_classified_are_refused(clips, label, text):
    with pytest.raises(DataError) as failure:
        classes_of(clips, label)
    assert str(failure.value) == text


def test_windows_are_averaged_by_recording_wherever_they_stand():
    probabilities = np.array([[1.0, 0.0], [0.2, 0.8], [0.0, 1.0], [0.4, 0.6], [0.5, 0.5]])
    averaged, targets, names = average_windows(probabilities, np.array([0, 1, 0, 1, 0]), ["b", "a", "b", "a", "c"])
    assert names == ["b", "a", "c"]
    assert np.allclose(averaged, [[0.5, 0.5], [0.3, 0.7], [0.5, 0.5]], atol=1e-12)  # sums of two doubles
    assert targets.tolist() == [0, 1, 0]


def test_average_can_overrule_most_windows():
    averaged, _, _ = average_windows(np.array([[0.6, 0.4], [0.6, 0.4], [0.0, 1.0]]), np.array([1, 1, 1]), ["a"] * 3)
    assert averaged.argmax(axis=1).tolist() == [1]


def test_scores_are_those_computed_by_hand():
    #           truth:  a a a a b b c, predicted: a a b c b a c
    found = score(np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 1, 0, 2]), ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["count"] == 7
    assert found["chance"] == pytest.approx(4 / 7)
    # F1 = 2 TP / (2 TP + FP + FN)
    f1 = {"a": 4 / (4 + 1 + 2), "b": 2 / (2 + 1 + 1), "c": 2 / (2 + 1 + 0)}
    assert {name: row["f1"] for name, row in found["per_class"].items()} == pytest.approx(f1)
    assert found["macro_f1"] == pytest.approx(sum(f1.values()) / 3)
    assert found["per_class"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": f1["a"], "count": 4})


def test_confusion_rows_are_truth_and_columns_are_predictions():
    found = score(np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1]), ["a", "b", "c"])
    assert found["confusion"] == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]
    assert found["classes"] == ["a", "b", "c"]


def test_class_absent_from_the_test_set_is_not_in_the_macro_mean():
    targets, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    found = score(targets, predicted, ["a", "b", "absent"])
    assert found["macro_f1"] == pytest.approx((1.0 + 2 / 3) / 2)  # b: precision 1, recall 1/2
    assert found["per_class"]["absent"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 0}
    assert score(targets, np.array([0, 0, 1, 1]), ["a", "b", "absent"])["macro_f1"] == 1.0


def test_class_that_is_never_predicted_counts_as_zero():
    assert score(np.array([0, 0, 1]), np.array([0, 0, 0]), ["a", "b"])["macro_f1"] == pytest.approx(0.8 / 2)
