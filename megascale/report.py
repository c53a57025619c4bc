"""One self-contained HTML page per run, its pictures also as PNG files beside it."""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megascale import storage
from megascale.downstream.intervals import INTERVAL_TEXT, with_interval
from megascale.log import read_metrics, say
from megascale.tokens import FRAMES_PER_SECOND, SAMPLE_RATE_HZ

matplotlib.use("Agg")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d8dce2 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .7rem; border-bottom: 1px solid #e4e7eb }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.group td { border-top: 2px solid #9aa4b2 }
img { max-width: 100%; height: auto } .note { background: #f4f6f8; border-left: 4px solid #9aa4b2; padding: .6rem 1rem }
small { color: #5a6472 } code { background: #f0f2f4; padding: 0 .25rem }
"""
PAGE = "report.html"
BLUE, ORANGE, _GREY = "#2563a8", "#c4661f", "#8a94a3"


class Page:
    """Collects sections and pictures, then writes one HTML file and the PNGs."""

    def __init__(self, title: str, folder_url: str, file_name: str = PAGE) -> None:
        self._folder_url, self._file_name = folder_url, file_name
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        self._title = title

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, note: bool = False) -> None:
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
        """Add a table; where first cells are empty, a row with one begins a group."""

        def cells(tag: str, values: Sequence[str]) -> str:
            kinds = ["" if i < text_columns else " class=number" for i in range(len(values))]
            return "".join(f"<{tag}{k}>{html.escape(v)}</{tag}>" for k, v in zip(kinds, values, strict=True))

        grouped = not all(row[0] for row in rows)
        body = "".join(f"<tr{' class=group' if grouped and row[0] else ''}>{cells('td', row)}</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells('th', header)}</tr>{body}</table>")

    def picture(self, name: str, figure: Figure, alt: str) -> None:
        """Add a figure, and write it as `name`.png."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        storage.publish_bytes(storage.join(self._folder_url, f"{name}.png"), buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self) -> str:
        """Write the page; return its URL."""
        where = storage.join(self._folder_url, self._file_name)
        head = f"<meta charset=utf-8><title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
        page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(self._parts)}</body></html>"
        # a file name need not be UTF-8; Python keeps such bytes as lone surrogates
        storage.publish_bytes(where, page.encode("utf-8", "backslashreplace"))
        return where


def write_pretrain_report(run_url: str, result: dict[str, Any]) -> None:
    """Write the page of a pretraining run: loss curves, and accuracy per codebook beside the unigram baseline."""
    folder = storage.local_path(run_url)
    if is_newer(folder / PAGE, folder / "result.json"):
        return
    page = Page(f"Pretraining at {result['bitrate_kbps']:g} kbps", run_url)
    add_pretraining(page, [(result, folder)])
    say(f"report: {page.write()}")


def is_newer(page: Path, result: Path) -> bool:
    """Return whether both are there, and the page was written later: a finished job was started again."""
    return page.exists() and result.exists() and page.stat().st_mtime_ns >= result.stat().st_mtime_ns


def add_pretraining(page: Page, runs: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """Add loss curves and codebook accuracies of pretraining runs (result.json and folder of each)."""
    page.picture("loss", _loss_curves(runs), "training and validation loss against steps")
    for result, folder in runs:
        figure = _signals(result, read_metrics(folder / "metrics.jsonl"))
        if figure is not None:
            name = "signals" if len(runs) == 1 else f"signals-{result['bitrate_kbps']:g}kbps"
            page.picture(name, figure, "loss and accuracy per codebook, gradient norm, learning rate, speed, waiting")
    validated = [result for result, _ in runs if result["validation"]]
    if not validated:
        page.text("Nothing was held out for validation.", note=True)
        return
    page.picture("codebooks", _codebook_accuracy(validated), "masked-token accuracy per codebook")
    for result in validated:
        found = result["validation"]
        page.text(
            f"{result['bitrate_kbps']:g} kbps, held-out clips: codebook 0 is predicted right for "
            f"{found['valid/acc_q0']:.1%} of the masked tokens; always saying its most frequent code is right for "
            f"{found['valid/unigram_acc_q0']:.1%}. Loss {found['valid/loss']:.3f} nats, unigram "
            f"{found['valid/unigram_loss']:.3f}."
        )


def _loss_curves(runs: Sequence[tuple[dict[str, Any], Path]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(runs), 3.6))
    for ax, (result, folder) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        rows = read_metrics(folder / "metrics.jsonl")
        for key, label, style in (
            ("train/loss", "training", {"color": BLUE, "alpha": 0.6, "lw": 1}),
            ("valid/loss", "held out", {"color": ORANGE, "marker": "o", "ms": 4}),
            ("valid/unigram_loss", "unigram baseline", {"color": _GREY, "ls": "--"}),
        ):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                ax.plot(*zip(*points, strict=True), label=label, **style)
        ax.set(title=f"{result['bitrate_kbps']:g} kbps", xlabel="step", ylabel="loss (nats, mean over codebooks)")
        if ax.lines:
            ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


_SIGNALS = (
    ("train/loss_minus_unigram_q", 1, "loss minus unigram (nats)"),
    ("train/acc_q", 100, "masked accuracy (%)"),
    ("train/grad_norm", 1, "gradient norm"),
    ("train/lr", 1, "learning rate"),
    ("train/clips_per_second", 1, "clips/s"),
    ("train/data_wait_share", 100, "waiting for data (%)"),
)


def _signals(result: dict[str, Any], rows: list[dict[str, Any]]) -> Figure | None:
    """Draw what the run told of its training, a panel for each kind of metric that it has; None if it has none.

    Names that end in `_q` stand for one line per codebook, dark to light.
    """
    panels = []
    for name, scale, label in _SIGNALS:
        keys = sorted({key for row in rows for key in row if key.removeprefix(name).isdigit()} or {name}, key=_number)
        lines = [[(row["step"], scale * row[key]) for row in rows if key in row] for key in keys]
        if any(lines):
            panels.append((label, lines))
    if not panels:
        return None
    height = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(10.4, 2.5 * height), layout="constrained")
    axes = figure.subplots(height, 3, squeeze=False).flat
    for ax in axes:
        ax.set_axis_off()
    for ax, (label, lines) in zip(figure.axes, panels, strict=False):
        ax.set_axis_on()
        for q, points in enumerate(lines):
            color = BLUE if len(lines) == 1 else matplotlib.colormaps["viridis"](0.9 * q / (len(lines) - 1))
            shown = f"codebook {q}" if len(lines) > 1 and q in (0, len(lines) - 1) else None
            ax.plot(*zip(*points, strict=True), color=color, lw=1, label=shown)
        ax.set_title(label, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            ax.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['bitrate_kbps']:g} kbps, training, against steps", fontsize=11)
    return figure


def _number(key: str) -> int:
    return int("0" + key.rpartition("_q")[2]) if key.rpartition("_q")[2].isdigit() else 0


def _codebook_accuracy(results: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(5.2 * len(results), 3.2))
    for ax, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        found = result["validation"]
        count = sum(key.startswith("valid/acc_q") for key in found)
        place = np.arange(count)
        ours = [100 * found[f"valid/acc_q{q}"] for q in place]
        baseline = [100 * found[f"valid/unigram_acc_q{q}"] for q in place]
        ax.bar(place - 0.2, ours, 0.4, color=BLUE, label="masked-token accuracy")
        ax.bar(place + 0.2, baseline, 0.4, color=_GREY, label="unigram baseline")
        ax.set(title=f"{result['bitrate_kbps']:g} kbps", xlabel="codebook", ylabel="% right", xticks=place)
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def add_table(page: Page, table: dict[str, Any], paper: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> None:
    """Add a Table-1-shaped table: accuracy with its 95% interval and macro-F1 in percent, baselines below each task.

    Args:
        page: where to.
        table: as `downstream.table1` makes it.
        paper: the paper's figures by task and arm, or nothing.
        baselines: by task and name, as `table_baselines` makes them.
    """
    header = ["Dataset", "Type", "Acc. 1.5 kbps", "Acc. 12 kbps", "F1 1.5", "F1 12", "n"]
    header += ["paper acc. 1.5 / 12"] if paper else []
    rows: list[list[str]] = []
    previous = None
    for summary_15, summary_12 in _pairs(table["summary"]):
        task = summary_15["task"]
        if previous is not None and task != previous:
            rows += _baseline_rows(baselines.get(previous, {}), bool(paper))
        row = ["" if task == previous else task, summary_15["arm"]]
        row += [with_interval(summary_15), with_interval(summary_12)]
        row += [f"{100 * s['macro_f1']:.1f}" for s in (summary_15, summary_12)] + [str(summary_15["count"])]
        theirs = paper.get(task, {}).get(summary_15["arm"])
        row += [f"{theirs[0][0]:.2f} / {theirs[1][0]:.2f}" if theirs else ""] if paper else []
        rows.append(row)
        previous = task
    rows += _baseline_rows(baselines.get(previous or "", {}), bool(paper))
    page.table(header, rows, text_columns=2)
    page.text(
        f"Percent, {INTERVAL_TEXT}. Learning rates were chosen on the validation split, for every arm from the same grid."
        + (" ▲ ▼: the paper's figure lies outside the interval, and ours is above or below it." if paper else "")
    )


def _pairs(summary: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    low = [s for s in summary if s["bitrate_kbps"] == 1.5]
    high = {(s["task"], s["arm"]): s for s in summary if s["bitrate_kbps"] == 12.0}
    return [(s, high[s["task"], s["arm"]]) for s in low]


def _baseline_rows(baselines: dict[str, Any], with_paper: bool) -> list[list[str]]:
    rows = []
    for name, found in baselines.items():
        own = [found.get("bitrate_kbps") in (None, kbps) for kbps in (1.5, 12.0)]
        accuracy, f1 = with_interval(found), f"{100 * found['macro_f1']:.1f}"
        scores = [score if shown else "" for score in (accuracy, f1) for shown in own]
        rows.append(["", name, *scores, str(found["count"])] + ([""] if with_paper else []))
    return rows


def baseline_score(found: dict[str, Any], bitrate_kbps: float) -> str:
    """Return a baseline's accuracy and macro-F1 in percent; nothing where it is another bitrate's."""
    if found.get("bitrate_kbps") not in (None, bitrate_kbps):
        return ""
    return f"{100 * found['accuracy']:.1f} ({100 * found['macro_f1']:.1f})"


def add_confusions(page: Page, table: dict[str, Any]) -> None:
    """Add one picture per task: the confusion matrix of every arm and bitrate (first seed)."""
    for task in dict.fromkeys(cell["task"] for cell in table["cells"]):
        cells: dict[tuple[str, float], dict[str, Any]] = {}
        for cell in table["cells"]:
            if cell["task"] == task:
                cells.setdefault((cell["arm"], cell["bitrate_kbps"]), cell)
        page.picture(f"confusion-{task}", _confusions(task, cells), f"confusion matrices of {task}")


def _confusions(task: str, cells: dict[tuple[str, float], dict[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(arm for arm, _ in cells))
    bitrates = sorted({kbps for _, kbps in cells})
    figure = Figure(figsize=(4.2 * len(arms), 3.9 * len(bitrates)), layout="constrained")
    axes = figure.subplots(len(bitrates), len(arms), squeeze=False)
    for (arm, kbps), cell in cells.items():
        row, column = bitrates.index(kbps), arms.index(arm)
        ax = axes[row][column]
        counts = np.array(cell["confusion"], dtype=float)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[i, j] > 0.6 else "black"
            ax.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
        ax.set_title(f"{task}, {arm}, {kbps:g} kbps: {100 * cell['accuracy']:.0f}%", fontsize=10)
        classes = [printable(name, 24) for name in cell["classes"]]
        places, none = range(len(classes)), [""] * len(classes)
        # outer labels are enough; inner ones would shrink the matrices
        ax.set_xticks(places, classes if row == len(bitrates) - 1 else none, rotation=90, fontsize=7, parse_math=False)
        ax.set_yticks(places, classes if column == 0 else none, fontsize=7, parse_math=False)
    for row in range(len(bitrates)):
        axes[row][0].set_ylabel("truth")
    for ax in axes[-1]:
        ax.set_xlabel("predicted")
    return figure


def add_clips(page: Page, clips: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Add clips, two in a row: (title, log-mel spectrogram (M, F), codes_QT), each spectrogram above its tokens."""
    columns, rows = min(2, len(clips)), math.ceil(len(clips) / 2)
    figure = Figure(figsize=(5.2 * columns, 4.4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (title, spectrogram_MF, codes_QT) in enumerate(clips):
        above, below = axes[2 * (i // columns)][i % columns], axes[2 * (i // columns) + 1][i % columns]
        above.set_axis_on()
        below.set_axis_on()
        seconds = codes_QT.shape[1] / FRAMES_PER_SECOND
        top_khz = SAMPLE_RATE_HZ / 2000
        above.imshow(spectrogram_MF, origin="lower", aspect="auto", extent=(0, seconds, 0, top_khz), cmap="magma")
        above.set_title(printable(title, 60), fontsize=10, parse_math=False)
        above.set_yticks([0, top_khz], ["0", f"{top_khz:g} kHz (mel)"], fontsize=8)
        below.imshow(
            codes_QT,
            aspect="auto",
            extent=(0, seconds, len(codes_QT) - 0.5, -0.5),
            cmap="nipy_spectral",
            interpolation="nearest",
            vmin=0,
            vmax=1023,
        )
        below.set(xlabel="seconds", ylabel="codebook")
    page.picture("clips", figure, "spectrograms and tokens of example clips")


def printable(text: str, length: int) -> str:
    """Cut a name, UTF-8 or not, to what a picture can show. It may hold `$`, so show it with parse_math off."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
