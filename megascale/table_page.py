"""The page of a table: beside the paper's figures, with confusion matrices and maps of embeddings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megascale import storage
from megascale.log import say
from megascale.report import Page, add_confusions, add_table, is_newer, printable


def write_table1_report(
    folder_url: str, table: dict[str, Any], paper: dict[str, Any], maps: Callable[[], Sequence[Any]]
) -> None:
    """Write `table1.html`: the table beside the paper's, confusion matrices, and maps of embeddings.

    `maps` is called if there is a page to write; it returns (title, points_R2, class of each point) for each map.
    """
    folder = storage.local_path(folder_url)
    if is_newer(folder / "table1.html", folder / "table1.json"):
        return
    page = Page("Table 1", folder_url, "table1.html")
    add_table(page, table, paper, table["baselines"])
    page.heading("Confusion matrices")
    add_confusions(page, table)
    drawn = maps()
    if drawn:
        page.heading("Embeddings")
        page.text(
            "Recordings by the mean over frames of the pretrained encoder, which saw no label, laid out by t-SNE: what lies "
            "together is alike to it; distances between groups mean little."
        )
        _add_embeddings(page, drawn)
    say(f"report: {page.write()}")


def _add_embeddings(page: Page, maps: Sequence[tuple[str, np.ndarray, list[str]]]) -> None:
    """Add maps of embeddings, two in a row: (title, points_R2, class of each point)."""
    columns, rows = min(2, len(maps)), math.ceil(len(maps) / 2)
    figure = Figure(figsize=(5.4 * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (title, points_R2, classes) in zip(axes.flat, maps, strict=False):
        for number, name in enumerate(sorted(set(classes))):
            own = np.array([found == name for found in classes])
            marker = "os^vD"[number // 10 % 5]
            ax.scatter(*points_R2[own].T, s=14, color=f"C{number % 10}", marker=marker, label=printable(name, 20))
        ax.set_title(title, fontsize=10)
        ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    page.picture("embeddings", figure, "embeddings of recordings by the pretrained encoders, laid out by t-SNE")
