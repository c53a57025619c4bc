"""The table: learning rates chosen on validation, means and intervals over seeds, the paper's figures beside ours."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from megascale.downstream.cells import Cell, LabelledTokens
from megascale.downstream.intervals import summarise, with_interval
from megascale.downstream.scores import pool
from megascale.downstream.table1_config import BITRATES_KBPS

_SAME_SPLIT = ("official", "lists")  # protocols whose split no seed draws

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


def choose(rows: Sequence[LabelledTokens], finished: list[tuple[Cell, dict[str, Any]]]) -> dict[str, Any]:
    """Keep, for each task, arm, bitrate and split, the learning rate that is best on its validation.

    Where seeds draw the split, what one tests may lie in another's validation: then each chooses by its own alone, and
    each fold likewise. The predictions of a seed's folds are pooled.

    Args:
        rows: the tasks.
        finished: every cell with its `result.json`.

    Returns:
        `cells`, what was kept, one result for each seed; `summary`, a row for each task, arm and bitrate; `baselines`, none
        yet.
    """
    cells, summary = [], []
    arms = dict.fromkeys(c.arm for c, _ in finished)
    for task, arm, kbps in itertools.product(rows, arms, BITRATES_KBPS):
        group = [(c, r) for c, r in finished if (c.task.name, c.arm, c.bitrate_kbps) == (task.name, arm, kbps)]
        splits: dict[Any, list[tuple[Cell, dict[str, Any]]]] = {}
        for cell, result in group:
            split = None if task.task.protocol in _SAME_SPLIT else (cell.seed, cell.fold)
            splits.setdefault(split, []).append((cell, result))
        kept = [result for of_split in splits.values() for result in _best(of_split)]
        chosen = kept if task.task.protocol != "folds" else _pooled_by_seed(kept)
        for result in chosen:
            cells.append({"task": task.name, **result, "arm": arm})
        paper, scores = _paper(task.name, arm, kbps), summarise(chosen)
        summary.append(
            {
                "task": task.name,
                "arm": arm,
                "bitrate_kbps": kbps,
                "seeds": [r["seed"] for r in chosen],
                "lrs": [r["lr"] for r in kept],
                "lrs_tried": sorted({c.lr for c, _ in group}),
                **scores,
                "paper": paper,
                "against_paper": _against(paper, *scores["accuracy_ci95"]),
            }
        )
    return {"cells": cells, "summary": summary, "baselines": {}}


def _best(group: list[tuple[Cell, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the results of the learning rate that is best on validation, over all that are given."""

    def merit(lr: float) -> tuple[float, float]:
        mine = [r for c, r in group if c.lr == lr]
        loss = float(np.mean([r["valid_loss"] for r in mine]))
        # a rate that diverged never wins
        return float(np.mean([r["valid_accuracy"] for r in mine])), -loss if np.isfinite(loss) else -np.inf

    best = max(sorted({c.lr for c, _ in group}), key=merit)
    return [r for c, r in group if c.lr == best]


def _pooled_by_seed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one result for each seed: the pooled scores of its folds, and what all of them have in common."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        by_seed.setdefault(result["seed"], []).append(result)
    return [
        {key: value for key, value in folds[0].items() if all(key in r and r[key] == value for r in folds)}
        | pool(folds)
        for folds in by_seed.values()
    ]


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


def to_markdown(table: dict[str, Any]) -> str:
    """Return the table in the paper's shape: percent, accuracy with its 95% interval, the paper's figure in brackets,
    ▲ or ▼ where it lies outside the interval and ours is above or below it."""
    lines = ["| Dataset | Type | Acc. 1.5 | Acc. 12 | F1 1.5 | F1 12 | n |", "|---|---|---|---|---|---|---|"]
    found = {(s["task"], s["arm"], s["bitrate_kbps"]): s for s in table["summary"]}
    for task in dict.fromkeys(s["task"] for s in table["summary"]):
        for arm in dict.fromkeys(s["arm"] for s in table["summary"]):
            two = [found[task, arm, kbps] for kbps in BITRATES_KBPS]
            columns = [with_interval(s, 2) + _papers(s, "accuracy") for s in two]
            columns += [_percent(s["macro_f1"]) + _papers(s, "macro_f1") for s in two]
            lines.append(f"| {task} | {arm} | {' | '.join(columns)} | {two[0]['count']} |")
        for name, result in table["baselines"].get(task, {}).items():
            own = [result.get("bitrate_kbps") in (None, kbps) for kbps in BITRATES_KBPS]
            scores = with_interval(result, 2), _percent(result["macro_f1"])
            columns = [score if shown else "" for score in scores for shown in own]
            lines.append(f"| {task} | {name} | {' | '.join(columns)} | {result['count']} |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _papers(cell: dict[str, Any], metric: str) -> str:
    return f" ({_percent(cell['paper'][metric])})" if cell["paper"] else ""
