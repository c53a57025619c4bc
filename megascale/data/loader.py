"""Token folders to batches: reads clips by offset, crops, drops a chunk, masks.

Every batch is a function of (config, step) alone, so there is no state to save but the step. B batch, T frames, Q
codebooks.
"""

import hashlib
import mmap
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megascale import seeding, storage
from megascale.config import Section
from megascale.data.index import Manifest, ShardFacts, read_codes, read_index, read_manifest
from megascale.data.order import Order
from megascale.data.transforms import DropConfig, MaskConfig, draw_crop, draw_drop_share, draw_kept_frames, draw_mask
from megascale.errors import DataError
from megascale.tokens import CODEBOOK_SIZE, FRAMES_PER_SECOND, codebooks_for

# a mapping holds a file descriptor, and a process may have no more than 1024 of them, or 256
_MAX_MAPPED = 128

X = TypeVar("X")
Batch = dict[str, Tensor]
Row = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes_TQ, positions_T, masked_TQ


class DataConfig(Section):
    """Which tokens, and how clips are drawn from them."""

    url: str = Field(description="token folder, as launch/tokenize_audio.py made it")
    bitrate_kbps: float = Field(1.5, description="read so many kbps of what is stored: 1.5 is Q=2, 12 is Q=16")
    clip_seconds: float = Field(10.0, gt=0, description="random crop of longer clips; shorter ones are padded")
    valid_share: float = Field(
        0.02, ge=0, lt=1, description="share of clips held out for validation, by hash of recording"
    )
    streams: int | None = Field(
        None, ge=1, description="ranges read side by side; null: largest divisor of batch <= 64"
    )
    cache: str | None = Field(None, description="local folder for shards of a remote token folder; null: temporary")


class TokenFolder:
    """Random access to the clips of a token folder."""

    def __init__(self, url: str, bitrate_kbps: float, cache: str | None = None) -> None:
        """Raises DataError or TokenError: no manifest, a broken one, a shard of another codec, too few codebooks, or a
        local shard that is missing or cut."""
        self.url = url
        self.manifest: Manifest = read_manifest(url)
        self.num_codebooks = codebooks_for(bitrate_kbps)
        if self.num_codebooks > self.manifest.codec.num_codebooks:
            raise DataError(
                f"{url}: stored with {self.manifest.codec.num_codebooks} codebooks, "
                f"data.bitrate_kbps={bitrate_kbps} needs {self.num_codebooks}"
            )
        indexes = [read_index(url, facts, self.manifest.codec.fingerprint) for facts in self.manifest.shards]
        self.shards = self.manifest.shards
        if storage.is_local(url):
            for facts in self.shards:
                _check_size(_local_shard(url, facts, cache), facts)
        self.members = [(n, member) for n, index in enumerate(indexes) for member in index.clips]
        self._cache = cache
        self._checked: set[int] = set()
        self._shard = lru_cache(maxsize=_MAX_MAPPED)(self._map_shard)

    def codes(self, clip: int) -> np.ndarray:
        """Return codes_QT of one clip, int16. Raises DataError or TokenError if its shard is not what was committed."""
        shard, member = self.members[clip]
        data = self._shard(shard)
        stream = data[member.offset : member.offset + member.size]
        where = f"{storage.join(self.url, self.shards[shard].name)}:{member.key}.ecdc"
        return read_codes(stream, where, self.manifest.codec, self.num_codebooks)

    def _map_shard(self, number: int) -> mmap.mmap:
        facts = self.shards[number]
        path = _local_shard(self.url, facts, self._cache)
        _check_size(path, facts)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if number not in self._checked:
            if hashlib.sha256(data).hexdigest() != facts.sha256:
                raise DataError(f"{path}: its sha256 is not the one in the manifest; the shard was changed or damaged")
            self._checked.add(number)
        return data


def _check_size(path: Path, facts: ShardFacts) -> None:
    if not path.is_file() or path.stat().st_size != facts.size:
        raise DataError(f"{path}: missing, or not the size that the manifest says")


def _local_shard(url: str, facts: ShardFacts, cache: str | None) -> Path:
    if storage.is_local(url):
        return storage.local_path(url) / facts.name
    folder = cache or os.path.join(tempfile.gettempdir(), f"megascale-{os.getuid()}")
    path = Path(folder) / f"{facts.sha256}.tar"
    if not path.exists():
        storage.publish_bytes(str(path), storage.read_bytes(storage.join(url, facts.name)))
    return path


class PretrainBatches:
    """Masked batches of one rank. `micro_batches(step)` depends on nothing but its argument and the config."""

    def __init__(
        self,
        folder: TokenFolder,
        config: DataConfig,
        mask: MaskConfig,
        drop: DropConfig,
        order: Order,
        train_clips: np.ndarray,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._folder, self._mask, self._drop, self._order, self._clips = folder, mask, drop, order, train_clips
        self._crop_frames = max(1, round(config.clip_seconds * FRAMES_PER_SECOND))
        self._micro_batch = micro_batch
        share = order.global_batch // world_size
        self._mine = slice(rank * share, (rank + 1) * share)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's share of global batch `step`, cut into micro-batches."""
        epoch, places = self._order.batch(step)
        drop_share = draw_drop_share(self._drop, seeding.generator(self._order.seed, "drop share", step))
        clips = self._clips[places[self._mine]]
        starts = range(0, len(clips), self._micro_batch)
        return [self._micro(epoch, clips[i : i + self._micro_batch], drop_share) for i in starts]

    def keys(self, step: int) -> list[str]:
        """Return the keys of the clips in `micro_batches(step)`, in their order."""
        _, places = self._order.batch(step)
        return [self._folder.members[clip][1].key for clip in self._clips[places[self._mine]]]

    def _micro(self, epoch: int, clips: np.ndarray, drop_share: float) -> Batch:
        rows: list[Row] = []
        for clip in clips:
            key = self._folder.members[clip][1].key
            rng = seeding.generator(self._order.seed, "clip", epoch, key)
            codes_TQ = self._folder.codes(int(clip)).T
            codes_TQ = codes_TQ[draw_crop(len(codes_TQ), self._crop_frames, rng)]
            kept_T = draw_kept_frames(len(codes_TQ), drop_share, rng)
            positions_T = np.arange(len(kept_T)) if self._drop.close_gap else kept_T
            rows.append((codes_TQ[kept_T], positions_T, draw_mask(len(kept_T), codes_TQ.shape[1], self._mask, rng)))
        return collate(rows)


def validation_batches(
    folder: TokenFolder, config: DataConfig, mask: MaskConfig, clips: np.ndarray, micro_batch: int, seed: int
) -> Iterator[Batch]:
    """Yield the held-out clips with masks that are the same at every validation, and nothing dropped."""
    crop_frames = max(1, round(config.clip_seconds * FRAMES_PER_SECOND))
    rows: list[Row] = []
    for clip in clips:
        rng = seeding.generator(seed, "valid", folder.members[clip][1].key)
        codes_TQ = folder.codes(int(clip)).T
        codes_TQ = codes_TQ[draw_crop(len(codes_TQ), crop_frames, rng)]
        rows.append((codes_TQ, np.arange(len(codes_TQ)), draw_mask(len(codes_TQ), codes_TQ.shape[1], mask, rng)))
        if len(rows) == micro_batch:
            yield collate(rows)
            rows = []
    if rows:
        yield collate(rows)


def collate(rows: Sequence[Row]) -> Batch:
    """Stack clips into a batch.

    Returns:
        `codes_BTQ` and `positions_BT` int64, `masked_BTQ` bool where given, and, only if the lengths differ, `valid_BT`
        bool (padding holds code 0, is never valid and never masked).
    """
    frames = [len(codes_TQ) for codes_TQ, _, _ in rows]
    longest, num_codebooks = max(frames), rows[0][0].shape[1]
    codes_BTQ = torch.zeros(len(rows), longest, num_codebooks, dtype=torch.int64)
    positions_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    masked_BTQ = torch.zeros(len(rows), longest, num_codebooks, dtype=torch.bool)
    for i, (codes_TQ, positions_T, masked_TQ) in enumerate(rows):
        codes_BTQ[i, : frames[i]] = torch.from_numpy(codes_TQ.astype(np.int64))
        positions_BT[i, : frames[i]] = torch.from_numpy(positions_T)
        if masked_TQ is not None:
            masked_BTQ[i, : frames[i]] = torch.from_numpy(masked_TQ)
    batch = {"codes_BTQ": codes_BTQ, "positions_BT": positions_BT}
    if rows[0][2] is not None:
        batch["masked_BTQ"] = masked_BTQ
    if min(frames) < longest:
        batch["valid_BT"] = torch.arange(longest) < torch.tensor(frames)[:, None]
    return batch


def split_held_out(folder: TokenFolder, valid_share: float) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Hold out clips by the hash of their recording: all its clips lie on one side, and stay there when the corpus grows.

    Returns:
        Training clips and held-out clips (numbers in the folder), and the training clips' count per shard.
    """
    shares = [seeding.hash_share("held out", member.recording) for _, member in folder.members]
    held = np.array(shares) < valid_share
    shard_of = np.array([shard for shard, _ in folder.members], int)
    train, valid = np.flatnonzero(~held), np.flatnonzero(held)
    sizes = np.bincount(shard_of[train], minlength=len(folder.shards))
    return train, valid, tuple(int(n) for n in sizes)


def unigram_counts(folder: TokenFolder, clips: np.ndarray, limit: int = 2000) -> np.ndarray:
    """Count how often each code occurs per codebook, float64 (Q, V), over about `limit` clips spread evenly."""
    counts_QV = np.zeros((folder.num_codebooks, CODEBOOK_SIZE))
    for clip in clips[:: max(1, len(clips) // limit)]:
        for q, codes_T in enumerate(folder.codes(int(clip))):
            counts_QV[q] += np.bincount(codes_T, minlength=CODEBOOK_SIZE)
    return counts_QV


def prefetch(make: Callable[[int], X], start: int, stop: int, depth: int = 2) -> Iterator[X]:
    """Yield make(start) .. make(stop - 1), each made in a thread while earlier ones are used.

    An error in `make` is raised here, at the step it belongs to.
    """
    ready: queue.Queue[tuple[X | None, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[X | None, BaseException | None]) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        for step in range(start, stop):
            if closed.is_set():
                return
            try:
                put((make(step), None))
            except BaseException as failure:
                put((None, failure))
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, failure = ready.get()
            if failure is not None:
                raise failure
            assert item is not None, "make returns something"
            yield item
    finally:
        closed.set()
        thread.join()
