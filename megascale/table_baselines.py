"""What a classifier must beat, on the same recordings and splits as a table's cells: logistic regressions on log-mel
statistics of the audio, and on bags of its codes; and naming the most frequent class.

R recordings, Q codebooks, V codebook size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.data.index import Manifest, StoredClip, read_clips, read_manifest
from megascale.downstream import baselines
from megascale.downstream.cells import LabelledTokens
from megascale.downstream.intervals import summarise
from megascale.downstream.protocols import SPLITS, TaskConfig, classes_of, each_fold, split_clips, taking_part
from megascale.downstream.scores import pool, score
from megascale.errors import DataError
from megascale.log import Progress
from megascale.tokenize import audio
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokens import codebooks_for

LOG_MEL = "log-mel logistic regression"
BAG_OF_CODES = "bag-of-codes logistic regression"
CHANCE = "chance"


@dataclass(frozen=True)
class _Recordings:
    """Recordings of a labelled corpus, by name in order of appearance, with what is known of each.

    labels_R: the class of each. features: by the baseline's name, (R, K).
    """

    names: list[str]
    labels_R: np.ndarray
    features: dict[str, np.ndarray]


def bag_of_codes(kbps: float) -> str:
    """Return the name of the baseline on bags of codes at a bitrate."""
    return f"{BAG_OF_CODES}, {kbps:g} kbps"


def _score_split(
    known: _Recordings, clips: Sequence[StoredClip], task: TaskConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the scores of each baseline on one split."""
    place = {name: i for i, name in enumerate(known.names)}
    splits = split_clips(clips, task, seed)
    rows = {side: np.array(sorted({place[clips[i].recording] for i in splits[side]})) for side in SPLITS}
    # of what is divided alone, as the cells' are; sorted, so that a class's place is its number
    classes = classes_of([clips[i] for members in splits.values() for i in members], task)
    targets = {side: np.searchsorted(classes, known.labels_R[own]) for side, own in rows.items()}
    found = {}
    for name, features in known.features.items():
        features_of = {side: features[own] for side, own in rows.items()}
        found[name] = baselines.logistic_regression(features_of, targets, classes)
    most = np.bincount(targets["train"]).argmax()
    return found | {CHANCE: score(targets["test"], np.full_like(targets["test"], most), classes)}


def check_recordings(row: LabelledTokens) -> None:
    """Look for the audio of every clip that the baselines will read. Raises DataError, StorageError: it is gone."""
    manifest = read_manifest(row.url)
    url_of = recording_urls(manifest)
    for clip in taking_part(read_clips(row.url, manifest, 1), row.task):
        _url_of(clip, url_of)


def score_baselines(row: LabelledTokens, seeds: Sequence[int], bitrates_kbps: Sequence[float]) -> dict[str, Any]:
    """Score every baseline; splits are drawn from the seeds, and folds pooled, as the cells' are.

    Returns:
        By name: mean accuracy and macro-F1 over seeds, the accuracy's 95% interval, the count of tested recordings, the
        result of each seed; `bitrate_kbps`, where a baseline is one bitrate's.

    Raises:
        DataError: a recording is not there any more, or cannot be read.
    """
    manifest = read_manifest(row.url)
    num_codebooks = codebooks_for(max(bitrates_kbps))
    clips = taking_part(read_clips(row.url, manifest, num_codebooks), row.task)
    known = _recordings(row, manifest, clips, bitrates_kbps)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*known.features, CHANCE)}
    for seed in seeds:
        parts = [_score_split(known, clips, task, seed) for task in each_fold(row.task)]
        for name, results in found.items():
            results.append(parts[0][name] if len(parts) == 1 else pool([part[name] for part in parts]))
    summary = {
        name: summarise(results)
        | {"seeds": [{"seed": seed, **result} for seed, result in zip(seeds, results, strict=True)]}
        for name, results in found.items()
    }
    for kbps in bitrates_kbps:
        summary[bag_of_codes(kbps)]["bitrate_kbps"] = kbps
    return summary


def _recordings(
    row: LabelledTokens, manifest: Manifest, clips: Sequence[StoredClip], bitrates_kbps: Sequence[float]
) -> _Recordings:
    url_of = recording_urls(manifest)
    windows: dict[str, list[StoredClip]] = {}
    for clip in clips:
        windows.setdefault(clip.recording, []).append(clip)
    features: dict[str, list[np.ndarray]] = {}
    progress = Progress(f"baselines, {row.name}", len(windows), unit="recordings")
    for done, of_one in enumerate(windows.values(), start=1):
        heard = baselines.log_mel_statistics(read_audio(url_of, clip) for clip in of_one)
        features.setdefault(LOG_MEL, []).append(heard)
        for kbps in bitrates_kbps:
            bag = baselines.bag_of_codes([clip.codes_QT[: codebooks_for(kbps)] for clip in of_one])
            features.setdefault(bag_of_codes(kbps), []).append(bag)
        progress.update(done)
    progress.close()
    labels_R = np.array([str(of_one[0].labels[row.task.label]) for of_one in windows.values()])
    return _Recordings(list(windows), labels_R, {name: np.stack(rows) for name, rows in features.items()})


def recording_urls(manifest: Manifest) -> dict[str, str]:
    """Return where the recordings lie that a token folder was made of, by the name that its clips know them by."""
    recordings, _ = list_recordings(SourceConfig.model_validate(manifest.source))
    return {recording.source: recording.url for recording in recordings}


def read_audio(url_of: dict[str, str], clip: StoredClip) -> np.ndarray:
    """Read what was tokenised and no more: the rest of its recording may be what could not be read."""
    return audio.read_clip(_url_of(clip, url_of), clip.start_seconds, clip.duration_seconds)


def _url_of(clip: StoredClip, url_of: dict[str, str]) -> str:
    if clip.source not in url_of:
        raise DataError(f"{clip.source}: was tokenised, and is no longer among the recordings")
    return url_of[clip.source]
