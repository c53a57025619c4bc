"""Saving a run's checkpoints and finding the one to go on from, by the contract of `checkpoint.py`."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.engine import Engine, barrier, convert, on_first_rank
from megascale.train.manifest import CheckpointManifest, prune
from megascale.train.uploads import Uploads

_CONVERTED = ".universal"


class Saver:
    """Saves checkpoints: everything, a barrier, then the manifest, and only then is an old one pruned."""

    def __init__(
        self,
        engine: Engine,
        checkpoints: Path,
        config: CheckpointConfig,
        facts: dict[str, Any],
        global_batch: int,
        uploads: Uploads | None = None,
    ) -> None:
        """
        Args:
            engine: what is saved.
            checkpoints: the run's folder of checkpoints, seen by every rank.
            config: what is kept.
            facts: what `model/config.json` says.
            global_batch: clips per update.
            uploads: copies them elsewhere, beginning with what an earlier start left undone; rank 0's alone.
        """
        self._engine, self._checkpoints, self._config = engine, checkpoints, config
        self._facts, self._global_batch, self._uploads = facts, global_batch, uploads
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if uploads is not None:
            uploads.start()

    def __call__(self, steps: int, validated: dict[str, float]) -> None:
        """Save after `steps` updates; every rank must call it."""
        path = checkpoint.step_folder(self._checkpoints, steps)
        consumed = steps * self._global_batch
        if self._uploads is not None:
            self._uploads.join_unless_stopping()
        if self._rank == 0:
            checkpoint.begin(path)
        barrier()
        self._engine.save(path)
        checkpoint.save_rank_state(path, self._rank, consumed)
        weights = self._engine.full_weights()
        if self._rank == 0:
            checkpoint.write_model(path / "model", weights, self._facts)
        averages = self._engine.full_ema()
        if self._rank == 0 and averages is not None:
            checkpoint.write_model(path / checkpoint.EMA, averages, self._facts)
        barrier()
        if self._rank == 0:
            checkpoint.commit(path, steps, consumed, self._world_size, validated.get("valid/loss"))
            if self._uploads is None or not self._uploads.busy:  # what is on its way must not be deleted
                prune(str(self._checkpoints), self._config.keep_last, self._config.keep_every)
        if self._uploads is not None:
            self._uploads.start()
        barrier()


@dataclass(frozen=True)
class Start:
    """The verified checkpoint that a run goes on from."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def universal(self) -> bool:
        """Whether another number of ranks wrote it, so that it has to be converted."""
        return self.manifest.world_size != torch.distributed.get_world_size()


def find_start(checkpoints: Path) -> Start | None:
    """Return the newest committed checkpoint, every file verified; None if there is none. Every rank must call it.

    Raises:
        CheckpointError: a file is missing or changed.
    """

    def find() -> Start | None:
        shutil.rmtree(checkpoints / _CONVERTED, ignore_errors=True)  # of a start that was killed while it converted
        found = checkpoint.committed(checkpoints)
        return Start(found[-1], checkpoint.verify(found[-1])) if found else None

    return on_first_rank(find)


def resume(engine: Engine, start: Start) -> None:
    """Load a checkpoint into an engine that was made for it (`universal`); every rank must call it.

    With as many ranks as wrote it, the run goes on bit by bit; with another number it is converted first, and sums are
    rounded in another order from there on. ZeRO-0 keeps everything on every rank and needs no conversion.

    Raises:
        CheckpointError: it cannot be converted, or a rank's state does not fit.
    """
    rank = torch.distributed.get_rank()
    if engine.universal:
        converted = start.folder.parent / _CONVERTED / start.folder.name
        on_first_rank(lambda: convert(start.folder, converted))
        engine.load(converted)
        barrier()
        if rank == 0:
            shutil.rmtree(converted.parent)
    else:
        engine.load(start.folder)
    checkpoint.load_rank_state(start.folder, rank % start.manifest.world_size)
    if (start.folder / checkpoint.EMA).is_dir():
        engine.load_ema(checkpoint.read_weights(start.folder / checkpoint.EMA))
