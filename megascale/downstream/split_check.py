"""What a split is worth: classes that cannot be learned or scored, and what lies on two sides of it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megascale.data.index import StoredClip
from megascale.downstream.protocols import SPLITS, Splits, TaskConfig, values_of
from megascale.downstream.split_lists import match_lists
from megascale.errors import DataError

_KNOWN_GROUPS = ("instrument_str",)  # NSynth: the instruments of training are in no other split
_PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))


def check_split(clips: Sequence[StoredClip], splits: Splits, config: TaskConfig) -> dict[str, Any]:
    """Check a split's classes, and look for leaks: recordings, groups and equal codes on two sides.

    Returns:
        For result.json: `recordings` of each split; `recordings_on_two_sides`, `group` (the label; None: there is none),
        `groups_on_two_sides` and `equal_codes_on_two_sides`, each with its count, that of each pair of splits, and an
        example; `classes_absent` from validation and test; `unlisted` and `missing` of the lists; `summary`, one line.

    Raises:
        DataError: a class to be scored is in no training clip, one that was trained is in no test clip (unless
            `task.absent_from_test` names it), a split holds a single class, or no clip has `task.group`.
    """
    _check_classes(clips, splits, config)
    sides = {name: [clips[i] for i in members] for name, members in splits.items()}
    group = _group_label(clips, config)
    found: dict[str, Any] = {
        "recordings": {name: len({clip.recording for clip in side}) for name, side in sides.items()},
        "recordings_on_two_sides": _on_two_sides(
            {name: {clip.recording: clip.source for clip in side} for name, side in sides.items()}
        ),
        "group": group,
        "groups_on_two_sides": _on_two_sides({name: _values(side, group) for name, side in sides.items()}),
        "equal_codes_on_two_sides": _on_two_sides(
            {name: {_codes_hash(clip): clip.source for clip in side} for name, side in sides.items()}
        ),
        "classes_absent": _absent(sides, config),
    }
    if config.protocol == "lists":
        side_of_source, missing = match_lists(config.lists, {clip.source for clip in clips})
        unlisted = {clip.recording for clip in clips if clip.source not in side_of_source}
        found |= {"missing": missing, "unlisted": len(unlisted)}
    return found | {"summary": _summary(found)}


def _check_classes(clips: Sequence[StoredClip], splits: Splits, config: TaskConfig) -> None:
    carried = {name: [values_of(clips[i], config) for i in members] for name, members in splits.items()}
    trained = {value for values in carried["train"] for value in values}
    for name, rows in carried.items():
        unknown = sorted({value for values in rows for value in values} - trained)
        if unknown:
            more = f" (nor of {len(unknown) - 1} more classes)" if len(unknown) > 1 else ""
            raise DataError(
                f"task.label={config.label}: no training clip is of {unknown[0]!r}{more}, which the {name} split holds; "
                "task.classes can leave it out"
            )
        # a class is told from others only where some clips are of it and some are not
        if not any(0 < sum(value in values for values in rows) < len(rows) for value in trained):
            one = ", ".join(repr(value) for value in rows[0])
            raise DataError(
                f"task.label={config.label}: all {len(rows)} clips of the {name} split are of {one or 'none'}"
            )
    if config.kind == "multi":  # mAP is the mean over classes that occur, and of hundreds of tags some are always rare
        return
    tested = {value for values in carried["test"] for value in values}
    absent = sorted(trained - tested - set(config.absent_from_test))
    if absent:
        more = f" (nor of {len(absent) - 1} more classes)" if len(absent) > 1 else ""
        named = json.dumps(sorted({*absent, *config.absent_from_test}), ensure_ascii=False)
        raise DataError(
            f"task.label={config.label}: no test clip is of {absent[0]!r}{more}, which training holds; task.classes can "
            f"leave it out, task.absent_from_test={named} lets it be"
        )


def _group_label(clips: Sequence[StoredClip], config: TaskConfig) -> str | None:
    if config.group is not None:
        if not any(config.group in clip.labels for clip in clips):
            raise DataError(f"task.group={config.group}: no clip has this label")
        return config.group
    known = (label for label in _KNOWN_GROUPS if any(label in clip.labels for clip in clips))
    return next((label for label in known if label != config.label), None)


def _values(clips: Sequence[StoredClip], label: str | None) -> dict[str, str]:
    values = {str(clip.labels[label]) for clip in clips if label is not None and label in clip.labels}
    return {value: value for value in values}


def _absent(sides: dict[str, list[StoredClip]], config: TaskConfig) -> dict[str, list[str]]:
    carried = {name: {value for clip in side for value in values_of(clip, config)} for name, side in sides.items()}
    return {name: sorted(carried["train"] - carried[name]) for name in SPLITS[1:]}


def _on_two_sides(keys: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Count what lies on two sides, given each side's keys and, for the example, the name of what has it."""
    shared = {pair: sorted(keys[pair[0]].keys() & keys[pair[1]].keys()) for pair in _PAIRS}
    example = next(
        ([keys[pair[0]][found[0]], keys[pair[1]][found[0]]] for pair, found in shared.items() if found), None
    )
    counts = {f"{one}-{other}": len(found) for (one, other), found in shared.items()}
    return {"count": len(set().union(*shared.values())), **counts, "example": example}


def _codes_hash(clip: StoredClip) -> str:
    digest = hashlib.blake2b(repr(clip.codes_QT.shape).encode(), digest_size=16)
    digest.update(clip.codes_QT.astype("<i2").tobytes())
    return digest.hexdigest()


def _summary(found: dict[str, Any]) -> str:
    parts = [", ".join(f"{count} {name}" for name, count in found["recordings"].items()) + " recordings"]
    parts.append(_leak("recording", found["recordings_on_two_sides"]))
    if found["group"] is not None:
        parts.append(_leak(found["group"], found["groups_on_two_sides"]))
    parts.append(_leak("equal codes", found["equal_codes_on_two_sides"]))
    for name, absent in found["classes_absent"].items():
        if absent:
            parts.append(f"no {name} clip of {_few(absent)}")
    if found.get("missing"):
        parts.append(f"listed, but not among the clips: {_few(found['missing'])}")
    if found.get("unlisted"):
        parts.append(f"{found['unlisted']} recordings in no list")
    return "; ".join(parts)


def _leak(what: str, found: dict[str, Any]) -> str:
    if not found["count"]:
        return f"no {what} on two sides"
    pairs = ", ".join(
        f"{found[f'{one}-{other}']} in {one} and {other}" for one, other in _PAIRS if found[f"{one}-{other}"]
    )
    return f"{what} on two sides: {pairs}, such as {' and '.join(dict.fromkeys(found['example']))}"


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)}, the first {names[0]}"
