"""The paper's Table 1: every task, arm and bitrate, fanned out over Ray, with the paper's figures beside ours.

The learning rate is chosen on validation, for each task, arm and bitrate apart. The job that trains one classifier is
handed in, because this file must not import a task.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megascale import run_folder, storage
from megascale.cluster import check_stays
from megascale.downstream.cells import Arm, Arms, LabelledTokens, Plan, paper_arms, plan_cells, train
from megascale.downstream.pins import pin
from megascale.downstream.pool import CellJob
from megascale.downstream.table import choose, to_markdown
from megascale.downstream.table1_config import (
    BITRATES_KBPS,
    CellsConfig,
    CheckpointsConfig,
    FurtherArmConfig,
    Table1Config,
)
from megascale.log import say
from megascale.storage import StorageConfig

TABLE = "table1.json"
_NO_OTHER_TABLE = ("storage.", "cells.gpus_each")


@dataclass(frozen=True)
class BaselineJob:
    """What scores one row's baselines, handed in because it reads audio.

    check: raises what is wrong with the row's recordings. score: (row, seeds, bitrates in kbps) -> what `baselines` of the
    table holds of it.
    """

    check: Callable[[LabelledTokens], Any]
    score: Callable[[LabelledTokens, Sequence[int], Sequence[float]], dict[str, Any]]


def rows_of(config: Table1Config) -> list[LabelledTokens]:
    """Return the three tasks of the paper."""
    names = ("gtzan", "nsynth", "music_speech")
    return [LabelledTokens(name, getattr(config.data, name), getattr(config.tasks, name)) for name in names]


def describe_plan(config: Table1Config, job: CellJob, baselines: BaselineJob) -> str:
    """Return what the job would do (`--dry-run`); writes nothing. Raises what is wrong with any input."""
    storage.configure(config.storage)
    cells, rates = _plan(config, job, baselines).cells, len(config.cells.lrs)
    return f"{len(cells)} fine-tuning runs ({len(cells) // rates} cells x {rates} rates) -> {config.output.url}"


def _plan(config: Table1Config, job: CellJob, baselines: BaselineJob) -> Plan:
    rows, arms = rows_of(config), _arms(config)
    plan = plan_cells(rows, arms, config.seeds, config.cells, config.output.url, config.storage, job)
    for row in rows if config.baselines else []:
        if _known_baselines(row, config) is None:
            baselines.check(row)
    return plan


def run(config: Table1Config, job: CellJob, baselines: BaselineJob) -> dict[str, Any]:
    """Make the paper's table; finished cells are not trained again, and a finished table of this config is not made again.

    Seeds, rates, rows and baselines may come and go between two starts: each cell compares its own config.

    Args:
        config: the job.
        job: trains one cell.
        baselines: scores what the cells are held against; where `baselines` is set.

    Returns:
        The table, as `table1.json` holds it.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, or a cell could not be trained.
        Stopped: SIGTERM came; finished cells stay.
    """
    storage.configure(config.storage)
    check_stays(config.output.url, "table1.output.url")
    path = storage.local_path(config.output.url)
    finished = run_folder.read_result(path, TABLE)
    if finished is not None and run_folder.is_config_of(path, config, _NO_OTHER_TABLE):
        say(f"{path / TABLE}: already done")
        return finished
    plan = _plan(config, job, baselines)
    (path / TABLE).unlink(missing_ok=True)  # of another config, of which cells may be shared; they compare their own
    run_folder.write_config(path, config)
    rows = rows_of(config)
    table = choose(rows, train(plan, config.output.url, job, config.cells.gpus_each))
    table["checkpoints"] = {url: asdict(found) for url, found in plan.pins.items()}
    if config.baselines:
        table["baselines"] = {row.name: _baselines(row, config, baselines) for row in rows}
    write_table(table, config.output.url)
    return table


def _baselines(row: LabelledTokens, config: Table1Config, baselines: BaselineJob) -> dict[str, Any]:
    """Return a row's baselines, scored once: that reads all of its audio."""
    known = _known_baselines(row, config)
    if known is not None:
        return known
    scores = baselines.score(row, config.seeds, BITRATES_KBPS)
    kept = {"of": _basis(row, config), "scores": scores}
    storage.publish_bytes(str(_baselines_path(row, config)), json.dumps(kept, indent=1).encode())
    return scores


def _known_baselines(row: LabelledTokens, config: Table1Config) -> dict[str, Any] | None:
    kept = run_folder.read_result(_baselines_path(row, config).parent, _baselines_path(row, config).name)
    return kept["scores"] if kept is not None and kept["of"] == _basis(row, config) else None


def _baselines_path(row: LabelledTokens, config: Table1Config) -> Path:
    return storage.local_path(config.output.url) / "baselines" / f"{row.name}.json"


def _basis(row: LabelledTokens, config: Table1Config) -> dict[str, Any]:
    return {"url": row.url, "task": row.task.model_dump(mode="json"), "seeds": config.seeds}


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
    plan = plan_cells(rows, arms, seeds, budget, output_url, stores, job)
    return choose(rows, train(plan, output_url, job, budget.gpus_each))


def write_table(table: dict[str, Any], output_url: str) -> None:
    """Write table1.md, and table1.json last, which says that the table is finished."""
    storage.publish_bytes(storage.join(output_url, "table1.md"), to_markdown(table).encode())
    storage.publish_bytes(storage.join(output_url, TABLE), json.dumps(table, indent=1).encode())
    say(f"{len(table['cells'])} classifiers -> {storage.join(output_url, 'table1.md')}")


def checkpoints_of(config: Table1Config) -> dict[float, str]:
    """Return the checkpoint that the table began with at each bitrate, kbps."""
    urls = _by_bitrate(config.checkpoints)
    pins = pin(urls.values(), config.output.url)
    return {kbps: pins[url].url for kbps, url in urls.items()}


def _arms(config: Table1Config) -> Arms:
    shapes = _by_bitrate(config.checkpoints)
    return paper_arms(shapes) | {
        name: Arm(further.arm, shapes if further.arm == "scratch" else _by_bitrate(further), further.init_from)
        for name, further in config.further.items()
    }


def _by_bitrate(config: CheckpointsConfig | FurtherArmConfig) -> dict[float, str]:
    urls = zip(BITRATES_KBPS, (config.kbps_1k5, config.kbps_12k), strict=True)
    return {kbps: url for kbps, url in urls if url is not None}
