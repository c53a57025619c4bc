"""What predictions are asked for: `.ecdc` streams, token folders and single shards, raw audio, and folders, prefixes and
globs of these, on any URL. No audio is decoded here; what turns audio to codes is handed in.

Q codebooks, T frames.
"""

import glob
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from pydantic import ValidationError

from megascale import storage
from megascale.config import has_credentials
from megascale.data.index import MANIFEST, CodecFacts, ShardIndex, broken, index_name, read_manifest, shard_members
from megascale.errors import ConfigError, DataError, MegascaleError, Stopped, TokenError
from megascale.tokens import (
    FRAMES_PER_SECOND,
    LONGEST_HEADER,
    SAMPLE_RATE_HZ,
    payload_bytes,
    read_ecdc,
    read_ecdc_header,
)

Tokenise = Callable[[str], tuple[np.ndarray, int]]  # a recording's URL to codes_QT, and its samples at 24 kHz

_MOST_CODEBOOKS = 32
_AHEAD = 8  # files that are being read, or wait for those before them


@dataclass(frozen=True)
class Source:
    """One file that holds clips. `num_clips` is right where a manifest tells it, and 1 for a shard not read yet."""

    url: str
    kind: Literal["stream", "shard", "audio"]
    num_clips: int = 1
    sha256: str | None = None  # of a shard, where a manifest tells it


@dataclass(frozen=True)
class Clip:
    """One clip: the file it is from, its key there if that is a shard, codes_QT int16, and its length."""

    source: str
    key: str | None
    codes_QT: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Failure:
    """What stands in a clip's place, or in a file's, if it cannot be read."""

    source: str
    key: str | None
    error: MegascaleError


class Inputs:
    """Finds and reads what one model can answer for. `num_clips` is how many clips are known of so far."""

    def __init__(
        self,
        codec: CodecFacts,
        num_codebooks: int,
        tokenise: Tokenise,
        audio_suffixes: tuple[str, ...],
        most_seconds: float,
    ) -> None:
        """
        Args:
            codec: what wrote the codes that the model was trained on; others are refused.
            num_codebooks: how many of them the model reads; RVQ is nested, so more may be stored.
            tokenise: makes such codes of a recording.
            audio_suffixes: by which a recording is known in a folder, lower case, with the dot.
            most_seconds: a longer stream is refused before its codes are unpacked.
        """
        self._codec, self._num_codebooks, self._most_seconds = codec, num_codebooks, most_seconds
        self._tokenise, self._audio_suffixes = tokenise, audio_suffixes
        self.num_clips = 0

    def find(self, url: str) -> list[Source | Failure]:
        """Return the files that an argument stands for; a Failure, alone, if that cannot be told."""
        try:
            if has_credentials(url):
                scheme = url.partition("://")[0]
                url = f"{scheme}://…"  # the line that answers must not repeat it
                raise ConfigError(f"{url}: a URL with credentials in it; leave them to the store's own chain")
            found: list[Source | Failure] = list(self._find(url))
        except Stopped:
            raise
        except MegascaleError as failure:
            found = [Failure(url, None, failure)]
        self.num_clips += sum(item.num_clips if isinstance(item, Source) else 1 for item in found)
        return found

    def _find(self, url: str) -> list[Source]:
        pattern = glob.has_magic(url) and not storage.exists(url)  # a file may have brackets in its name
        if not pattern:
            kind = self._kind_of(url)
            if kind is not None:
                return [Source(url, kind)]
            if storage.exists(storage.join(url, MANIFEST)):
                return self._token_folder(url)
            if storage.is_local(url) and storage.local_path(url).is_file():
                return [Source(url, "audio")]  # its bytes tell whether it is
        root, names = storage.list_files(url)
        kinds = [(name, self._kind_of(name)) for name in names if not name.rpartition("/")[2].startswith(".")]
        found = [Source(storage.join(root, name), kind) for name, kind in kinds if kind is not None]
        if not found:
            raise DataError(f"{url}: no .ecdc, .tar or audio file among {len(names)} files")
        return found

    def _kind_of(self, name: str) -> Literal["stream", "shard", "audio"] | None:
        name = name.lower()
        if name.endswith(".ecdc"):
            return "stream"
        if name.endswith(".tar"):
            return "shard"
        return "audio" if name.endswith(self._audio_suffixes) else None

    def _token_folder(self, url: str) -> list[Source]:
        manifest = read_manifest(url)
        if not manifest.num_clips:
            raise DataError(f"{url}: a token folder without a clip")
        self._check_codec(url, manifest.codec.fingerprint)
        if manifest.codec.num_codebooks < self._num_codebooks:
            stored = manifest.codec.num_codebooks
            raise DataError(f"{url}: stored with {stored} codebooks, the model reads {self._num_codebooks}")
        return [
            Source(storage.join(url, facts.name), "shard", facts.clips, facts.sha256)
            for facts in manifest.shards
            if facts.clips
        ]

    def _check_codec(self, where: str, fingerprint: str) -> None:
        if fingerprint != self._codec.fingerprint:
            raise TokenError(
                f"{where}: made by codec {fingerprint[:8]}, the model was trained on tokens of codec "
                f"{self._codec.fingerprint[:8]}"
            )

    def read(self, items: Sequence[Source | Failure]) -> Iterator[Clip | Failure]:
        """Yield the clips of these files in order; some files are read ahead, audio is tokenised when its turn comes."""
        with ThreadPoolExecutor(_AHEAD) as pool:
            ahead: deque[tuple[Source | Failure, Future[list[tuple[str | None, bytes]]] | None]] = deque()
            for n in range(len(items) + _AHEAD):
                if n < len(items):
                    item = items[n]
                    coded = item if isinstance(item, Source) and item.kind != "audio" else None
                    ahead.append((item, pool.submit(self._read_streams, coded) if coded else None))
                if n >= _AHEAD:
                    yield from self._clips(*ahead.popleft())

    def _clips(
        self, item: Source | Failure, read: Future[list[tuple[str | None, bytes]]] | None
    ) -> Iterator[Clip | Failure]:
        if isinstance(item, Failure):
            yield item
        elif read is None:
            yield self._attempt(item.url, None, partial(self._from_audio, item.url))
        else:
            try:
                streams = read.result()
            except Stopped:
                raise
            except MegascaleError as failure:
                self.num_clips -= item.num_clips - 1
                yield Failure(item.url, None, failure)
                return
            self.num_clips += len(streams) - item.num_clips
            for key, data in streams:
                yield self._attempt(item.url, key, partial(self._from_stream, item.url, key, data))

    def _attempt(self, source: str, key: str | None, make: Callable[[], Clip]) -> Clip | Failure:
        try:
            return make()
        except Stopped:
            raise
        except MegascaleError as failure:
            return Failure(source, key, failure)

    def _read_streams(self, source: Source) -> list[tuple[str | None, bytes]]:
        """Return a file's `.ecdc` streams, in order, each with its key where the file is a shard."""
        if source.kind == "stream":
            longest = payload_bytes(int(self._most_seconds * FRAMES_PER_SECOND + 1) * _MOST_CODEBOOKS)
            return [(None, storage.read_start(source.url, LONGEST_HEADER + longest + 1))]
        sha256 = source.sha256 or self._indexed_sha256(source.url)
        data = b"".join(storage.read_blocks(source.url))
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise DataError(f"{source.url}: its sha256 is not the one that was committed; changed or damaged")
        members = shard_members(data, source.url)
        streams = [(name.removesuffix(".ecdc"), data) for name, data in members.items() if name.endswith(".ecdc")]
        if not streams:
            raise DataError(f"{source.url}: holds no .ecdc")
        return list(streams)

    def _indexed_sha256(self, url: str) -> str | None:
        """Return the sha256 that a shard's index, if there is one beside it, says; and check the codec it says."""
        where = index_name(url)
        if not storage.exists(where):
            return None
        try:
            index = ShardIndex.model_validate_json(storage.read_bytes(where))
        except ValidationError as failure:
            raise broken(where, failure) from None
        self._check_codec(where, index.codec)
        return index.sha256

    def _from_stream(self, url: str, key: str | None, data: bytes) -> Clip:
        where = url if key is None else f"{url}:{key}.ecdc"
        header, _ = read_ecdc_header(data, where)
        if header.model_name != self._codec.name:
            raise TokenError(
                f"{where}: codes of {header.model_name}, the model was trained on codes of {self._codec.name}"
            )
        seconds = header.audio_samples / SAMPLE_RATE_HZ
        if seconds > self._most_seconds:
            raise TokenError(f"{where}: {seconds:.0f} s, --max-seconds={self._most_seconds:g}")
        _, codes_QT = read_ecdc(data, where, self._num_codebooks)
        return Clip(url, key, codes_QT, seconds)

    def _from_audio(self, url: str) -> Clip:
        codes_QT, audio_samples = self._tokenise(url)
        return Clip(url, None, codes_QT, audio_samples / SAMPLE_RATE_HZ)
