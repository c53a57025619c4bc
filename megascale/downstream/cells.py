"""The cells of a table: every task, arm, bitrate, seed and learning rate is one classifier to train.

Every arm gets the same budget and the same grid of learning rates.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megascale import run_folder, storage
from megascale.config import validate
from megascale.downstream.pool import CellJob, Pool
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS, CellsConfig
from megascale.log import Progress
from megascale.stopping import StopSignal
from megascale.storage import StorageConfig

Arms = dict[str, tuple[str, dict[float, str]]]  # row of the table -> fine-tuning's arm, and its checkpoint by bitrate


@dataclass(frozen=True)
class LabelledTokens:
    """One row group of the table."""

    name: str
    url: str
    task: TaskConfig


@dataclass(frozen=True)
class Cell:
    """One classifier to train; `arm` is the row's name."""

    task: LabelledTokens
    arm: str
    bitrate_kbps: float
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.bitrate_kbps:g}kbps-{self.arm}-seed{self.seed}-lr{self.lr!r}"


def paper_arms(checkpoints: dict[float, str]) -> Arms:
    """Return the three arms of the paper, for a checkpoint at each bitrate."""
    return {arm: (arm, checkpoints) for arm in ARMS}


def cells_of(rows: Sequence[LabelledTokens], arms: Arms, seeds: Sequence[int], budget: CellsConfig) -> list[Cell]:
    """Return every cell."""
    return [Cell(*parts) for parts in itertools.product(rows, arms, BITRATES_KBPS, seeds, budget.lrs)]


def configs_of(
    cells: Sequence[Cell],
    arms: Arms,
    budget: CellsConfig,
    output_url: str,
    stores: StorageConfig,
    job: CellJob,
) -> list[Any]:
    """Return every cell's config, checked before anything runs or is written.

    Tokens and checkpoints are looked at once for each task, arm and bitrate, clips once for each task; and what is there
    of an earlier start is compared.

    Raises:
        ConfigError: a cell's folder holds a run of another config.
        ConfigError, DataError, TokenError, CheckpointError: bad input.
    """
    trees = [_finetune_tree(cell, arms, budget, output_url) | {"storage": stores.model_dump()} for cell in cells]
    configs = [validate(job.schema, "table1.cells.finetune", tree) for tree in trees]
    for config in configs:
        run_folder.check_config(storage.local_path(config.output.url), config, "finetune", ("storage.",))
    for config in {(c.task.name, c.arm, c.bitrate_kbps): f for c, f in zip(cells, configs, strict=True)}.values():
        job.check(config)
    splits: dict[str, dict[int, Any]] = {}
    for cell, config in zip(cells, configs, strict=True):
        splits.setdefault(cell.task.name, {}).setdefault(cell.seed, config)
    for of_task in splits.values():
        job.check_clips(list(of_task.values()))
    return configs


def _finetune_tree(cell: Cell, arms: Arms, budget: CellsConfig, output_url: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(budget.finetune))
    tree.setdefault("optim", {})["lr"] = cell.lr
    arm, checkpoints = arms[cell.arm]
    return tree | {
        "data": {"url": cell.task.url, "bitrate_kbps": cell.bitrate_kbps},
        "task": cell.task.task.model_dump(),
        "arm": arm,
        "checkpoint": checkpoints[cell.bitrate_kbps],
        "output": {"url": storage.join(output_url, "cells", cell.name), "save_model": False},
        "seed": cell.seed,
    }


def train(configs: list[Any], job: CellJob, gpus_each: float) -> list[dict[str, Any]]:
    """Train the cells that are not finished; return every cell's `result.json`, in order.

    Raises:
        MegascaleError: what a cell's training raises.
        Stopped: SIGTERM came; finished cells stay.
    """
    found = {i: run_folder.read_result(storage.local_path(config.output.url)) for i, config in enumerate(configs)}
    results = {i: result for i, result in found.items() if result is not None}
    if len(results) < len(configs):
        progress = Progress("fine-tuning", len(configs), len(results), "runs")
        with StopSignal() as stop, Pool[int](job, gpus_each) as pool:
            for i in (i for i in found if i not in results):
                pool.begin(i, configs[i])
            while pool:
                stop.check()
                pool.wait(1.0)
                results |= pool.take()
                progress.update(len(results))
        progress.close()
    return [results[i] for i in range(len(configs))]
