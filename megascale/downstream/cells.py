"""The cells of a table: every task, arm, bitrate, seed, learning rate and fold is one classifier to train.

Every arm gets the same budget and the same grid of learning rates.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megascale import run_folder, storage
from megascale.config import validate
from megascale.downstream.pins import Pins, check_pins, pin, write_pins
from megascale.downstream.pool import CellJob, Pool
from megascale.downstream.protocols import TaskConfig, each_fold
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS, CellsConfig
from megascale.log import Progress
from megascale.stopping import StopSignal
from megascale.storage import StorageConfig


@dataclass(frozen=True)
class Arm:
    """One kind of row: fine-tuning's arm, its checkpoint at each bitrate (kbps; for `scratch` it gives the shape alone), and
    the language model that new weights begin as."""

    arm: str
    checkpoints: dict[float, str]
    init_from: str | None = None


Arms = dict[str, Arm]  # by the row's name


@dataclass(frozen=True)
class LabelledTokens:
    """One row group of the table."""

    name: str
    url: str
    task: TaskConfig


@dataclass(frozen=True)
class Cell:
    """One classifier to train; `arm` is the row's name, `fold` what is tested where the task has folds."""

    task: LabelledTokens
    arm: str
    bitrate_kbps: float
    seed: int
    lr: float
    fold: int | None = None

    @property
    def name(self) -> str:
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"{self.task.name}-{self.bitrate_kbps:g}kbps-{self.arm}-seed{self.seed}-lr{self.lr!r}{fold}"


def paper_arms(checkpoints: dict[float, str]) -> Arms:
    """Return the three arms of the paper, for a checkpoint at each bitrate."""
    return {arm: Arm(arm, checkpoints) for arm in ARMS}


def cells_of(rows: Sequence[LabelledTokens], arms: Arms, seeds: Sequence[int], budget: CellsConfig) -> list[Cell]:
    """Return every cell."""
    return [
        Cell(row, *parts)
        for row in rows
        for parts in itertools.product(arms, BITRATES_KBPS, seeds, budget.lrs, _folds_of(row.task))
    ]


def _folds_of(task: TaskConfig) -> list[int | None]:
    return [each.fold if each.protocol == "folds" else None for each in each_fold(task)]


@dataclass(frozen=True)
class Plan:
    """Cells with their configs, and the checkpoints that they begin with."""

    cells: list[Cell]
    configs: list[Any]
    pins: Pins


def plan_cells(
    rows: Sequence[LabelledTokens],
    arms: Arms,
    seeds: Sequence[int],
    budget: CellsConfig,
    output_url: str,
    stores: StorageConfig,
    job: CellJob,
) -> Plan:
    """Return every cell and its config, checked before anything runs or is written.

    What cells need that are not finished is looked at: tokens and checkpoints once for each task, arm and bitrate, clips
    once for each task. What is there of an earlier start is compared.

    Raises:
        ConfigError: a cell's folder holds a run of another config.
        ConfigError, DataError, TokenError, CheckpointError: bad input.
    """
    cells = cells_of(rows, arms, seeds, budget)
    pins = pin((url for arm in arms.values() for url in arm.checkpoints.values()), output_url)
    pinned = {
        name: replace(arm, checkpoints={kbps: pins[url].url for kbps, url in arm.checkpoints.items()})
        for name, arm in arms.items()
    }
    trees = [_finetune_tree(cell, pinned, budget, output_url) | {"storage": stores.model_dump()} for cell in cells]
    configs = [validate(job.schema, "table1.cells.finetune", tree) for tree in trees]
    unfinished = []
    for cell, config in zip(cells, configs, strict=True):
        folder = storage.local_path(config.output.url)
        run_folder.check_config(folder, config, "finetune", ("storage.",))
        if run_folder.read_result(folder) is None:
            unfinished.append((cell, config))
    check_pins(pins, {config.checkpoint for _, config in unfinished})
    _check_inputs(unfinished, job)
    return Plan(cells, configs, pins)


def _check_inputs(cells: Sequence[tuple[Cell, Any]], job: CellJob) -> None:
    for config in {(cell.task.name, cell.arm, cell.bitrate_kbps): config for cell, config in cells}.values():
        job.check(config)
    splits: dict[str, dict[tuple[int, int | None], Any]] = {}
    for cell, config in cells:
        splits.setdefault(cell.task.name, {}).setdefault((cell.seed, cell.fold), config)
    for of_task in splits.values():
        job.check_clips(list(of_task.values()))


def _finetune_tree(cell: Cell, arms: Arms, budget: CellsConfig, output_url: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(budget.finetune))
    tree.setdefault("optim", {})["lr"] = cell.lr
    arm = arms[cell.arm]
    if arm.init_from is not None:
        tree["model"] = {"init_from": arm.init_from}
    return tree | {
        "data": {"url": cell.task.url, "bitrate_kbps": cell.bitrate_kbps},
        "task": cell.task.task.model_dump() | ({} if cell.fold is None else {"fold": cell.fold}),
        "arm": arm.arm,
        "checkpoint": arm.checkpoints[cell.bitrate_kbps],
        "output": {"url": storage.join(output_url, "cells", cell.name), "save_model": False},
        "seed": cell.seed,
    }


def train(plan: Plan, output_url: str, job: CellJob, gpus_each: float) -> list[tuple[Cell, dict[str, Any]]]:
    """Train the cells that are not finished; return every cell with its `result.json`.

    Raises:
        MegascaleError: what a cell's training raises.
        Stopped: SIGTERM came; finished cells stay.
    """
    write_pins(plan.pins, output_url)
    configs = plan.configs
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
    return [(cell, results[i]) for i, cell in enumerate(plan.cells)]
