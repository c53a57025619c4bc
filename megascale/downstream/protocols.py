"""Labels and splits: what a clip is, who is trained on, who chooses the model, and who is tested.

Everything is decided by recording: windows of one recording never lie on two sides.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from megascale import seeding
from megascale.config import Section
from megascale.data.index import StoredClip
from megascale.downstream.split_lists import ListsConfig, match_lists
from megascale.errors import DataError

T = TypeVar("T")
Splits = dict[str, list[int]]
SPLITS = ("train", "valid", "test")
SURE = 0.5  # where a clip has any number of labels, those of this probability or more are told as its own
_PAPER_SHARES = (0.1, 0.1)


class TaskConfig(Section):
    """What is classified, and how the clips are split."""

    label: str = Field(description="which label of the clips: genre, instrument_family_str, pitch, class, tags, ...")
    kind: Literal["single", "multi"] = Field(
        "single",
        description="single: the label is one class a clip; multi: a list of any number, such as AudioSet's tags",
    )
    classes: list[str] | None = Field(
        None, min_length=2, description="values of the label that take part; clips of others are left out. null: all"
    )
    absent_from_test: list[str] = Field(
        [],
        description="single: classes that no test clip need be of, such as NSynth's synth_lead; any other without one is "
        "refused",
    )
    protocol: Literal["official", "paper", "stratified", "folds", "lists"] = Field(
        "paper",
        description="official: the corpus's splits; paper: random stratified 80/10/10 of all; stratified: the shares below; "
        "folds: cross-validation; lists: files that name them",
    )
    valid_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="stratified, or official with data.test_url: share of each class that chooses the model",
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="stratified: share of each class that is tested")
    folds: int = Field(10, ge=3, description="folds: number of stratified parts, which the seed draws")
    fold: int = Field(0, ge=0, description="folds: the part that is tested; the next one chooses the model")
    lists: ListsConfig = Field(ListsConfig(), description="lists: a text file for each split")
    group: str | None = Field(
        None, description="a label that should not lie on two sides, looked for and told; null: instrument_str, if any"
    )

    @field_validator("classes", "absent_from_test", mode="before")
    @classmethod
    def _numbers_are_names(cls, values: Any) -> Any:
        if not isinstance(values, list):
            return values
        # as `values_of` spells them
        return [str(value) if isinstance(value, int | float) else value for value in values]

    @model_validator(mode="after")
    def _is_complete(self) -> "TaskConfig":
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share must leave something to train on")
        if self.fold >= self.folds:
            raise ValueError(f"fold={self.fold} must be one of the {self.folds} folds, 0 to {self.folds - 1}")
        missing = [name for name, url in self.lists.model_dump().items() if url is None]
        if self.protocol == "lists" and missing:
            raise ValueError(f"lists.{missing[0]} is required for protocol=lists")
        return self


def each_fold(task: TaskConfig) -> list[TaskConfig]:
    """Return the task with each of its folds in turn; under other protocols it alone."""
    if task.protocol != "folds":
        return [task]
    return [task.model_copy(update={"fold": fold}) for fold in range(task.folds)]


def refuse_several_labels(tasks: Iterable[tuple[str, TaskConfig]]) -> None:
    """Raise ValueError for a task, by its key, that is scored by mAP; for jobs that compare accuracies."""
    for key, task in tasks:
        if task.kind == "multi":
            raise ValueError(
                f"{key}.kind=multi: accuracies are compared here, and it has none; launch/finetune.py scores it"
            )


# -------------------------------------------------------------------------------------------------------------- labels


def taking_part(clips: Iterable[StoredClip], config: TaskConfig) -> list[StoredClip]:
    """Return the clips that are classified: all, or those whose label is (or holds) one of `task.classes`.

    Raises:
        DataError: no clip carries one of these classes, or a label is not what `task.kind` says.
    """
    if config.classes is None:
        return list(clips)
    kept = [
        clip for clip in clips if config.label in clip.labels and set(values_of(clip, config)) & set(config.classes)
    ]
    missing = set(config.classes) - {value for clip in kept for value in values_of(clip, config)}
    if missing:
        raise DataError(f"task.classes: no clip has the {config.label} {min(missing)!r}")
    return kept


def values_of(clip: StoredClip, config: TaskConfig) -> tuple[str, ...]:
    """Return the classes of a clip: one, or (`task.kind=multi`) those of its list that take part, sorted.

    Raises:
        DataError: the clip lacks the label, or carries several values where one is asked for, or one for several.
    """
    label = config.label
    if label not in clip.labels:
        known = ", ".join(sorted(clip.labels)) or (
            "none; tokenised with source.label_from_folder=true, files have their folder's name as `class`"
        )
        raise DataError(f"{clip.source}: has no label {label!r} (task.label); its labels: {known}")
    value = clip.labels[label]
    if config.kind == "single":
        if isinstance(value, list | dict):
            raise DataError(f"{clip.source}: task.label={label} holds several values; one a clip, or task.kind=multi")
        return (str(value),)
    if not isinstance(value, list):
        raise DataError(f"{clip.source}: task.label={label} holds one value, {value!r}; task.kind=multi takes lists")
    return tuple(sorted({str(v) for v in value if config.classes is None or str(v) in config.classes}))


def classes_of(clips: Sequence[StoredClip], config: TaskConfig) -> list[str]:
    """Return the classes, sorted. Raises DataError as `values_of`, and if there are fewer than two classes."""
    names = sorted({value for clip in clips for value in values_of(clip, config)})
    if len(names) < 2:
        raise DataError(f"task.label={config.label}: {len(names)} class; a classifier needs at least two")
    return names


def targets_of(clips: Sequence[StoredClip], classes: list[str], config: TaskConfig) -> np.ndarray:
    """Return class numbers, int64 (N,), or (`task.kind=multi`) which labels each clip has, float32 (N, C).

    A clip that carries no one of `classes` has -1, or no label.
    """
    number = {name: i for i, name in enumerate(classes)}
    values = [values_of(clip, config) for clip in clips]
    if config.kind == "single":
        return np.array([number.get(value, -1) for (value,) in values], dtype=np.int64)
    targets_NC = np.zeros((len(clips), len(classes)), dtype=np.float32)
    for row, carried in zip(targets_NC, values, strict=True):
        row[[number[value] for value in carried if value in number]] = 1.0
    return targets_NC


# -------------------------------------------------------------------------------------------------------------- splits


def split_clips(clips: Sequence[StoredClip], config: TaskConfig, seed: int, num_apart: int = 0) -> Splits:
    """Split clips by protocol. Which side a recording lies on doesn't depend on the order of the clips.

    Where clips have several labels, a recording counts for its rarest one when parts of equal make-up are drawn.

    Args:
        clips: of one token folder; those of the test split's own folder, if it has one, at the end.
        config: the protocol.
        seed: fixes what is drawn.
        num_apart: how many clips are of the test split's own folder (protocol official); another recording may have a
            name there that one has in the first. Where no other clip is its corpus's for validation, `valid_share` of
            each class is.

    Returns:
        `train`, `valid` and `test`: positions in `clips`.

    Raises:
        DataError: a split would be empty, the windows of a recording carry other labels or lie on two sides, a class has
            too few recordings to be divided, or a list contradicts another or fits several recordings.
        StorageError: a list cannot be read.
    """
    own, apart = clips[: len(clips) - num_apart], clips[len(clips) - num_apart :]
    values_of_recording = _labelled(own, config)
    _labelled(apart, config)
    if config.protocol == "official":
        side = _one_each(own, [clip.split for clip in own], "in the splits")
        if apart and "valid" not in side.values():
            free = {name: values for name, values in values_of_recording.items() if side[name] in (None, "train")}
            side |= dict(_drawn(free, config, seed))
    elif config.protocol == "lists":
        side_of_source, _ = match_lists(config.lists, {clip.source for clip in own})
        side = _one_each(own, [side_of_source.get(clip.source) for clip in own], "in the lists of")
    else:
        side = dict(_drawn(values_of_recording, config, seed))
    splits = {name: [i for i, clip in enumerate(own) if side[clip.recording] == name] for name in SPLITS}
    splits["test"] += range(len(own), len(clips))
    for name, members in splits.items():
        if not members:
            known = ", ".join(sorted({clip.split for clip in clips if clip.split})) or "none"
            hint = f"; the corpus's own splits: {known}" if config.protocol == "official" else ""
            hint = f"; task.lists.{name} names no clip of the tokens" if config.protocol == "lists" else hint
            raise DataError(
                f"task.protocol={config.protocol}: the {name} split is empty ({len(clips)} clips in all){hint}"
            )
    return splits


def _labelled(clips: Sequence[StoredClip], config: TaskConfig) -> dict[str, tuple[str, ...]]:
    """Return the classes of each recording; its windows must agree."""
    carried = [values_of(clip, config) for clip in clips]
    told: Sequence[object] = [values[0] for values in carried] if config.kind == "single" else carried
    _one_each(clips, told, f"labelled ({config.label})")
    return {clip.recording: values for clip, values in zip(clips, carried, strict=True)}


def _one_each(clips: Sequence[StoredClip], values: Sequence[T], what: str) -> dict[str, T]:
    """Return each recording's value; its windows must agree."""
    found: dict[str, T] = {}
    for clip, value in zip(clips, values, strict=True):
        first = found.setdefault(clip.recording, value)
        if first != value:
            raise DataError(
                f"{clip.source}: windows of recording {clip.recording!r} are {what} {first!r} and {value!r}"
            )
    return found


def _drawn(values_of_recording: dict[str, tuple[str, ...]], config: TaskConfig, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (recording, side): of every class the same shares, or every fold the same share."""
    strata = _strata(values_of_recording)
    sizes = _sizes({name: len(recordings) for name, recordings in strata.items()}, config, seed)
    for name, recordings in sorted(strata.items()):
        rng = seeding.generator(seed, "folds" if config.protocol == "folds" else "split", name)
        order = rng.permutation(len(recordings))
        side_of_place = _places(len(recordings), config, rng, *sizes[name])
        if side_of_place is None and config.kind == "single":
            raise DataError(f"class {name!r}: {len(recordings)} recordings are too few to train, choose and test with")
        for place, i in enumerate(order):
            # where a clip has several labels there are always rare ones, and they are at least learned
            yield recordings[i], side_of_place(place) if side_of_place is not None else "train"


def _sizes(counts: dict[str, int], config: TaskConfig, seed: int) -> dict[str, tuple[int, int]]:
    """Return how many recordings of each class choose the model, and how many are tested (folds: no matter)."""
    if config.protocol == "paper":
        rng = seeding.generator(seed, "split, remainders")
        valid, test = (_apportion(counts, share, rng) for share in _PAPER_SHARES)
        return {name: (valid[name], test[name]) for name in counts}
    test_share = 0.0 if config.protocol == "official" else config.test_share  # official has its test clips elsewhere
    return {
        name: (max(1, round(config.valid_share * count)), max(1, round(test_share * count)) if test_share else 0)
        for name, count in counts.items()
    }


def _apportion(counts: dict[str, int], share: float, rng: np.random.Generator) -> dict[str, int]:
    """Divide a share of all recordings, rounded, among the classes: by their parts of it, what is left by the largest
    remainders, equal ones as the seed draws; and one at least of each.

    So 13 of music/speech's 64 + 64 clips are tested, of which the paper's 84.62% are 11; and 10 of 100 for each genre.
    """
    names = sorted(counts)
    parts = np.round([share * counts[name] for name in names], 9)
    sizes = np.floor(parts).astype(int)
    left = round(share * sum(counts.values())) - int(sizes.sum())
    sizes[np.lexsort((rng.permutation(len(names)), sizes - parts))[:left]] += 1
    return {name: max(1, int(size)) for name, size in zip(names, sizes, strict=True)}


def _places(
    count: int, config: TaskConfig, rng: np.random.Generator, valid: int, test: int
) -> Callable[[int], str] | None:
    """Return the side of each place in a shuffled class of `count` recordings; None if they are too few."""
    if config.protocol == "folds":
        first = int(rng.integers(config.folds))  # else the rests of all classes would lie in the first folds
        sides = {config.fold: "test", (config.fold + 1) % config.folds: "valid"}
        return (lambda place: sides.get((first + place) % config.folds, "train")) if count >= 3 else None
    if valid + test >= count:
        return None
    return lambda place: "valid" if place < valid else "test" if place < valid + test else "train"


def _strata(values_of_recording: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Return the recordings, sorted, by class: by the rarest that each carries, and '' if none."""
    counts = Counter(value for values in values_of_recording.values() for value in values)
    strata: dict[str, list[str]] = defaultdict(list)
    for recording, values in sorted(values_of_recording.items()):
        strata[min(values, key=lambda value: (counts[value], value), default="")].append(recording)
    return strata
