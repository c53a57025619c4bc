"""Token folders to batches: reads clips by offset, crops, drops a chunk, masks.

Every batch is a function of (config, step) alone, so there is no state to save but the step. B batch, T frames, Q
codebooks.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megascale import seeding, storage
from megascale.config import Section
from megascale.data.cache import LocalShards, Purpose, ShardCache
from megascale.data.index import Manifest, read_codes, read_index, read_manifest
from megascale.data.order import Order
from megascale.data.transforms import DropConfig, MaskConfig, draw_crop, draw_drop_share, draw_kept_frames, draw_mask
from megascale.errors import DataError
from megascale.log import say
from megascale.tokens import CODEBOOK_SIZE, FRAMES_PER_SECOND, codebooks_for

_STEPS_AHEAD = 1024  # a stream's next shards are among those of its next window
_STEPS_AT_ONCE = 16  # looked at before each step, so that no step takes long for it
_SWEEP_AHEAD = 64  # shards

X = TypeVar("X")
Batch = dict[str, Tensor]
Row = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes_TQ, positions_T, masked_TQ


class DataConfig(Section):
    """Which tokens, and how clips are drawn from them."""

    url: str = Field(description="token folder, as launch/tokenize_audio.py made it")
    bitrate_kbps: float = Field(1.5, description="read so many kbps of what is stored: 1.5 is Q=2, 12 is Q=16")
    clip_seconds: float = Field(10.0, ge=0.02, description="random crop of longer clips; shorter ones are padded")
    valid_share: float = Field(
        0.02, ge=0, lt=1, description="share of clips held out for validation, by hash of recording"
    )
    streams: int | None = Field(
        None, ge=1, description="ranges read side by side; null: largest divisor of batch <= 64"
    )
    cache: str | None = Field(
        None, description="local folder for shards of a remote token folder; null: a temporary one, emptied at the end"
    )
    cache_gb: float = Field(50.0, gt=0, description="shards of a remote token folder take no more disk, for each rank")


class TokenFolder:
    """Random access to the clips of a token folder."""

    def __init__(self, url: str, bitrate_kbps: float, cache: str | None = None, cache_gb: float = 50.0) -> None:
        """Shards of a remote folder are copied to the local folder `cache` when they are needed, see `ShardCache`.

        Raises DataError or TokenError: no manifest, a broken one, a shard of another codec, too few codebooks, or a
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
        self.members = [(n, member) for n, index in enumerate(indexes) for member in index.clips]
        self.is_local = storage.is_local(url)
        self._store: LocalShards | ShardCache
        if self.is_local:
            self._store = LocalShards(url, self.shards)
        else:
            self._store = ShardCache(url, self.shards, cache, round(cache_gb * 1e9))

    def codes(self, clip: int) -> np.ndarray:
        """Return codes_QT of one clip, int16. Raises DataError or TokenError if its shard is not what was committed."""
        shard, member = self.members[clip]
        stream = self._store.read(shard, member.offset, member.size)
        where = f"{storage.join(self.url, self.shards[shard].name)}:{member.key}.ecdc"
        return read_codes(stream, where, self.manifest.codec, self.num_codebooks)

    def shards_of(self, clips: Iterable[int]) -> list[int]:
        """Return the shards of these clips, each once, in the order of the clips."""
        return list(dict.fromkeys(self.members[clip][0] for clip in clips))

    def want(self, shards: Iterable[int], purpose: Purpose = "steps") -> None:
        """Say which shards are needed next, in order of need, so that remote ones are fetched ahead."""
        self._store.want(shards, purpose)

    def sweep(self, clips: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each of these clips with its codes_QT, int16."""
        shards = self.shards_of(clips)
        place = {shard: i for i, shard in enumerate(shards)}
        first = -1
        try:
            for clip in map(int, clips):
                if place[self.members[clip][0]] > first:
                    first += 1
                    self.want(shards[first : first + _SWEEP_AHEAD], "sweep")
                yield clip, self.codes(clip)
        finally:
            self.want([], "sweep")

    def close(self) -> None:
        """End fetching, and remove a temporary cache; a process that ends does so itself."""
        self._store.close()


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
        self._last_need: dict[int, int] = {}  # shard -> last step known to need it; in order of first need
        self._cache_gb, self._warned = config.cache_gb, False
        self._step, self._seen = 0, 0  # the step made last, and the first one not looked at yet

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's share of global batch `step`, cut into micro-batches."""
        self._look_ahead(step)
        epoch, places = self._order.batch(step)
        drop_share = draw_drop_share(self._drop, seeding.generator(self._order.seed, "drop share", step))
        clips = self._clips[places[self._mine]]
        starts = range(0, len(clips), self._micro_batch)
        return [self._micro(epoch, clips[i : i + self._micro_batch], drop_share) for i in starts]

    def keys(self, step: int) -> list[str]:
        """Return the keys of the clips in `micro_batches(step)`, in their order."""
        _, places = self._order.batch(step)
        return [self._folder.members[clip][1].key for clip in self._clips[places[self._mine]]]

    def _look_ahead(self, step: int) -> None:
        """Tell a remote folder which shards this rank's next steps need, also those of the next epoch."""
        if self._folder.is_local:
            return
        if not self._step <= step <= self._seen:
            self._last_need, self._seen = {}, step
        until = min(self._seen + _STEPS_AT_ONCE, step + _STEPS_AHEAD)
        for later in range(self._seen, until):
            shards = self._folder.shards_of(self._clips[self._order.batch(later)[1][self._mine]])
            self._last_need |= dict.fromkeys(shards, later)
            self._warn_if_too_small(sum(self._folder.shards[shard].size for shard in shards))
        self._step, self._seen = step, max(self._seen, until)
        self._last_need = {shard: last for shard, last in self._last_need.items() if last >= step}
        self._folder.want(self._last_need)

    def _warn_if_too_small(self, bytes_of_a_step: int) -> None:
        if bytes_of_a_step > self._cache_gb * 1e9 and not self._warned:
            self._warned = True
            say(
                f"data.cache_gb={self._cache_gb:g}: one batch of a rank lies in shards of {bytes_of_a_step / 1e9:.3g} GB, "
                "so shards are fetched again and again; allow more, or fewer data.streams"
            )

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
    for clip, codes_QT in folder.sweep(clips):
        rng = seeding.generator(seed, "valid", folder.members[clip][1].key)
        codes_TQ = codes_QT.T
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


def unigram_counts(folder: TokenFolder, clips: np.ndarray, num_clips: int = 2000, num_shards: int = 32) -> np.ndarray:
    """Count how often each code occurs per codebook, float64 (Q, V), over about `num_clips` clips spread evenly over
    `num_shards` shards that are spread evenly over the folder: a remote one is not fetched whole for this."""
    counts_QV = np.zeros((folder.num_codebooks, CODEBOOK_SIZE))
    shard_of = np.array([folder.members[clip][0] for clip in clips], int)
    shards = np.unique(shard_of)
    chosen = shards[np.linspace(0, len(shards) - 1, min(num_shards, len(shards))).round().astype(int)]
    clips = clips[np.isin(shard_of, chosen)]
    for _, codes_QT in folder.sweep(clips[:: max(1, len(clips) // num_clips)]):
        for q, codes_T in enumerate(codes_QT):
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
