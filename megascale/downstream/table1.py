"""The paper's Table 1: every task, arm and bitrate, fanned out over Ray, with the paper's figures beside ours.

Every arm gets the same budget and the same grid of learning rates; the rate is chosen on validation, for each task, arm
and bitrate apart. The job that trains one classifier is handed in, because this file must not import a task.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

from megascale import run_folder, storage
from megascale.cluster import check_stays, start_ray
from megascale.config import validate
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1_config import (
    ARMS,
    BITRATES_KBPS,
    CellsConfig,
    CheckpointsConfig,
    FurtherArmConfig,
    Table1Config,
)
from megascale.errors import MegascaleError
from megascale.log import Progress, say
from megascale.stopping import StopSignal
from megascale.storage import StorageConfig

TABLE = "table1.json"
_MARKS = {"above": " ▲", "below": " ▼"}
# accuracy and F1 in percent at 1.5 and 12 kbps: Table 1 of the paper
PAPER = {
    "gtzan": {
        "scratch": ((69.00, 68.10), (63.00, 60.07)),
        "ft": ((83.00, 82.50), (79.00, 78.01)),
        "ft_aug": ((78.00, 78.00), (79.00, 78.91)),
    },
    "nsynth": {
        "scratch": ((28.27, 17.69), (26.03, 14.87)),
        "ft": ((26.59, 17.47), (27.56, 16.51)),
        "ft_aug": ((28.91, 18.45), (27.88, 17.61)),
    },
    "music_speech": {
        "scratch": ((84.62, 84.52), (84.62, 84.52)),
        "ft": ((100.0, 100.0), (100.0, 100.0)),
        "ft_aug": ((100.0, 100.0), (100.0, 100.0)),
    },
}


Arms = dict[str, tuple[str, dict[float, str]]]  # row of the table -> fine-tuning's arm, and its checkpoint by bitrate
ScoreBaselines = Callable[["LabelledTokens", Sequence[int], Sequence[float]], dict[str, Any]]


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


@dataclass(frozen=True)
class CellJob:
    """The job that trains one cell; handed in, because this file must not import a task.

    schema: its config class. check: raises what is wrong with a config's inputs. run: (config, quiet=True) -> result.
    """

    schema: type[Any]
    check: Callable[[Any], Any]
    run: Callable[..., dict[str, Any]]


def rows_of(config: Table1Config) -> list[LabelledTokens]:
    """Return the three tasks of the paper."""
    names = ("gtzan", "nsynth", "music_speech")
    return [LabelledTokens(name, getattr(config.data, name), getattr(config.tasks, name)) for name in names]


def describe_plan(config: Table1Config, job: CellJob) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    storage.configure(config.storage)
    arms = _arms(config)
    cells = _cells(rows_of(config), arms, config.seeds, config.cells)
    _configs(cells, arms, config.cells, config.output.url, config.storage, job)
    rates = len(config.cells.lrs)
    return f"{len(cells)} fine-tuning runs ({len(cells) // rates} cells x {rates} rates) -> {config.output.url}"


def run(config: Table1Config, job: CellJob, score_baselines: ScoreBaselines) -> dict[str, Any]:
    """Make the paper's table; finished runs are not repeated, and a finished table is not made again.

    Args:
        config: the job.
        job: trains one cell.
        score_baselines: (row, seeds, bitrates in kbps) -> what the cells are held against; where `baselines` is set.

    Returns:
        The table, as `table1.json` holds it.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, or a cell could not be trained.
        Stopped: SIGTERM came; finished cells stay.
    """
    storage.configure(config.storage)
    check_stays(config.output.url, "table1.output.url")
    path = storage.local_path(config.output.url)
    run_folder.check_config(path, config, "table1", ("storage.",))
    finished = run_folder.read_result(path, TABLE)
    if finished is not None:
        say(f"{path / TABLE}: already done")
        return finished
    describe_plan(config, job)  # checks every input before anything is written
    run_folder.write_config(path, config)
    output, rows = config.output.url, rows_of(config)
    table = train_cells(rows, _arms(config), config.cells, config.seeds, output, config.storage, job)
    if config.baselines:
        table["baselines"] = {row.name: score_baselines(row, config.seeds, BITRATES_KBPS) for row in rows}
    write_table(table, output)
    return table


def train_cells(
    rows: Sequence[LabelledTokens],
    arms: Arms,
    budget: CellsConfig,
    seeds: Sequence[int],
    output_url: str,
    stores: StorageConfig,
    job: CellJob,
) -> dict[str, Any]:
    """Train every cell of a table of any tasks; return the table with the learning rates that validation chose."""
    cells = _cells(rows, arms, seeds, budget)
    configs = _configs(cells, arms, budget, output_url, stores, job)
    results = _fan_out(configs, job, budget.gpus_each)
    return _choose(rows, list(zip(cells, results, strict=True)))


def write_table(table: dict[str, Any], output_url: str) -> None:
    """Write table1.md, and table1.json last, which says that the table is finished."""
    storage.publish_bytes(storage.join(output_url, "table1.md"), to_markdown(table).encode())
    storage.publish_bytes(storage.join(output_url, TABLE), json.dumps(table, indent=1).encode())
    say(f"{len(table['cells'])} classifiers -> {storage.join(output_url, 'table1.md')}")


def paper_arms(checkpoints: dict[float, str]) -> Arms:
    """Return the three arms of the paper, for a checkpoint at each bitrate."""
    return {arm: (arm, checkpoints) for arm in ARMS}


def checkpoints_of(config: Table1Config) -> dict[float, str]:
    """Return the checkpoint of each bitrate, kbps."""
    return _by_bitrate(config.checkpoints)


def _arms(config: Table1Config) -> Arms:
    return paper_arms(checkpoints_of(config)) | {
        name: (further.arm, _by_bitrate(further)) for name, further in config.further.items()
    }


def _by_bitrate(config: CheckpointsConfig | FurtherArmConfig) -> dict[float, str]:
    return dict(zip(BITRATES_KBPS, (config.kbps_1k5, config.kbps_12k), strict=True))


def _configs(
    cells: Sequence[Cell],
    arms: Arms,
    budget: CellsConfig,
    output_url: str,
    stores: StorageConfig,
    job: CellJob,
) -> list[Any]:
    """Return every cell's config, its inputs checked before anything runs (once for each task, arm and bitrate)."""
    trees = [_finetune_tree(cell, arms, budget, output_url) | {"storage": stores.model_dump()} for cell in cells]
    configs = [validate(job.schema, "table1.cells.finetune", tree) for tree in trees]
    for config in {(c.task.name, c.arm, c.bitrate_kbps): f for c, f in zip(cells, configs, strict=True)}.values():
        job.check(config)
    return configs


def _cells(rows: Sequence[LabelledTokens], arms: Arms, seeds: Sequence[int], budget: CellsConfig) -> list[Cell]:
    return [Cell(*parts) for parts in itertools.product(rows, arms, BITRATES_KBPS, seeds, budget.lrs)]


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


def _fan_out(configs: list[Any], job: CellJob, gpus_each: float) -> list[dict[str, Any]]:
    folders = [storage.local_path(config.output.url) for config in configs]
    for folder, config in zip(folders, configs, strict=True):
        run_folder.check_config(folder, config, "finetune", ("storage.",))
    results = {i: run_folder.read_result(folder) for i, folder in enumerate(folders)}
    missing = [i for i, result in results.items() if result is None]
    if missing:
        results |= _train([configs[i] for i in missing], missing, len(configs), job, gpus_each)
    return [result for _, result in sorted(results.items()) if result is not None]


def _train(
    configs: list[Any], numbers: list[int], total: int, job: CellJob, gpus_each: float
) -> dict[int, dict[str, Any]]:
    ray = start_ray()
    task = ray.remote(one_thread_on_cpus).options(num_cpus=1, num_gpus=gpus_each)
    waiting = {task.remote(job.run, config): number for number, config in zip(numbers, configs, strict=True)}
    results: dict[int, dict[str, Any]] = {}
    progress = Progress("fine-tuning", total, total - len(waiting), "runs")
    with StopSignal() as stop:
        try:
            while waiting:
                stop.check()
                for finished in ray.wait(list(waiting), timeout=1.0)[0]:
                    results[waiting.pop(finished)] = ray.get(finished)
                progress.update(total - len(waiting))
        except ray.exceptions.RayTaskError as failure:
            if isinstance(failure.cause, MegascaleError):
                raise failure.cause from None
            raise
        finally:
            for unfinished in waiting:
                ray.cancel(unfinished, force=True)
    progress.close()
    return results


def one_thread_on_cpus(finetune: Callable[..., dict[str, Any]], config: Any) -> dict[str, Any]:
    """Train a classifier in a worker of Ray's; many small ones run side by side on CPUs, each on a core."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return finetune(config, quiet=True)


def _choose(rows: Sequence[LabelledTokens], finished: list[tuple[Cell, dict[str, Any]]]) -> dict[str, Any]:
    """Keep, for each task, arm and bitrate, the learning rate that is best on validation over all seeds."""
    cells, summary = [], []
    arms = dict.fromkeys(c.arm for c, _ in finished)
    for task, arm, kbps in itertools.product(rows, arms, BITRATES_KBPS):
        group = [(c, r) for c, r in finished if (c.task.name, c.arm, c.bitrate_kbps) == (task.name, arm, kbps)]
        lrs = sorted({c.lr for c, _ in group})

        def merit(lr: float, group: list[tuple[Cell, dict[str, Any]]] = group) -> tuple[float, float]:
            mine = [r for c, r in group if c.lr == lr]
            loss = float(np.mean([r["valid_loss"] for r in mine]))
            # a rate that diverged never wins
            return float(np.mean([r["valid_accuracy"] for r in mine])), -loss if np.isfinite(loss) else -np.inf

        lr = max(lrs, key=merit)
        chosen = [r for c, r in group if c.lr == lr]
        for result in chosen:
            cells.append({"task": task.name, **result, "arm": arm})
        low, high = interval(chosen)
        paper = _paper(task.name, arm, kbps)
        summary.append(
            {
                "task": task.name,
                "arm": arm,
                "bitrate_kbps": kbps,
                "lr": lr,
                "lrs_tried": lrs,
                "seeds": [r["seed"] for r in chosen],
                "accuracy": float(np.mean([r["accuracy"] for r in chosen])),
                "accuracy_ci95": [low, high],
                "macro_f1": float(np.mean([r["macro_f1"] for r in chosen])),
                "count": chosen[0]["count"],
                "paper": paper,
                "against_paper": _against(paper, low, high),
            }
        )
    return {"cells": cells, "summary": summary, "baselines": {}}


def _paper(task: str, arm: str, bitrate_kbps: float) -> dict[str, float] | None:
    found = PAPER.get(task, {}).get(arm)
    if found is None:
        return None
    accuracy, f1 = found[BITRATES_KBPS.index(bitrate_kbps)]
    return {"accuracy": accuracy / 100, "macro_f1": f1 / 100}


def _against(paper: dict[str, float] | None, low: float, high: float) -> str | None:
    """Return whether the interval lies above or below the paper's accuracy; None if it holds it."""
    if paper is None or low <= paper["accuracy"] <= high:
        return None
    return "above" if low > paper["accuracy"] else "below"


def interval(results: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the 95% interval of the accuracy: Student's t over seeds; Wilson's over the test recordings where there is
    one seed, or where all agree."""
    values = [r["accuracy"] for r in results]
    if np.ptp(values) == 0:
        count = results[0]["count"]
        found = scipy.stats.binomtest(round(values[0] * count), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))


def to_markdown(table: dict[str, Any]) -> str:
    """Return the table in the paper's shape: percent, accuracy with its 95% interval, the paper's figure in brackets,
    ▲ or ▼ where it lies outside the interval and ours is above or below it."""
    lines = ["| Dataset | Type | Acc. 1.5 | Acc. 12 | F1 1.5 | F1 12 | n |", "|---|---|---|---|---|---|---|"]
    found = {(s["task"], s["arm"], s["bitrate_kbps"]): s for s in table["summary"]}
    for task in dict.fromkeys(s["task"] for s in table["summary"]):
        for arm in dict.fromkeys(s["arm"] for s in table["summary"]):
            two = [found[task, arm, kbps] for kbps in BITRATES_KBPS]
            columns = [_percent(s, "accuracy", s["accuracy_ci95"]) for s in two]
            columns += [_percent(s, "macro_f1", None) for s in two]
            lines.append(f"| {task} | {arm} | {' | '.join(columns)} | {two[0]['count']} |")
        for name, result in table["baselines"].get(task, {}).items():
            own = [result.get("bitrate_kbps") in (None, kbps) for kbps in BITRATES_KBPS]
            scores = (_percent(result, "accuracy", result["accuracy_ci95"]), _percent(result, "macro_f1", None))
            columns = [score if shown else "" for score in scores for shown in own]
            lines.append(f"| {task} | {name} | {' | '.join(columns)} | {result['count']} |")
    return "\n".join(lines) + "\n"


def _percent(cell: dict[str, Any], metric: str, interval: Sequence[float] | None) -> str:
    text = f"{100 * cell[metric]:.2f}"
    text += f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else ""
    text += _MARKS.get(cell.get("against_paper") or "", "") if interval else ""
    return text + (f" ({100 * cell['paper'][metric]:.2f})" if cell.get("paper") else "")
