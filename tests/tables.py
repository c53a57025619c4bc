"""A small table's rows, arms and budget, and its cells as fine-tuning leaves them."""

from pathlib import Path
from typing import Any

from support import write_paced_tokens, write_pretrained

from megascale import run_folder
from megascale.downstream.cells import Cell, LabelledTokens, paper_arms
from megascale.downstream.pool import CellJob
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1 import BaselineJob, _plan
from megascale.downstream.table1_config import CellsConfig, Table1Config

CHECKPOINTS = {1.5: "run-1k5", 12.0: "run-12k"}
PAPERS = paper_arms(CHECKPOINTS)
LRS = [1e-4, 3e-4, 1e-3]
BUDGET = CellsConfig(lrs=LRS, finetune={"train": {"epochs": 3}, "drop": {"p": 0.5}, "optim": {"clip_norm": 2.0}})
ROWS = [
    LabelledTokens("gtzan", "tokens/gtzan", TaskConfig(label="genre")),
    LabelledTokens("nsynth", "tokens/nsynth", TaskConfig(label="instrument_family_str", protocol="official")),
]


def write_inputs(folder: Path, audio: str = "/nowhere") -> dict[str, Any]:
    """Write tokens that serve all three tasks, said to be of `audio`, and a tiny encoder at each bitrate; return a table's
    config, as a tree."""
    names = ("genre", "instrument_family_str", "class")
    write_paced_tokens(
        folder / "tokens", 40, labels=lambda i: dict.fromkeys(names, ("low", "high")[i % 2]), audio=audio
    )
    for num_codebooks in (2, 16):
        write_pretrained(folder / f"q{num_codebooks}", num_codebooks)
    return {
        "data": dict.fromkeys(("gtzan", "nsynth", "music_speech"), str(folder / "tokens")),
        "checkpoints": {"1k5": str(folder / "q2"), "12k": str(folder / "q16")},
        "cells": {"lrs": [1e-3], "finetune": {"train": {"epochs": 1}}},
        "baselines": False,
        "output": {"url": str(folder / "table")},
    }


def finish_cells(config: Table1Config, job: CellJob, baselines: BaselineJob) -> list[Path]:
    """Leave what fine-tuning leaves of every cell, without the training; return where the results lie."""
    plan, places = _plan(config, job, baselines), []
    for cell, cell_config in zip(plan.cells, plan.configs, strict=True):
        folder = Path(cell_config.output.url)
        if run_folder.read_result(folder) is None:
            run_folder.write_config(folder, cell_config)
            run_folder.write_result(folder, result(cell))
        places.append(folder / run_folder.RESULT)
    return places


def result(cell: Cell, **scores: float) -> dict[str, Any]:
    """What a fine-tuning run returns, as far as the table and its page read it."""
    known = {"accuracy": 0.5, "macro_f1": 0.4, "valid_accuracy": 0.5, "valid_loss": 1.0, "count": 100}
    known |= {"classes": ["high", "low"], "confusion": [[25, 25], [25, 25]]}
    return known | {"arm": cell.arm, "bitrate_kbps": cell.bitrate_kbps, "seed": cell.seed, "lr": cell.lr} | scores
