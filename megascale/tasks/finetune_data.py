"""What fine-tuning reads: labelled clips, their classes and split, and batches of them.

B batch, T frames, Q codebooks, N clips, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from megascale import seeding
from megascale.data.index import Manifest, StoredClip, read_clips, read_manifest
from megascale.data.loader import Batch, Row, collate
from megascale.data.transforms import draw_drop_share, draw_kept_frames, draw_starts, removed_frames
from megascale.downstream.protocols import Splits, classes_of, split_clips, taking_part, targets_of
from megascale.downstream.split_check import check_split
from megascale.errors import DataError, TokenError
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for


@dataclass(frozen=True)
class LabelledClips:
    """A labelled corpus, divided. `split_check`: as `split_check.check_split` returns it."""

    manifest: Manifest
    clips: list[StoredClip]
    classes: list[str]
    splits: Splits
    split_check: dict[str, Any]


def open_manifest(config: FinetuneConfig) -> Manifest:
    """Read the tokens' manifest, and look at that of the test split's folder, if it has its own.

    Raises:
        DataError: there is none, or a folder holds fewer codebooks than asked for.
        TokenError: the two folders were made by different codecs.
    """
    manifest = _manifest_at(config.data.url, config)
    if config.data.test_url is not None:
        theirs, ours = _manifest_at(config.data.test_url, config).codec.fingerprint, manifest.codec.fingerprint
        if theirs != ours:
            raise TokenError(
                f"data.test_url={config.data.test_url}: holds tokens of codec {theirs[:8]}; {config.data.url} holds "
                f"codec {ours[:8]}. Tokenise it with codec.weights= the other's codec"
            )
    return manifest


def _manifest_at(url: str, config: FinetuneConfig) -> Manifest:
    manifest = read_manifest(url)
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    if num_codebooks > manifest.codec.num_codebooks:
        raise DataError(
            f"{url}: stored with {manifest.codec.num_codebooks} codebooks, "
            f"data.bitrate_kbps={config.data.bitrate_kbps} needs {num_codebooks}"
        )
    return manifest


def open_clips(config: FinetuneConfig) -> LabelledClips:
    """Read the labelled clips and divide them. Raises DataError, TokenError or StorageError on what cannot be used."""
    manifest = open_manifest(config)
    return _divide(config, manifest, _read_labelled(config, manifest))


def check_clips(configs: Sequence[FinetuneConfig]) -> None:
    """Read clips once and divide them as each of these configs would, which differ in seed or fold alone.

    Raises:
        DataError, TokenError, StorageError: as `open_clips`.
    """
    manifest = open_manifest(configs[0])
    clips = _read_labelled(configs[0], manifest)
    for config in configs:
        _divide(config, manifest, clips)


def _read_labelled(config: FinetuneConfig, manifest: Manifest) -> list[StoredClip]:
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    clips, test_url = list(read_clips(config.data.url, manifest, num_codebooks)), config.data.test_url
    if test_url is not None:
        clips = [clip for clip in clips if clip.split != "test"]
        clips += [replace(clip, split="test") for clip in read_clips(test_url, read_manifest(test_url), num_codebooks)]
    return taking_part(clips, config.task)


def _divide(config: FinetuneConfig, manifest: Manifest, clips: list[StoredClip]) -> LabelledClips:
    num_apart = 0 if config.data.test_url is None else sum(clip.split == "test" for clip in clips)
    splits = split_clips(clips, config.task, config.seed, num_apart)
    # a class of no split is not there to be learned
    classes = classes_of([clips[i] for members in splits.values() for i in members], config.task)
    return LabelledClips(manifest, clips, classes, splits, check_split(clips, splits, config.task))


class Batches:
    """Batches for training and scoring. Crops and drops are functions of (seed, epoch, clip)."""

    def __init__(self, config: FinetuneConfig, data: LabelledClips) -> None:
        self._config, self._clips = config, data.clips
        self._train = np.array(data.splits["train"])
        self.targets = targets_of(data.clips, data.classes, config.task)
        self._hashes = np.array([seeding.hash_int64(clip.key) for clip in data.clips])
        self.size = min(config.train.batch, len(self._train))
        self.per_epoch = len(self._train) // self.size

    def train(self) -> Iterator[list[Batch]]:
        """Yield the batches of all epochs, with `targets_B`, int64, or (`task.kind=multi`) `targets_BC`, float32."""
        name = "targets_B" if self.targets.ndim == 1 else "targets_BC"
        crop_frames = round((self._config.train.crop_seconds or 1e9) * FRAMES_PER_SECOND)
        for epoch in range(self._config.train.epochs):
            order = seeding.generator(self._config.seed, "finetune order", epoch).permutation(len(self._train))
            for i in range(self.per_epoch):
                chosen = self._train[order[i * self.size : (i + 1) * self.size]]
                rng = seeding.generator(self._config.seed, "finetune batch", epoch, i)
                share = draw_drop_share(self._config.drop, rng) if self._config.arm == "ft_aug" else 0.0
                rows = self._rows(chosen, crop_frames, share, epoch)
                yield [collate(rows) | {name: torch.from_numpy(self.targets[chosen])}]

    def whole(self, members: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Yield (clips, batch) of whole clips, those of like length together, so that little is padding."""
        order = sorted(members, key=lambda i: (self._clips[i].codes_QT.shape[1], i))
        size = self._config.train.eval_batch
        for i in range(0, len(order), size):
            chosen = order[i : i + size]
            codes = [self._clips[c].codes_QT.T for c in chosen]
            yield chosen, collate([(codes_TQ, np.arange(len(codes_TQ))) for codes_TQ in codes])

    def _rows(self, chosen: np.ndarray, crop_frames: int, drop_share: float, epoch: int) -> list[Row]:
        crop_seed_B, drop_seed_B = (
            seeding.clip_seeds(torch.from_numpy(self._hashes[chosen]), self._config.seed, f"finetune {purpose}", epoch)
            for purpose in ("crop", "drop")
        )
        whole_B = np.array([self._clips[clip].codes_QT.shape[1] for clip in chosen])
        crop_B = np.minimum(whole_B, crop_frames)
        removed_B = removed_frames(crop_B, drop_share)
        starts_B = draw_starts(crop_seed_B, whole_B, crop_B).numpy()
        kept_BT = draw_kept_frames(drop_seed_B, crop_B, removed_B).numpy()
        rows = []
        for clip, start, kept_T, left in zip(chosen, starts_B, kept_BT, crop_B - removed_B, strict=True):
            codes_TQ = self._clips[clip].codes_QT.T[start + kept_T[:left]]
            rows.append((codes_TQ, np.arange(left) if self._config.drop.close_gap else kept_T[:left]))
        return rows
