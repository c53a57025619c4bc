"""Labels and splits: nothing that is tested was trained on, whatever the protocol."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megascale.config import validate
from megascale.data.index import StoredClip
from megascale.downstream.protocols import SPLITS, TaskConfig, classes_of, split_clips, taking_part, targets_of
from megascale.errors import ConfigError, DataError

PAPER = TaskConfig(label="genre", protocol="paper")
STRATIFIED = TaskConfig(label="genre", protocol="stratified", valid_share=0.2, test_share=0.3)
OFFICIAL = TaskConfig(label="genre", protocol="official")
FOLDS = TaskConfig(label="genre", protocol="folds")
MULTI = TaskConfig(label="genre", kind="multi")


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
    assert classes_of(chosen, named) == ["folk", "jazz"]


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


def test_numbers_are_classes_as_they_are_in_yaml():
    config = validate(TaskConfig, "task", {"label": "genre", "classes": [60, 61, 0.5], "absent_from_test": [61, True]})
    assert (config.classes, config.absent_from_test) == (["60", "61", "0.5"], ["61", "True"])
    clips = [clip(f"{pitch}", pitch) for pitch in (60, 61, 62, 0.5)]
    assert taking_part(clips, config) == [clips[0], clips[1], clips[3]]
    with pytest.raises(ConfigError, match=r"^task\.classes\.1=\[61\]: Input should be a valid string$"):
        validate(TaskConfig, "task", {"label": "genre", "classes": [60, [61]]})
    with pytest.raises(ConfigError, match=r"^task\.classes=60: Input should be a valid list$"):
        validate(TaskConfig, "task", {"label": "genre", "classes": 60})


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


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"music": 64, "speech": 64}, (102, 13, 13)),  # the paper's 84.62% are 11 of 13
        ({"jazz": 99} | {f"genre-{i}": 100 for i in range(9)}, (799, 100, 100)),  # GTZAN without its broken file
        ({"rock": 100, "jazz": 3, "folk": 7}, (86, 12, 12)),  # one at least of each
    ],
)
def test_papers_shares_are_of_all_recordings_and_what_is_left_goes_to_the_largest_remainders(counts, sizes):
    more_of_music = set()
    for seed in range(8):
        clips = corpus(counts)
        splits = split_clips(clips, PAPER, seed)
        assert tuple(len(splits[side]) for side in SPLITS) == sizes
        for side in ("valid", "test"):
            of_class = Counter(clips[i].labels["genre"] for i in splits[side])
            assert all(abs(of_class[name] - count / 10) < 1 for name, count in counts.items())
            more_of_music.add(of_class["music"] > of_class["speech"])
    assert "music" not in counts or more_of_music == {True, False}, "either class may have the odd one"


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


@pytest.mark.parametrize("config", [PAPER, STRATIFIED])  # of the paper's where there is no remainder
def test_split_of_one_class_does_not_depend_on_the_other_classes(config):
    alone = sides(corpus({"rock": 20}), config)
    assert {key: side for key, side in sides(corpus({"jazz": 30, "rock": 20}), config).items() if key in alone} == alone


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


def test_test_split_may_be_a_folder_of_its_own_and_validation_is_then_drawn_where_there_is_none():
    config = OFFICIAL.model_copy(update={"valid_share": 0.25})
    own, apart = corpus({"rock": 20, "jazz": 8}, windows=2), corpus({"rock": 3, "jazz": 3})
    splits = split_clips([*own, *apart], config, seed=0, num_apart=len(apart))
    assert splits["test"] == list(range(len(own), len(own) + len(apart)))
    assert sorted(splits["train"] + splits["valid"]) == list(range(len(own)))
    assert Counter(own[i].labels["genre"] for i in splits["valid"]) == {"rock": 10, "jazz": 4}  # two windows each
    assert {own[i].recording for i in splits["train"]}.isdisjoint(own[i].recording for i in splits["valid"])
    assert split_clips([*own, *apart], config, seed=1, num_apart=len(apart)) != splits


def test_corpus_with_clips_for_validation_keeps_them_where_the_test_split_is_a_folder_of_its_own():
    own = [clip("a", split="train"), clip("b", split="valid"), clip("c", split="dev"), clip("d", split="train")]
    # a name that the first folder has, too, with another class: it may be another recording
    splits = split_clips([*own, clip("a", "jazz")], OFFICIAL, seed=0, num_apart=1)
    assert splits == {"train": [0, 3], "valid": [1], "test": [4]}


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
    assert classes_of([clip("a", "rock"), clip("b", "jazz"), clip("c", "rock")], PAPER) == ["jazz", "rock"]
    assert classes_of([clip("a", 2), clip("b", 10)], PAPER) == ["10", "2"]


@pytest.mark.parametrize(
    ("clips", "label", "text"),
    [
        (
            [StoredClip("a", None, "a", "a.wav", {}, None)],
            "class",
            "a.wav: has no label 'class' (task.label); its labels: none; tokenised with source.label_from_folder=true, "
            "files have their folder's name as `class`",
        ),
        ([clip("a"), clip("b")], "mood", "a.wav: has no label 'mood' (task.label); its labels: genre, year"),
        ([clip("a"), clip("b")], "genre", "task.label=genre: 1 class; a classifier needs at least two"),
        ([], "genre", "task.label=genre: 0 class; a classifier needs at least two"),
        (
            [clip("a", ["/m/1", "/m/2"]), clip("b", ["/m/1"])],
            "genre",
            "a.wav: task.label=genre holds several values; one a clip, or task.kind=multi",
        ),
    ],
)
def test_labels_that_cannot_be_classified_are_refused(clips, label, text):
    with pytest.raises(DataError) as failure:
        classes_of(clips, TaskConfig(label=label))
    assert str(failure.value) == text


def test_targets_are_numbers_of_classes():
    clips = [clip("a", 60), clip("b", 7), clip("c", 60)]
    classes = classes_of(clips, PAPER)
    targets = targets_of(clips, classes, PAPER)
    assert (targets.dtype, [classes[i] for i in targets]) == (np.int64, ["60", "7", "60"])
    assert targets_of([*clips, clip("d", 8)], classes, PAPER).tolist()[-1] == -1


# ------------------------------------------------------------------------------------------------------- several labels


def test_several_labels_become_classes_and_rows_of_targets():
    clips = [clip("a", ["/m/2", "/m/1", "/m/2"]), clip("b", []), clip("c", ["/m/3"])]
    assert classes_of(clips, MULTI) == ["/m/1", "/m/2", "/m/3"]
    targets = targets_of(clips, ["/m/1", "/m/2", "/m/3"], MULTI)
    assert (targets.dtype, targets.tolist()) == (np.float32, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_clips_of_none_of_the_named_classes_are_left_out_and_other_labels_forgotten():
    clips = [clip("a", ["/m/1", "/m/2"]), clip("b", ["/m/3"]), clip("c", ["/m/2", "/m/3"])]
    named = MULTI.model_copy(update={"classes": ["/m/1", "/m/2"]})
    chosen = taking_part(clips, named)
    assert [c.recording for c in chosen] == ["a", "c"]
    assert classes_of(chosen, named) == ["/m/1", "/m/2"]
    assert targets_of(chosen, ["/m/1", "/m/2"], named).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("wrong", ["rock", 3, None, {"rock": 1}])
def test_one_value_where_a_list_is_wanted_is_refused(wrong):
    with pytest.raises(DataError) as failure:
        classes_of([clip("a", ["rock"]), clip("b", wrong)], MULTI)
    assert str(failure.value) == (f"b.wav: task.label=genre holds one value, {wrong!r}; task.kind=multi takes lists")


def test_kind_is_checked_before_clips_are_left_out():
    with pytest.raises(DataError, match=r"^a\.wav: task\.label=genre holds several values"):
        taking_part([clip("a", ["rock"]), clip("b", "jazz")], PAPER.model_copy(update={"classes": ["rock", "jazz"]}))


def test_rare_labels_are_divided_first_and_the_rarest_are_at_least_learned():
    tags = [["speech", "whistle"]] * 20 + [["speech"]] * 60 + [["speech", "xylophone"]] + [[]] * 20
    clips = [clip(f"r{i:03d}", labels) for i, labels in enumerate(tags)]
    splits = split_clips(clips, MULTI, seed=0)
    of_side = {name: Counter(tag for i in members for tag in tags[i]) for name, members in splits.items()}
    assert [of_side[name]["whistle"] for name in SPLITS] == [16, 2, 2]
    assert [of_side[name]["speech"] for name in SPLITS] == [64 + 1, 8, 8]
    assert [of_side[name]["xylophone"] for name in SPLITS] == [1, 0, 0]
    assert sum(not tags[i] for i in splits["test"]) == 2


def test_windows_that_disagree_in_one_label_of_several_are_refused():
    clips = [clip("a", ["x", "y"]), clip("a", ["y", "x"], window=1), clip("a", ["x"], window=2)]
    assert message(clips, MULTI) == ("a.wav: windows of recording 'a' are labelled (genre) ('x', 'y') and ('x',)")


# ---------------------------------------------------------------------------------------------------------------- folds


def test_each_recording_is_tested_once_and_validated_once_over_the_folds():
    clips = corpus({"rock": 100, "jazz": 37, "folk": 3}, windows=2)
    tested, chosen = Counter(), Counter()
    for fold in range(10):
        splits = split_clips(clips, FOLDS.model_copy(update={"fold": fold}), seed=5)
        assert sorted(i for members in splits.values() for i in members) == list(range(len(clips)))
        tested.update(clips[i].recording for i in splits["test"])
        chosen.update(clips[i].recording for i in splits["valid"])
        # a class is divided evenly, and always learned
        of_class = Counter(clips[i].labels["genre"] for i in splits["test"])
        assert of_class["rock"] == 2 * 10 and of_class["jazz"] in (2 * 3, 2 * 4) and of_class["folk"] in (0, 2)
        assert {clips[i].labels["genre"] for i in splits["train"]} == {"rock", "jazz", "folk"}
    assert set(tested.values()) == set(chosen.values()) == {2}
    assert len(tested) == len(chosen) == 140


def test_next_fold_chooses_the_model():
    clips = corpus({"rock": 40, "jazz": 40})
    folds = [split_clips(clips, FOLDS.model_copy(update={"fold": k, "folds": 4}), seed=0) for k in range(4)]
    assert [folds[k]["valid"] for k in range(4)] == [folds[(k + 1) % 4]["test"] for k in range(4)]


def test_rests_of_the_classes_do_not_gather_in_one_fold():
    clips = corpus({f"genre-{i:02d}": 11 for i in range(50)})
    sizes = [len(split_clips(clips, FOLDS.model_copy(update={"fold": k}), seed=0)["test"]) for k in range(10)]
    assert sum(sizes) == 550 and max(sizes) < 50 + 25, "all 50 rests would make 100 of one fold"


def test_music_speech_in_ten_folds():
    clips = corpus({"music": 64, "speech": 64})
    sizes = [
        [len(members) for members in split_clips(clips, FOLDS.model_copy(update={"fold": k}), 0).values()]
        for k in range(10)
    ]
    assert all(train + valid + test == 128 and 12 <= test <= 14 for train, valid, test in sizes)


def test_fold_that_there_is_not_and_classes_that_cannot_be_divided_are_refused():
    with pytest.raises(ConfigError) as failure:
        validate(TaskConfig, "task", {"label": "genre", "protocol": "folds", "folds": 5, "fold": 5})
    assert str(failure.value) == "task: fold=5 must be one of the 5 folds, 0 to 4"
    assert message(corpus({"rock": 20, "jazz": 2}), FOLDS) == (
        "class 'jazz': 2 recordings are too few to train, choose and test with"
    )


# ---------------------------------------------------------------------------------------------------------------- lists


def lists(folder: Path, **names: list[str]) -> TaskConfig:
    """Write a list for each split, and return the task that reads them."""
    urls = {}
    for side in SPLITS:
        (folder / f"{side}.txt").write_text("".join(f"{name}\n" for name in names[side]))
        urls[side] = str(folder / f"{side}.txt")
    return TaskConfig.model_validate({"label": "genre", "protocol": "lists", "lists": urls})


def test_lists_say_who_lies_where_and_the_seed_does_not(tmp_path):
    clips = corpus({"rock": 4, "jazz": 4}, windows=2, together=False)
    task = lists(tmp_path, train=["rock-000.wav", "jazz-003.wav"], valid=["rock-002.wav"], test=["jazz-001.wav"])
    found = split_clips(clips, task, seed=0)
    named = {side: {clips[i].recording for i in members} for side, members in found.items()}
    assert named == {"train": {"rock-000", "jazz-003"}, "valid": {"rock-002"}, "test": {"jazz-001"}}
    assert [len(members) for members in found.values()] == [4, 2, 2]
    assert split_clips(clips, task, seed=1) == found


def test_list_that_leaves_a_split_empty_is_refused(tmp_path):
    task = lists(tmp_path, train=["rock-000.wav"], valid=["rock-001.wav"], test=["other/rock-000.wav"])
    assert message(corpus({"rock": 4}), task) == (
        "task.protocol=lists: the test split is empty (4 clips in all); task.lists.test names no clip of the tokens"
    )


def test_lists_are_asked_for():
    tree = {"label": "genre", "protocol": "lists", "lists": {"train": "a.txt", "test": "b.txt"}}
    with pytest.raises(ConfigError) as failure:
        validate(TaskConfig, "task", tree)
    assert str(failure.value) == "task: lists.valid is required for protocol=lists"
