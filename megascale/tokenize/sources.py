"""Where clips come from: folders and globs, clip lists, AudioSet, GTZAN, NSynth, GTZAN music/speech.

Every source becomes a sorted list of `Recording`s, and the cut policy makes `Clip`s of them. Names and keys are built
from paths relative to the source's root, so the same corpus gives the same shards wherever it lies.
"""

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, model_validator

from megascale import storage
from megascale.config import Section
from megascale.errors import DataError

SourceKind = Literal["files", "list", "audioset", "gtzan", "nsynth", "music_speech"]
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".opus")
GTZAN_FOLDERS = ("genres", "Data/genres_original", "genres_original")


class SourceConfig(Section):
    """Which audio to tokenise."""

    kind: SourceKind = Field(description="layout of the corpus")
    url: str = Field(description="files: folder, prefix or glob; list, audioset: the CSV or Parquet; others: the root")
    audio_url: str | None = Field(None, description="audioset: folder of <YTID>.<ext> files, cut to their segment")
    ontology_url: str | None = Field(None, description="audioset: class_labels_indices.csv, for display names")
    label_from_folder: bool = Field(False, description="files: label each clip with its parent folder's name, as `class`")

    @model_validator(mode="after")
    def _audioset_needs_audio(self) -> "SourceConfig":
        if self.kind == "audioset" and self.audio_url is None:
            raise ValueError("source.audio_url is required for source.kind=audioset")
        return self


class ClipsConfig(Section):
    """How recordings are cut. Codes depend on where audio is cut, so this is recorded in the manifest."""

    seconds: float | None = Field(10.0, gt=0, description="length of a clip; null keeps each recording whole")
    min_seconds: float = Field(1.0, ge=0, description="a shorter rest at a recording's end is left out")


@dataclass(frozen=True)
class Recording:
    """One audio file, or a stretch of one, as the corpus lists it."""

    url: str
    source: str  # path relative to the corpus root
    labels: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None  # None: to the end


@dataclass(frozen=True)
class Clip:
    """One piece of audio that becomes one training sample."""

    key: str
    url: str
    source: str
    recording: str  # clips cut from one recording share it, so that windows can be averaged
    start_seconds: float
    duration_seconds: float | None
    labels: Mapping[str, Any]
    split: str | None


def list_recordings(config: SourceConfig) -> tuple[list[Recording], dict[str, int]]:
    """List a corpus.

    Returns:
        Recordings sorted by (source, start), and counts worth telling, such as clips of a list that are missing.

    Raises:
        StorageError: nothing at the URL.
        DataError: the folder is not laid out as its kind says, or holds no audio.
    """
    notes: dict[str, int] = {}
    if config.kind == "files":
        recordings = _files(config)
    elif config.kind == "list":
        recordings = _list(config.url)
    elif config.kind == "audioset":
        recordings, notes = _audioset(config)
    elif config.kind == "gtzan":
        recordings = _gtzan(config.url)
    elif config.kind == "nsynth":
        recordings = _nsynth(config.url)
    else:
        recordings = _music_speech(config.url)
    if not recordings:
        raise DataError(f"{config.url}: no audio found (source.kind={config.kind})")
    return sorted(recordings, key=lambda r: (r.source, r.start_seconds)), notes


def cut(recording: Recording, total_seconds: float | None, config: ClipsConfig) -> list[Clip]:
    """Cut a recording to clips.

    Args:
        recording: what to cut.
        total_seconds: the file's length; needed when clips have a length and the recording has none.
        config: the cut policy.

    Returns:
        At least one clip. A recording shorter than `min_seconds` is kept whole: only a rest is left out.
    """
    duration = recording.duration_seconds
    if config.seconds is None:
        return [_clip(recording, recording.start_seconds, duration)]
    if duration is None:
        assert total_seconds is not None, "cutting needs the file's length"
        duration = total_seconds - recording.start_seconds
    count = max(1, math.floor(duration / config.seconds + 1e-9))
    rest = duration - count * config.seconds
    lengths = [min(config.seconds, duration)] * count + ([rest] if rest >= max(config.min_seconds, 1e-3) else [])
    return [_clip(recording, recording.start_seconds + i * config.seconds, n) for i, n in enumerate(lengths)]


def _clip(recording: Recording, start: float, duration: float | None) -> Clip:
    whole = _key(recording.source, recording.start_seconds)
    key = whole if start == recording.start_seconds else _key(recording.source, start)
    labels, split = recording.labels, recording.split
    return Clip(key, recording.url, recording.source, whole, round(start, 6), duration, labels, split)


def _key(source: str, start_seconds: float) -> str:
    # WebDataset splits a member's name at the first dot and at slashes; the hash keeps look-alikes apart
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(source).stem)[:60]
    digest = hashlib.sha256(f"{source}\n{start_seconds:.6f}".encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem}-{digest[:12]}"


def _is_audio(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


def _files(config: SourceConfig) -> list[Recording]:
    root, names = storage.list_files(config.url)
    audio = [name for name in names if _is_audio(name)]
    return [
        Recording(
            storage.join(root, name),
            name,
            labels={"class": PurePosixPath(name).parent.name} if config.label_from_folder else {},
        )
        for name in audio
    ]


def _rows(url: str) -> list[dict[str, str]]:
    if url.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{url}: reading Parquet needs the extra megascale[parquet]") from None
        try:
            table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(url)))
        except (OSError, ValueError) as failure:
            raise DataError(f"{url}: not a Parquet file: {failure}") from None
        return [{k: "" if v is None else str(v) for k, v in row.items()} for row in table.to_pylist()]
    return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(io.StringIO(storage.read_text(url)))]


def _list(url: str) -> list[Recording]:
    """A table with a column `url` (or path relative to the table), and optionally start, duration, split; any other
    column is a label."""
    parent = url.rpartition("/")[0] or "."
    recordings = []
    for number, row in enumerate(_rows(url), start=2):
        name = row.pop("url", "")
        if not name:
            raise DataError(f"{url}: line {number}: no value in column 'url'")
        start, duration, split = row.pop("start", ""), row.pop("duration", ""), row.pop("split", "")
        try:
            start_seconds, duration_seconds = float(start or 0), float(duration) if duration else None
        except ValueError:
            raise DataError(f"{url}: line {number}: start and duration are numbers of seconds") from None
        if start_seconds < 0 or (duration_seconds is not None and not duration_seconds > 0):
            raise DataError(f"{url}: line {number}: start must not be negative, and duration must be above 0")
        full = name if "://" in name or name.startswith("/") else storage.join(parent, name)
        recordings.append(Recording(full, name, row, split or None, start_seconds, duration_seconds))
    repeated = [key for key, n in Counter((r.source, r.start_seconds) for r in recordings).items() if n > 1]
    if repeated:
        raise DataError(f"{url}: {repeated[0][0]} at {repeated[0][1]} s is listed more than once")
    return recordings


def _audioset(config: SourceConfig) -> tuple[list[Recording], dict[str, int]]:
    """AudioSet's segment CSV: three `#` lines, then `YTID, start, end, "/m/a,/m/b"`."""
    assert config.audio_url is not None, "the config's validator asks for it"
    root, files = storage.list_files(config.audio_url)
    by_id = {_youtube_id(name): name for name in files if _is_audio(name)}
    names = _ontology(config.ontology_url) if config.ontology_url else {}
    text = storage.read_text(config.url)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    recordings, missing = [], 0
    for row in csv.reader(lines, skipinitialspace=True):
        if len(row) != 4:
            raise DataError(f"{config.url}: {','.join(row)[:60]!r}: expected YTID, start, end, labels")
        source = by_id.get(row[0])
        if source is None:
            missing += 1
            continue
        tags = row[3].split(",")
        labels = {"tags": tags, "names": [names[tag] for tag in tags]} if names else {"tags": tags}
        recordings.append(Recording(storage.join(root, source), source, labels))
    return recordings, {"listed, but not in audio_url": missing}


def _youtube_id(name: str) -> str:
    # copies name files <ID>, Y<ID> or <ID>_<start>; an id has 11 characters and may itself hold '_' and '-'
    stem = PurePosixPath(name).stem
    return stem[1:12] if len(stem) >= 12 and stem[0] == "Y" and stem[11:12] != "_" else stem[:11]


def _ontology(url: str) -> dict[str, str]:
    rows = _rows(url)
    if rows and not {"mid", "display_name"} <= set(rows[0]):
        raise DataError(f"{url}: expected columns index, mid, display_name")
    return {row["mid"]: row["display_name"] for row in rows}


def _gtzan(url: str) -> list[Recording]:
    """GTZAN: `genres/<genre>/<genre>.000NN.wav`, also `Data/genres_original/`, or the genre folders themselves."""
    root, names = storage.list_files(url)
    prefix = next((f"{folder}/" for folder in GTZAN_FOLDERS if any(n.startswith(f"{folder}/") for n in names)), "")
    recordings = []
    for name in names:
        inner = PurePosixPath(name.removeprefix(prefix))
        if name.startswith(prefix) and _is_audio(name) and len(inner.parts) == 2:
            recordings.append(Recording(storage.join(root, name), inner.as_posix(), {"genre": inner.parts[0]}))
    return recordings


def _nsynth(url: str) -> list[Recording]:
    """NSynth: `nsynth-{train,valid,test}/examples.json` and `audio/<note_str>.wav`."""
    recordings = []
    for split in ("train", "valid", "test"):
        folder = f"nsynth-{split}"
        index = storage.join(url, folder, "examples.json")
        if not storage.exists(index):
            continue
        try:
            examples = json.loads(storage.read_text(index))
            for note, facts in examples.items():
                labels = {k: facts[k] for k in ("instrument_family_str", "instrument_source_str", "instrument_str")}
                labels |= {"pitch": facts["pitch"], "velocity": facts["velocity"]}
                source = f"{folder}/audio/{note}.wav"
                recordings.append(Recording(storage.join(url, source), source, labels, split))
        except (ValueError, AttributeError, KeyError, TypeError) as failure:
            raise DataError(f"{index}: not NSynth's examples.json: {failure!r}") from None
    if not recordings:
        raise DataError(f"{url}: no nsynth-train, nsynth-valid or nsynth-test with an examples.json")
    return recordings


def _music_speech(url: str) -> list[Recording]:
    """GTZAN music/speech: `music_speech/{music_wav,speech_wav}/*.wav`, or those two folders themselves."""
    root, names = storage.list_files(url)
    recordings = []
    for name in names:
        path = PurePosixPath(name)
        if path.parent.name in ("music_wav", "speech_wav") and _is_audio(name):
            label = path.parent.name.removesuffix("_wav")
            recordings.append(
                Recording(storage.join(root, name), f"{path.parent.name}/{path.name}", {"class": label})
            )
    return recordings


def count_labels(recordings: Iterable[Recording], label: str) -> Counter[str]:
    """Count the values of one label; used for plans and messages."""
    return Counter(str(r.labels[label]) for r in recordings if label in r.labels)
