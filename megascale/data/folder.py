"""A token folder as training reads it: many stretches of codes at once, and 80 bytes of memory for each clip.

B clips, T frames, Q codebooks wanted, N all clips of the folder.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megascale import seeding, storage
from megascale.data.cache import LocalShards, Purpose, ShardCache
from megascale.data.index import Manifest, Member, ShardFacts, index_name, read_index, read_manifest
from megascale.data.packed import SPARE_BYTES, select_frames, stretch_bytes, unpack_stretches
from megascale.errors import DataError, TokenError
from megascale.tokens import (
    CODEBOOK_SIZE,
    LONGEST_HEADER,
    check_ecdc_size,
    codebooks_for,
    payload_bytes,
    read_ecdc_header,
)

_SWEEP_AHEAD = 64  # shards
_SWEEP_CLIPS = 64


class TokenFolder:
    """Random access to the clips of a token folder, which are numbered through its shards.

    shard_N, frames_N: each clip's shard and length in frames, int32.
    hash_N: its key's `seeding.hash_int64`.
    share_N: its recording's `seeding.hash_share`, by which clips are held out.
    """

    device = torch.device("cpu")

    def __init__(self, url: str, bitrate_kbps: float, cache: str | None = None, cache_gb: float = 50.0) -> None:
        """Shards of a remote folder are copied to the local folder `cache` when they are needed, see `ShardCache`.

        Raises DataError or TokenError: no manifest, a broken one, a shard of another codec, too few codebooks, an index
        that contradicts itself, or a local shard that is missing or cut."""
        self.url = url
        self.manifest: Manifest = read_manifest(url)
        self.num_codebooks = codebooks_for(bitrate_kbps)
        self._num_stored = self.manifest.codec.num_codebooks
        if self.num_codebooks > self._num_stored:
            raise DataError(
                f"{url}: stored with {self._num_stored} codebooks, "
                f"data.bitrate_kbps={bitrate_kbps} needs {self.num_codebooks}"
            )
        self.shards = self.manifest.shards
        self._read_indexes()
        self._verified = np.zeros(len(self.shards), dtype=bool)
        self.is_local = storage.is_local(url)
        self._store: LocalShards | ShardCache
        if self.is_local:
            self._store = LocalShards(url, self.shards)
        else:
            self._store = ShardCache(url, self.shards, cache, round(cache_gb * 1e9))

    def _read_indexes(self) -> None:
        keys: list[bytes] = []
        columns = [tuple(np.empty(0, kind) for kind in (np.int64, np.int16, np.int32, np.int64, np.float64))]
        for facts in self.shards:
            clips = read_index(self.url, facts, self.manifest.codec.fingerprint).clips
            keys += [member.key.encode() for member in clips]
            columns.append(self._columns(facts, clips))
        # the bytes of a stream before its codes are its header, and are looked at when its shard is first read
        self._code_N, self._header_N, self.frames_N, self.hash_N, self.share_N = map(
            np.concatenate, zip(*columns, strict=True)
        )
        counts = [facts.clips for facts in self.shards]
        self.shard_N = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._keys, self._key_end_N = b"".join(keys), np.cumsum([len(key) for key in keys], dtype=np.int64)

    def _columns(self, facts: ShardFacts, clips: list[Member]) -> tuple[np.ndarray, ...]:
        offset_N, size_N, frames_N = (
            np.array([getattr(member, name) for member in clips], dtype=np.int64)
            for name in ("offset", "size", "frames")
        )
        header_N = size_N - payload_bytes(frames_N * self._num_stored)
        # a tar ends with 1,024 zeros, so there is something after the last stream
        fits_N = (frames_N > 0) & (header_N > 0) & (header_N <= LONGEST_HEADER) & (offset_N >= 0)
        fits_N &= (frames_N < 1 << 31) & (offset_N + size_N + SPARE_BYTES <= facts.size)
        if not fits_N.all():
            wrong = clips[int(fits_N.argmin())]
            raise DataError(
                f"{storage.join(self.url, index_name(facts.name))}: {wrong.key}: {wrong.frames} frames of "
                f"{self._num_stored} codebooks cannot be {wrong.size} bytes at byte {wrong.offset} of {facts.size}"
            )
        hash_N = np.array([seeding.hash_int64(member.key) for member in clips], dtype=np.int64)
        share_N = np.array([seeding.hash_share("held out", member.recording) for member in clips], dtype=np.float64)
        return offset_N + header_N, header_N.astype(np.int16), frames_N.astype(np.int32), hash_N, share_N

    def __len__(self) -> int:
        return len(self.frames_N)

    def key(self, clip: int) -> str:
        """Return a clip's key."""
        start = self._key_end_N[clip - 1] if clip else 0
        return self._keys[start : self._key_end_N[clip]].decode()

    def codes(self, clips_B: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Return codes_BTQ, int16, of frames starts_B .. starts_B + lengths_B (int64) of clips; padding holds 0.

        Raises DataError or TokenError if a shard is not what was committed, or a clip not what its index says."""
        offsets_B, sizes_B = stretch_bytes(self._num_stored, starts_B, lengths_B)
        pieces = self._read(self.shard_N[clips_B], offsets_B + self._code_N[clips_B], sizes_B)
        return unpack_stretches(pieces, self._num_stored, self.num_codebooks, starts_B, lengths_B)

    def _read(self, shards_B: np.ndarray, offsets_B: np.ndarray, sizes_B: np.ndarray) -> Sequence[bytes | memoryview]:
        if self._verified[shards_B].all():
            return self._store.read_many(shards_B.tolist(), offsets_B.tolist(), sizes_B.tolist())
        pieces: list[bytes | memoryview] = [b""] * len(shards_B)
        for shard in dict.fromkeys(shards_B.tolist()):  # one after the other: a cache may have no room for more
            self._verify(shard)
            own = np.flatnonzero(shards_B == shard)
            found = self._store.read_many([shard] * len(own), offsets_B[own].tolist(), sizes_B[own].tolist())
            for place, piece in zip(own, found, strict=True):
                pieces[place] = piece
        return pieces

    def whole(self, clips_B: np.ndarray) -> np.ndarray:
        """Return codes_BTQ, int16, of whole clips; padding holds 0. Raises as `codes`."""
        return self.codes(clips_B, np.zeros(len(clips_B), np.int64), self.frames_N[clips_B].astype(np.int64))

    def take(self, clips_B: np.ndarray, starts_B: Tensor, lengths_B: np.ndarray, kept_BT: Tensor) -> Tensor:
        """Return codes_BTQ, int64, of frames kept_BT (int64, ascending) of the stretch of each clip that `codes` would
        return. Raises as `codes`."""
        return select_frames(self.codes(clips_B, starts_B.numpy(), lengths_B), kept_BT)

    def _verify(self, shard: int) -> None:
        """Look at the headers of a shard's streams, once; the store has checked its hash."""
        if self._verified[shard]:
            return
        clips = range(self._first[shard], self._first[shard + 1])
        own = slice(clips.start, clips.stop)
        starts = (self._code_N[own] - self._header_N[own]).tolist()
        headers = self._store.read_many([shard] * len(clips), starts, [LONGEST_HEADER] * len(clips))
        tar, name, stored = storage.join(self.url, self.shards[shard].name), self.manifest.codec.name, self._num_stored
        good: set[tuple[bytes, int]] = set()  # most clips of a corpus are equally long, and then have the same header
        for clip, data in zip(clips, headers, strict=True):
            size, frames = int(self._header_N[clip]), int(self.frames_N[clip])
            facts = bytes(data[:size]), frames
            if facts in good:
                continue
            where = f"{tar}:{self.key(clip)}.ecdc"
            header, start = read_ecdc_header(bytes(data), where)
            check_ecdc_size(header, start, size + payload_bytes(frames * stored), where)
            if header.model_name != name:
                raise TokenError(f"{where}: written by codec {header.model_name!r}, the manifest says {name!r}")
            if (header.num_frames, header.num_codebooks) != (frames, stored):
                raise TokenError(
                    f"{where}: {header.num_frames} frames of {header.num_codebooks} codebooks; its index and the "
                    f"manifest say {frames} of {stored}"
                )
            good.add(facts)
        self._verified[shard] = True

    def shards_of(self, clips: np.ndarray) -> list[int]:
        """Return the shards of these clips, each once, in the order of the clips."""
        return list(dict.fromkeys(self.shard_N[clips].tolist()))

    def want(self, shards: Iterable[int], purpose: Purpose = "steps") -> None:
        """Say which shards are needed next, in order of need, so that remote ones are fetched ahead."""
        self._store.want(shards, purpose)

    def sweep(self, clips: np.ndarray, size: int = _SWEEP_CLIPS) -> Iterator[np.ndarray]:
        """Yield these clips in parts of `size`, the shards of the next ones being fetched ahead."""
        shards = self.shards_of(clips)
        place = {shard: i for i, shard in enumerate(shards)}
        newest = -1
        try:
            for start in range(0, len(clips), size):
                part = clips[start : start + size]
                places = [place[shard] for shard in self.shards_of(part)]
                if max(places) > newest:
                    newest = max(places)
                    self.want(shards[min(places) : min(places) + _SWEEP_AHEAD], "sweep")
                yield part
        finally:
            self.want([], "sweep")

    def close(self) -> None:
        """End fetching, and remove a temporary cache; a process that ends does so itself."""
        self._store.close()


def split_held_out(folder: TokenFolder, valid_share: float) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Hold out clips by the hash of their recording: all its clips lie on one side, and stay there when the corpus grows.

    Returns:
        Training clips and held-out clips (numbers in the folder), and the training clips' count per shard.
    """
    held_N = folder.share_N < valid_share
    train, valid = np.flatnonzero(~held_N), np.flatnonzero(held_N)
    sizes = np.bincount(folder.shard_N[train], minlength=len(folder.shards))
    return train, valid, tuple(int(n) for n in sizes)


def unigram_counts(folder: TokenFolder, clips: np.ndarray, num_clips: int = 2000, num_shards: int = 32) -> np.ndarray:
    """Count how often each code occurs per codebook, float64 (Q, V), over about `num_clips` clips spread evenly over
    `num_shards` shards that are spread evenly over the folder: a remote one is not fetched whole for this."""
    counts_QV = np.zeros((folder.num_codebooks, CODEBOOK_SIZE))
    shard_of = folder.shard_N[clips]
    shards = np.unique(shard_of)
    chosen = shards[np.linspace(0, len(shards) - 1, min(num_shards, len(shards))).round().astype(int)]
    clips = clips[np.isin(shard_of, chosen)]
    for part in folder.sweep(clips[:: max(1, len(clips) // num_clips)]):
        codes_BTQ, lengths_B = folder.whole(part), folder.frames_N[part]
        valid_BT = np.arange(codes_BTQ.shape[1]) < lengths_B[:, None]
        for q in range(folder.num_codebooks):
            counts_QV[q] += np.bincount(codes_BTQ[..., q][valid_BT], minlength=CODEBOOK_SIZE)
    return counts_QV
