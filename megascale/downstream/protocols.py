"""Splits and scores: who is trained on, who chooses the model, who is tested, and what counts as good.

Everything is decided by recording: windows of one recording never lie on two sides, and they are averaged before
scoring.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_validator
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from megascale import seeding
from megascale.config import Section
from megascale.data.index import StoredClip
from megascale.errors import DataError

T = TypeVar("T")
Splits = dict[str, list[int]]
SPLITS = ("train", "valid", "test")
_PAPER_SHARES = (0.1, 0.1)


class TaskConfig(Section):
    """What is classified, and how the clips are split."""

    label: str = Field(description="which label of the clips: genre, instrument_family_str, class, ...")
    classes: list[str] | None = Field(
        None, min_length=2, description="values of the label that take part; clips of others are left out. null: all"
    )
    protocol: Literal["official", "paper", "stratified"] = Field(
        "paper",
        description="official: the corpus's splits; paper: random stratified 80/10/10; stratified: the shares below",
    )
    valid_share: float = Field(0.1, gt=0, lt=1, description="stratified: share of each class that chooses the model")
    test_share: float = Field(0.1, gt=0, lt=1, description="stratified: share of each class that is tested")

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "TaskConfig":
        if self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share must leave something to train on")
        return self


def taking_part(clips: Iterable[StoredClip], config: TaskConfig) -> list[StoredClip]:
    """Return the clips that are classified: all, or those whose label is one of `task.classes`.

    Raises:
        DataError: no clip carries one of these classes.
    """
    if config.classes is None:
        return list(clips)
    label, chosen = config.label, config.classes
    kept = [clip for clip in clips if label in clip.labels and str(clip.labels[label]) in chosen]
    missing = set(chosen) - {str(clip.labels[label]) for clip in kept}
    if missing:
        raise DataError(f"task.classes: no clip has the {label} {min(missing)!r}")
    return kept


def classes_of(clips: Sequence[StoredClip], label: str) -> list[str]:
    """Return the classes, sorted.

    Raises:
        DataError: a clip lacks the label or carries several values of it, or there are fewer than two classes.
    """
    for clip in clips:
        if label not in clip.labels:
            known = ", ".join(sorted(clip.labels)) or "none"
            raise DataError(f"{clip.source}: has no label {label!r} (task.label); its labels: {known}")
        if isinstance(clip.labels[label], list | dict):
            raise DataError(f"{clip.source}: task.label={label} holds several values; a clip needs one class")
    names = sorted({str(clip.labels[label]) for clip in clips})
    if len(names) < 2:
        raise DataError(f"task.label={label}: {len(names)} class; a classifier needs at least two")
    return names


def split_clips(clips: Sequence[StoredClip], config: TaskConfig, seed: int) -> Splits:
    """Split clips by protocol. Which side a recording lies on doesn't depend on the order of the clips.

    Returns:
        `train`, `valid` and `test`: positions in `clips`.

    Raises:
        DataError: a split would be empty, a recording carries two classes, or (official) lies on two sides.
    """
    class_of = _one_each(clips, [str(clip.labels[config.label]) for clip in clips], f"labelled ({config.label})")
    if config.protocol == "official":
        side = _one_each(clips, [clip.split for clip in clips], "in the splits")
    else:
        shares = _PAPER_SHARES if config.protocol == "paper" else (config.valid_share, config.test_share)
        side = dict(_stratified(class_of, shares, seed))
    splits = {name: [i for i, clip in enumerate(clips) if side[clip.recording] == name] for name in SPLITS}
    for name, members in splits.items():
        if not members:
            known = ", ".join(sorted({clip.split for clip in clips if clip.split})) or "none"
            hint = f"; the corpus's own splits: {known}" if config.protocol == "official" else ""
            raise DataError(
                f"task.protocol={config.protocol}: the {name} split is empty ({len(clips)} clips in all){hint}"
            )
    return splits


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


def _stratified(class_of: dict[str, str], shares: tuple[float, float], seed: int) -> Iterator[tuple[str, str]]:
    """Yield (recording, side), the same shares of every class."""
    for name in sorted(set(class_of.values())):
        recordings = sorted(recording for recording, found in class_of.items() if found == name)
        valid, test = (max(1, round(share * len(recordings))) for share in shares)
        if valid + test >= len(recordings):
            raise DataError(f"class {name!r}: {len(recordings)} recordings are too few to train, choose and test with")
        order = seeding.generator(seed, "split", name).permutation(len(recordings))
        for place, i in enumerate(order):
            yield recordings[i], "valid" if place < valid else "test" if place < valid + test else "train"


def average_windows(
    probabilities_NC: np.ndarray, targets_N: np.ndarray, recordings: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Average the class probabilities of the windows of each recording.

    Returns:
        probabilities_RC and targets_R for the R recordings, and their names, in order of first appearance.
    """
    names = list(dict.fromkeys(recordings))
    row_of = {name: i for i, name in enumerate(names)}
    rows_N = np.array([row_of[name] for name in recordings])
    sums_RC = np.zeros((len(names), probabilities_NC.shape[1]))
    np.add.at(sums_RC, rows_N, probabilities_NC)
    targets_R = np.zeros(len(names), dtype=targets_N.dtype)
    targets_R[rows_N] = targets_N
    return sums_RC / np.bincount(rows_N)[:, None], targets_R, names


def score(targets_R: np.ndarray, predicted_R: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Return accuracy, macro-F1, per-class scores, the confusion matrix (rows: truth) and the count.

    Macro-F1 is the mean over the classes that occur in the test set: NSynth's `synth_lead` has no test clip and would
    otherwise count as a failure of every model. Predictions of an absent class still cost the true one.
    """
    present = sorted(set(targets_R.tolist()))
    numbers = list(range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        targets_R, predicted_R, labels=numbers, zero_division=0
    )
    return {
        "accuracy": float((targets_R == predicted_R).mean()),
        "macro_f1": float(f1_score(targets_R, predicted_R, labels=present, average="macro", zero_division=0)),
        "count": len(targets_R),
        "chance": float(np.bincount(targets_R).max() / len(targets_R)),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "count": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": confusion_matrix(targets_R, predicted_R, labels=numbers).tolist(),
        "classes": classes,
    }
