"""The page of a watched pretraining run."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megascale.downstream.intervals import INTERVAL_TEXT, with_interval
from megascale.report import Page, printable


def write_watch_report(folder_url: str, curve: dict[str, Any]) -> None:
    """Write `report.html` of a watched run: downstream accuracy against pretraining steps, and the figures below."""
    page = Page("Downstream accuracy over pretraining", folder_url)
    page.text(f"{curve['run']}, arm {curve['arm']}" + (f"; {curve['waiting']} in training" if curve["waiting"] else ""))
    points = curve["points"]
    if any(point["step"] is not None for point in points):
        page.picture("accuracy", _accuracy_over_steps(points), "test accuracy of each task against pretraining steps")
    rows = [
        [
            point["task"],
            "from scratch" if point["step"] is None else str(point["step"]),
            with_interval(point),
            f"{100 * point['macro_f1']:.1f}",
            str(len(point["seeds"])),
            str(point["count"]),
        ]
        for point in sorted(points, key=lambda point: (point["task"], point["step"] or 0))
    ]
    page.table(["task", "pretraining steps", "accuracy", "macro-F1", "seeds", "n"], rows, text_columns=2)
    page.text(f"Percent on the test split, {INTERVAL_TEXT}. No choice is made by it.")
    page.write()


def _accuracy_over_steps(points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    for number, task in enumerate(dict.fromkeys(point["task"] for point in points)):
        own = sorted((p for p in points if p["task"] == task and p["step"] is not None), key=lambda p: p["step"])
        steps, accuracies = [p["step"] for p in own], [100 * p["accuracy"] for p in own]
        low, high = (np.array([100 * p["accuracy_ci95"][i] for p in own]) for i in (0, 1))
        ax.plot(steps, accuracies, marker="o", color=f"C{number}", label=printable(task, 24))
        ax.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, lw=0)
        for scratch in (p for p in points if p["task"] == task and p["step"] is None):
            ax.axhline(100 * scratch["accuracy"], color=f"C{number}", ls="--", lw=1)
    ax.set(xlabel="pretraining steps (dashed: from scratch)", ylabel="test accuracy, %")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
