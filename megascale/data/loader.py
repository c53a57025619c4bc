"""Token folders to batches: reads clips by offset, crops, drops a chunk, masks; all clips of a batch at once.

Every batch is a function of (config, step) alone, so there is no state to save but the step. B batch, T frames, Q
codebooks.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megascale import seeding
from megascale.config import Section
from megascale.data import transforms
from megascale.data.folder import TokenFolder
from megascale.data.order import Order
from megascale.data.resident import ResidentTokens
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.log import say
from megascale.tokens import FRAMES_PER_SECOND

_STEPS_AHEAD = 1024  # a stream's next shards are among those of its next window
_STEPS_AT_ONCE = 16  # looked at before each step, so that no step takes long for it

X = TypeVar("X")
Batch = dict[str, Tensor]
Row = tuple[np.ndarray, np.ndarray]  # codes_TQ, positions_T
Source = TokenFolder | ResidentTokens


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
    resident: Literal["cpu", "gpu"] | None = Field(
        None,
        description="each rank holds the training clips' codes in memory, int16 on a CPU and packed on its GPU, and makes "
        "the same batches there; null: shards are read as they are needed",
    )

    @property
    def crop_frames(self) -> int:
        return max(1, round(self.clip_seconds * FRAMES_PER_SECOND))


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
        resident: ResidentTokens | None = None,
    ) -> None:
        """`resident`: the training clips, where they are held in memory; batches are made on its device."""
        self._folder, self._mask, self._drop, self._order, self._clips = folder, mask, drop, order, train_clips
        self._source: Source = folder if resident is None else resident
        self._crop_frames, self._micro_batch = config.crop_frames, micro_batch
        share = order.global_batch // world_size
        self._mine = slice(rank * share, (rank + 1) * share)
        self._last_need: dict[int, int] = {}  # shard -> last step known to need it; in order of first need
        self._cache_gb, self._warned = config.cache_gb, False
        self._step, self._seen = 0, 0  # the step made last, and the first one not looked at yet

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this rank's share of global batch `step`, cut into micro-batches."""
        self._look_ahead(step)
        epoch, places = self._order.batch(step)
        drop_share = transforms.draw_drop_share(self._drop, seeding.generator(self._order.seed, "drop share", step))
        clips = self._clips[places[self._mine]]
        starts = range(0, len(clips), self._micro_batch)
        return [
            make_batch(
                self._folder,
                self._source,
                clips[i : i + self._micro_batch],
                self._crop_frames,
                self._mask,
                (self._order.seed, epoch),
                drop_share,
                self._drop.close_gap,
            )
            for i in starts
        ]

    def keys(self, step: int) -> list[str]:
        """Return the keys of the clips in `micro_batches(step)`, in their order."""
        _, places = self._order.batch(step)
        return [self._folder.key(clip) for clip in self._clips[places[self._mine]]]

    def _look_ahead(self, step: int) -> None:
        """Tell a remote folder which shards this rank's next steps need, also those of the next epoch."""
        if self._folder.is_local or self._source is not self._folder:
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


def make_batch(
    folder: TokenFolder,
    source: Source,
    clips_B: np.ndarray,
    crop_frames: int,
    mask: MaskConfig,
    seed: tuple[int, int | str],
    drop_share: float = 0.0,
    close_gap: bool = False,
) -> Batch:
    """Make a batch of these clips: cropped, with a share of frames dropped, masked.

    Args:
        folder: knows the clips' lengths and hashes.
        source: has their codes; the batch is made on its device, and a GPU is not waited for.
        clips_B: numbers in the folder.
        crop_frames: longer clips are cropped.
        mask: what is hidden.
        seed: the run's seed, and the epoch or another name; with the clip's key it fixes all draws.
        drop_share: of each clip's frames.
        close_gap: number the frames that are left from 0 on.

    Returns:
        `codes_BTQ` and `positions_BT` int64, `masked_BTQ` bool, and, only if the lengths differ, `valid_BT` bool (padding
        holds code 0, is never valid and never masked).
    """
    hash_B = transforms.on_device(folder.hash_N[clips_B], source.device)
    crop_seed_B, drop_seed_B, mask_seed_B = (
        seeding.clip_seeds(hash_B, seed[0], purpose, seed[1]) for purpose in ("crop", "drop", "mask")
    )
    whole_B = folder.frames_N[clips_B].astype(np.int64)
    crop_B = np.minimum(whole_B, crop_frames)
    removed_B = transforms.removed_frames(crop_B, drop_share)
    kept_BT = transforms.draw_kept_frames(drop_seed_B, crop_B, removed_B)
    codes_BTQ = source.take(clips_B, transforms.draw_starts(crop_seed_B, whole_B, crop_B), crop_B, kept_BT)
    valid_BT = transforms.valid_frames(crop_B - removed_B, source.device)
    if close_gap:
        kept_BT = torch.arange(kept_BT.shape[1], device=source.device).repeat(len(clips_B), 1)
    batch = {
        "codes_BTQ": codes_BTQ,
        "positions_BT": kept_BT,
        "masked_BTQ": transforms.draw_masks(mask_seed_B, crop_B - removed_B, folder.num_codebooks, mask),
    }
    if valid_BT is not None:
        batch |= {
            "codes_BTQ": codes_BTQ * valid_BT[..., None],
            "positions_BT": kept_BT * valid_BT,
            "valid_BT": valid_BT,
        }
    if source.device.type == "cpu" and torch.cuda.is_available():
        batch = {name: value.pin_memory() for name, value in batch.items()}  # so that moving it holds nothing up
    return batch


def validation_batches(
    folder: TokenFolder, config: DataConfig, mask: MaskConfig, clips: np.ndarray, micro_batch: int, seed: int
) -> Iterator[Batch]:
    """Yield the held-out clips with masks that are the same at every validation, and nothing dropped."""
    for part in folder.sweep(clips, micro_batch):
        yield make_batch(folder, folder, part, config.crop_frames, mask, (seed, "valid"))


def collate(rows: Sequence[Row]) -> Batch:
    """Stack clips into a batch.

    Returns:
        `codes_BTQ` and `positions_BT` int64, and, only if the lengths differ, `valid_BT` bool (padding holds code 0 and is
        never valid).
    """
    frames_B = np.array([len(codes_TQ) for codes_TQ, _ in rows])
    longest, num_codebooks = int(frames_B.max()), rows[0][0].shape[1]
    codes_BTQ = torch.zeros(len(rows), longest, num_codebooks, dtype=torch.int64)
    positions_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, (codes_TQ, positions_T) in enumerate(rows):
        codes_BTQ[i, : frames_B[i]] = torch.from_numpy(codes_TQ.astype(np.int64))
        positions_BT[i, : frames_B[i]] = torch.from_numpy(positions_T)
    batch = {"codes_BTQ": codes_BTQ, "positions_BT": positions_BT}
    valid_BT = transforms.valid_frames(frames_B, codes_BTQ.device)
    return batch if valid_BT is None else batch | {"valid_BT": valid_BT}


def prefetch(make: Callable[[int], X], start: int, stop: int, depth: int = 2) -> Iterator[X]:
    """Yield make(start) .. make(stop - 1), each made in a thread while earlier ones are used.

    An error in `make` is raised here, at the step it belongs to.
    """
    ready: queue.Queue[tuple[X | None, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()
    # a thread begins on the first GPU, and pinning memory from there would take some of it on every rank's account
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def put(item: tuple[X | None, BaseException | None]) -> None:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)
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
