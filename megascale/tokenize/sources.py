"""Where recordings come from: folders and globs, lists, AudioSet, GTZAN, NSynth, GTZAN music/speech.

Every source becomes a sorted list of `Recording`s, whose names are paths relative to the source's root, so that the same
corpus gives the same shards wherever it lies.
"""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field, model_validator

from megascale import storage
from megascale.config import Section, has_credentials
from megascale.errors import DataError
from megascale.tokenize.clips import Recording
from megascale.tokenize.streams import is_stream

SourceKind = Literal["files", "list", "audioset", "gtzan", "nsynth", "music_speech"]
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff", ".au", ".opus")
CONTAINER_SUFFIXES = (".m4a", ".mp4", ".m4b", ".mov", ".aac", ".webm", ".mka", ".mkv", ".wma")  # of megascale[av]
GTZAN_FOLDERS = ("genres", "Data/genres_original", "genres_original")


class SourceConfig(Section):
    """Which audio to tokenise."""

    kind: SourceKind = Field(description="layout of the corpus")
    url: str = Field(description="files: folder, prefix or glob; list, audioset: the CSV or Parquet; others: the root")
    audio_url: str | None = Field(None, description="audioset: folder of <YTID>.<ext> files, cut to their segment")
    ontology_url: str | None = Field(None, description="audioset: class_labels_indices.csv, for display names")
    label_from_folder: bool = Field(False, description="files: label each clip with its parent folder, as `class`")

    @model_validator(mode="after")
    def _audioset_needs_audio(self) -> "SourceConfig":
        if self.kind == "audioset" and self.audio_url is None:
            raise ValueError("source.audio_url is required for source.kind=audioset")
        return self


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


def _is_audio(name: str) -> bool:
    path = PurePosixPath(name)
    known = path.suffix.lower() in AUDIO_SUFFIXES + CONTAINER_SUFFIXES or is_stream(name)
    return known and not path.name.startswith(".")


def _files(config: SourceConfig) -> list[Recording]:
    root, names = storage.list_files(config.url)
    # a file at the root has the root's own folder as its parent, which a path such as `.` does not name
    top = PurePosixPath(os.path.abspath(storage.local_path(root)) if storage.is_local(root) else root)
    return [
        Recording(
            storage.join(root, name), name, {"class": (top / name).parent.name} if config.label_from_folder else {}
        )
        for name in names
        if _is_audio(name)
    ]


def _rows(url: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where each row of a CSV or Parquet table stands, for error messages, and its cells by column."""
    if url.endswith(".parquet"):
        for number, values in enumerate(_parquet_rows(url), start=1):
            yield f"{url}: row {number}", {k: "" if v is None else str(v) for k, v in values.items()}
        return
    # newline=None reads the line ends of every system alike
    reader = csv.DictReader(io.StringIO(storage.read_text(url), newline=None), skipinitialspace=True)
    try:
        for row in reader:
            yield f"{url}: line {reader.line_num}", {k: v or "" for k, v in row.items() if k}
    except csv.Error as failure:
        raise DataError(f"{url}: line {reader.line_num}: {failure}") from None


def _parquet_rows(url: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{url}: reading Parquet needs the extra megascale[parquet]") from None
    try:
        return pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(url))).to_pylist()
    except (OSError, ValueError) as failure:
        raise DataError(f"{url}: not a Parquet file: {failure}") from None


def _list(url: str) -> list[Recording]:
    """A table with a column `url` (or path relative to the table), and optionally start, duration, split; any other
    column is a label."""
    parent = url.rpartition("/")[0] or "."
    recordings = []
    for where, row in _rows(url):
        name = row.pop("url", "")
        if not name:
            raise DataError(f"{where}: no value in column 'url'")
        if has_credentials(name):
            raise DataError(f"{where}: a URL with credentials in it, which would stand in every output")
        split, start, duration = (row.pop(column, "") or None for column in ("split", "start", "duration"))
        start_seconds = _seconds(where, start or "0")
        duration_seconds = None if duration is None else _seconds(where, duration)
        if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
            raise DataError(f"{where}: start must not be negative, and duration must be above 0")
        if is_stream(name) and (start_seconds or duration_seconds):
            raise DataError(f"{where}: {name}: an .ecdc stream is taken whole; leave its start and duration empty")
        full = name if "://" in name or name.startswith("/") else storage.join(parent, name)
        recordings.append(Recording(full, name, row, split, start_seconds, duration_seconds))
    repeated = [key for key, n in Counter((r.source, r.start_seconds) for r in recordings).items() if n > 1]
    if repeated:
        raise DataError(f"{url}: {repeated[0][0]} at {repeated[0][1]} s is listed more than once")
    return recordings


def _seconds(where: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise DataError(f"{where}: start and duration are numbers of seconds")
    return seconds


def _audioset(config: SourceConfig) -> tuple[list[Recording], dict[str, int]]:
    """AudioSet's segment CSV: three `#` lines, then `YTID, start, end, "/m/a,/m/b"`."""
    assert config.audio_url is not None, "the config's validator asks for it"
    root, files = storage.list_files(config.audio_url)
    names = _ontology(config.ontology_url) if config.ontology_url else None
    segments = _segments(config.url)
    by_id = _files_by_id([name for name in files if _is_audio(name)], {youtube_id for youtube_id, _ in segments})
    recordings = []
    for youtube_id, tags in segments:
        if youtube_id not in by_id:
            continue
        labels = {"tags": tags}
        if names is not None:
            unknown = [tag for tag in tags if tag not in names]
            if unknown:
                raise DataError(f"{config.ontology_url}: no display name for {unknown[0]}, a tag of {youtube_id}")
            labels["names"] = [names[tag] for tag in tags]
        source = by_id[youtube_id]
        recordings.append(Recording(storage.join(root, source), source, labels))
    return recordings, {"listed, but not in audio_url": len(segments) - len(recordings)}


def _segments(url: str) -> list[tuple[str, list[str]]]:
    """Read each listed id and its tags."""
    lines = (line for line in storage.read_text(url).splitlines() if line.strip() and not line.startswith("#"))
    segments = []
    try:
        for row in csv.reader(lines, skipinitialspace=True):
            if len(row) != 4:
                raise DataError(f"{url}: {','.join(row)[:60]!r}: expected YTID, start, end, labels")
            segments.append((row[0], row[3].split(",")))
    except csv.Error as failure:
        raise DataError(f"{url}: after {len(segments)} segments: {failure}") from None
    return segments


def _files_by_id(files: list[str], listed: set[str]) -> dict[str, str]:
    """Find the file of each listed id. Copies name files <ID>, Y<ID> or <ID>_<start>; an id has 11 characters, may hold
    '_' and '-' and begin with Y itself, so that only the list can tell what a name means."""
    by_id = {}
    for name in files:
        stem = PurePosixPath(name).stem
        for candidate in (stem[:11], stem[1:12] if stem.startswith("Y") else ""):
            if candidate in listed:
                by_id[candidate] = name
    return by_id


def _ontology(url: str) -> dict[str, str]:
    rows = [row for _, row in _rows(url)]
    if not rows or not {"mid", "display_name"} <= set(rows[0]):
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
            recordings.append(Recording(storage.join(root, name), f"{path.parent.name}/{path.name}", {"class": label}))
    return recordings
