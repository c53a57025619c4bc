"""A token folder: `manifest.json`, and for each shard `tokens-000123.tar` with its index `tokens-000123.json`.

The index commits its shard; the manifest, written last, commits the folder. Readers trust only what the manifest names.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from megascale import storage, tokens
from megascale.config import Section
from megascale.errors import DataError, TokenError

MANIFEST = "manifest.json"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# a file's name may be no UTF-8 (Python then gives it lone surrogates), and JSON cannot hold it as it is
Told = Annotated[str, AfterValidator(_encodable)]


class Member(Section):
    """Where one clip's `.ecdc` lies in its shard: its bytes start at `offset`."""

    key: str = Field(description="clip key, unique in the folder")
    recording: str = Field(description="clips cut from one recording share it")
    offset: int = Field(description="byte offset of the stream in the tar")
    size: int = Field(description="bytes")
    frames: int = Field(description="frames, 75 a second")


class Quarantined(Section):
    """A clip that could not be tokenised."""

    key: str = Field(description="clip key")
    url: Told = Field(description="the recording")
    reason: Told = Field(description="what is wrong with it")
    attempts: int = Field(description="how often it was tried")


class ShardIndex(Section):
    """Contents of one shard; the existence of this file says that the shard is whole."""

    shard: str = Field(description="file name of the tar")
    sha256: str = Field(description="of the tar")
    size: int = Field(description="bytes of the tar")
    codec: str = Field(description="codec fingerprint")
    clips: list[Member] = Field(description="in the order of the tar")
    quarantined: list[Quarantined] = Field(description="clips planned for this shard that it does not hold")


class CodecFacts(Section):
    """What made the codes."""

    name: str = Field(description="`m` of the streams")
    fingerprint: str = Field(description="sha256 over settings and weights")
    origin: str = Field(description="published file, or how it was calibrated")
    num_codebooks: int = Field(description="codebooks stored; fewer can be read")


class ShardFacts(Section):
    """One line of the manifest."""

    name: str = Field(description="file name of the tar")
    clips: int = Field(description="clips it holds")
    sha256: str = Field(description="of the tar")
    size: int = Field(description="bytes of the tar")


class Manifest(Section):
    """The whole folder."""

    version: Literal[1] = Field(1, description="of this format")
    codec: CodecFacts = Field(description="what made the codes")
    source: dict[str, Any] = Field(description="the job's source section")
    cut: dict[str, Any] = Field(description="the job's clips section; codes depend on where audio is cut")
    environment: dict[str, Any] = Field(description="versions, device and batch size; deep codes may depend on them")
    shards: list[ShardFacts] = Field(description="in order")
    num_clips: int = Field(description="clips in all shards")
    num_quarantined: int = Field(description="clips left out")
    seconds: float = Field(description="audio in all shards")

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over the codec's fingerprint and every shard's hash: the same wherever the folder lies."""
        parts = [self.codec.fingerprint, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class StoredClip:
    """One clip as read back for downstream work: codes_QT int16, and what its `.json` member says."""

    key: str
    codes_QT: np.ndarray
    recording: str
    source: str
    labels: dict[str, Any]
    split: str | None
    start_seconds: float = 0.0
    duration_seconds: float | None = None  # None: to the recording's end


def read_manifest(url: str) -> Manifest:
    """Read a token folder's manifest.

    Raises:
        DataError: no manifest (the folder is missing, or its job has not finished), or a broken one.
    """
    where = storage.join(url, MANIFEST)
    if not storage.exists(where):
        raise DataError(f"{url}: no {MANIFEST}; not a token folder, or its tokenization has not finished")
    try:
        return Manifest.model_validate_json(storage.read_bytes(where))
    except ValidationError as failure:
        raise broken(where, failure) from None


def read_index(url: str, facts: ShardFacts, fingerprint: str) -> ShardIndex:
    """Read one shard's index and check it against the manifest.

    Raises:
        TokenError: the shard was made by another codec.
        DataError: broken, or not the shard that the manifest names.
    """
    where = storage.join(url, index_name(facts.name))
    try:
        index = ShardIndex.model_validate_json(storage.read_bytes(where))
    except ValidationError as failure:
        raise broken(where, failure) from None
    if index.codec != fingerprint:
        raise TokenError(f"{where}: made by codec {index.codec[:8]}, the manifest says {fingerprint[:8]}")
    if (index.sha256, len(index.clips)) != (facts.sha256, facts.clips):
        raise DataError(f"{where}: not the shard that {MANIFEST} names (its hash or count differs)")
    return index


def broken(where: str, failure: ValidationError) -> DataError:
    """Return the error that names a broken file and what is wrong with it."""
    first = failure.errors()[0]
    if first["loc"] == ("version",):
        return DataError(f"{where}: version {first['input']} of the format; this package reads version 1")
    key = ".".join(map(str, first["loc"]))
    return DataError(f"{where}: broken: {key + ': ' if key else ''}{first['msg']}")


def index_name(shard: str) -> str:
    """Return the index's file name for a shard's."""
    return shard.removesuffix(".tar") + ".json"


def read_clips(url: str, manifest: Manifest, num_codebooks: int) -> Iterator[StoredClip]:
    """Read every clip of a token folder in order, members streamed from the tar and nothing unpickled.

    Raises:
        DataError: a shard's bytes are not what the manifest says.
        TokenError: a clip is broken, was written by another codec, or has too few codebooks.
    """
    for facts in manifest.shards:
        where = storage.join(url, facts.name)
        data = storage.read_bytes(where)
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise DataError(f"{where}: its sha256 is not the one in {MANIFEST}")
        content = shard_members(data, where)
        for name in [n for n in content if n.endswith(".ecdc")]:
            key = name.removesuffix(".ecdc")
            codes_QT = read_codes(content[name], f"{where}:{name}", manifest.codec, num_codebooks)
            meta = json.loads(content[f"{key}.json"])
            stretch = meta["start_seconds"], meta["duration_seconds"]
            facts_of_clip = meta["recording"], meta["source"], meta["labels"], meta["split"]
            yield StoredClip(key, codes_QT, *facts_of_clip, *stretch)


def shard_members(data: bytes, where: str) -> dict[str, bytes]:
    """Return what the members of a tar hold, by name, in their order. Raises DataError: not a tar, or a cut one."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return {m.name: data[m.offset_data : m.offset_data + m.size] for m in tar if m.isfile()}
    except (tarfile.TarError, ValueError, EOFError) as failure:  # a hostile header's numbers may be none
        raise DataError(f"{where}: not a tar, or a cut one: {failure}") from None


def read_codes(stream: bytes, where: str, codec: CodecFacts, num_codebooks: int) -> np.ndarray:
    """Read codes_QT of one stream and check that this codec wrote it. Raises TokenError naming `where`."""
    header, codes_QT = tokens.read_ecdc(stream, where, num_codebooks)
    if header.model_name != codec.name:
        raise TokenError(f"{where}: written by codec {header.model_name!r}, the manifest says {codec.name!r}")
    return codes_QT
