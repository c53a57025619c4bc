"""Masked-token pretraining: its loss, its metrics, its validation. B batch, T frames, Q codebooks, V codebook size."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from megascale import storage
from megascale.data.folder import TokenFolder, unigram_counts
from megascale.data.loader import Batch, DataConfig, validation_batches
from megascale.data.transforms import MaskConfig
from megascale.log import rank
from megascale.model.mega_audioformer import MaskedTokenOutput
from megascale.tokens import CODEBOOK_SIZE
from megascale.train.engine import Engine, on_first_rank
from megascale.train.metrics import Sums


def masked_loss(output: MaskedTokenOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, the mean over codebooks, and what `Signals` makes metrics of; its sums are those of `Work`."""
    clips, frames, _ = batch["codes_BTQ"].shape
    device = output.loss_Q.device

    def number(value: int) -> Tensor:
        return torch.full((), float(value), device=device)

    report = {
        "loss_Q": output.loss_Q,
        "correct_Q": output.correct_Q,
        "count_Q": output.count_Q,
        "micro_batches": number(1),
        "clips": number(clips),
        "audio_frames": batch["valid_BT"].sum() if "valid_BT" in batch else number(clips * frames),
        "frames": number(clips * frames),
        "frame_pairs": number(clips * frames**2),
        "local_frames": batch["masked_BTQ"].any(dim=-1).sum(),
        "masked_tokens": output.count_Q.sum(),
    }
    return output.loss_Q.mean(), report


class Validator:
    """Loss and accuracy on held-out clips, beside a baseline that knows only how often each code occurs."""

    def __init__(
        self,
        engine: Engine,
        folder: TokenFolder,
        data: DataConfig,
        mask: MaskConfig,
        train: np.ndarray,
        valid: np.ndarray,
        micro_batch: int,
        seed: int,
    ) -> None:
        """`train` and `valid` are numbers of the folder's clips: what the baseline counts, and what is held out."""
        self._engine, self._folder, self._data, self._mask = engine, folder, data, mask
        self._clips, self._micro_batch, self._seed = valid, micro_batch, seed
        counts_QV = on_first_rank(lambda: unigram_counts(folder, train))  # else every rank would read them all
        self._mode_Q = torch.from_numpy(counts_QV.argmax(axis=1))
        # add-one smoothing: a code that training clips never use must cost much, not infinitely much
        smoothed_QV = (counts_QV + 1) / (counts_QV.sum(axis=1, keepdims=True) + CODEBOOK_SIZE)
        self._unigram_nats_QV = torch.from_numpy(-np.log(smoothed_QV))
        # what the baseline loses on training codes, which is beside the training loss what valid/unigram_loss is beside
        # the held-out one
        self.unigram_loss_Q = torch.from_numpy((counts_QV * -np.log(smoothed_QV)).sum(axis=1) / counts_QV.sum(axis=1))
        self._kept: list[tuple[Batch, bool]] = []  # they are few and the same each time, and a store is far
        self.newest: dict[str, float] = {}

    def __call__(self, steps: int) -> dict[str, float]:
        """Validate; every rank must call it, takes its share of the clips, and returns the same."""
        if not len(self._clips):
            return {}
        self._kept = self._kept or list(self._batches())
        sums = Sums()
        for batch, counts in self._kept:
            output = self._engine.evaluate(batch)
            clips = len(batch["codes_BTQ"])
            values = {"loss": output.loss_Q * clips, "acc": output.correct_Q, "count": output.count_Q}
            values |= {name: value.to(self._engine.device) for name, value in self._unigram(batch).items()}
            sums.add({name: value * counts for name, value in values.items()})
        total = sums.take()
        means = {"loss": total["loss"] / len(self._clips), "acc": total["acc"] / total["count"]}
        means |= {name: total[name] / total["count"] for name in ("unigram_loss", "unigram_acc")}
        self.newest = {f"valid/{name}": float(value.mean()) for name, value in means.items()}
        for name, value in means.items():
            self.newest |= {f"valid/{name}_q{q}": float(v) for q, v in enumerate(value)}
        return self.newest

    def _batches(self) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's batches, and whether each counts: under ZeRO-3 every rank has to take part in every forward
        pass, so a rank that has one batch less repeats the first of all."""
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        starts = range(0, len(self._clips), self._micro_batch)
        parts = [self._clips[start : start + self._micro_batch] for start in starts[rank::ranks]]
        num_own = len(parts)
        if num_own * ranks < len(starts):
            parts.append(self._clips[: self._micro_batch])
        batches = validation_batches(
            self._folder, self._data, self._mask, np.concatenate(parts), self._micro_batch, self._seed
        )
        for number, batch in enumerate(batches):
            yield batch, number < num_own

    def _unigram(self, batch: Batch) -> dict[str, Tensor]:
        codes, masked = batch["codes_BTQ"], batch["masked_BTQ"]
        nats = torch.stack([self._unigram_nats_QV[q][codes[..., q]] for q in range(codes.shape[-1])], dim=-1)
        return {
            "unigram_loss": (nats * masked).sum(dim=(0, 1)),
            "unigram_acc": ((codes == self._mode_Q) & masked).sum(dim=(0, 1)),
        }


class DivergenceReport:
    """Writes down what was in the batch when a loss or gradient was not finite: clip keys and losses (`.json`), and the
    batch itself (`.safetensors`), for each rank."""

    def __init__(self, keys: Callable[[int], list[str]], folder: Path) -> None:
        """`keys`: step (from 0) -> keys of this rank's clips."""
        self._keys, self._folder = keys, folder

    def __call__(self, step: int, micro_batches: list[Batch], losses: list[float]) -> str:
        """Return the path of the JSON file."""
        keys, parts = iter(self._keys(step)), []
        tensors: dict[str, Tensor] = {}
        for number, (batch, loss) in enumerate(zip(micro_batches, losses, strict=True)):
            clips = list(islice(keys, len(batch["codes_BTQ"])))
            parts.append({"loss": loss if math.isfinite(loss) else str(loss), "clips": clips})
            tensors |= {f"{number}.{name}": value.contiguous() for name, value in batch.items()}
        path = self._folder / f"step-{step + 1:08d}-rank-{rank():05d}.json"
        storage.publish_bytes(str(path.with_suffix(".safetensors")), safetensors.torch.save(tensors))
        storage.publish_bytes(str(path), json.dumps({"step": step + 1, "micro_batches": parts}, indent=1).encode())
        return str(path)
