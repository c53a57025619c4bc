"""Saving a run's checkpoints and finding the one to go on from, by the contract of `checkpoint.py`."""

from pathlib import Path
from typing import Any

import torch.distributed

from megascale.errors import CheckpointError
from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.engine import Engine, barrier
from megascale.train.manifest import prune
from megascale.train.uploads import Uploads


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
        barrier()
        if self._rank == 0:
            checkpoint.commit(path, steps, consumed, self._world_size, validated.get("valid/loss"))
            if self._uploads is None or not self._uploads.busy:  # what is on its way must not be deleted
                prune(str(self._checkpoints), self._config.keep_last, self._config.keep_every)
        if self._uploads is not None:
            self._uploads.start()
        barrier()


def resume(engine: Engine, checkpoints: Path) -> int:
    """Load the newest committed checkpoint, verified first; every rank must call it.

    Returns:
        Samples consumed; 0 if there is no checkpoint.

    Raises:
        CheckpointError: a file was changed, or another number of ranks wrote it.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = checkpoint.committed(checkpoints)
    if not found:
        return 0
    manifest = checkpoint.verify(found[-1])
    if manifest.world_size != world_size:
        raise CheckpointError(
            f"{found[-1]}: saved by {manifest.world_size} ranks; go on with as many, not {world_size}"
        )
    engine.load(found[-1])
    checkpoint.load_rank_state(found[-1], rank)
    return manifest.consumed_samples
