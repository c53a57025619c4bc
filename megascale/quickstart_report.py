"""What a quickstart tells: the summary, the table in the terminal, the page."""

import itertools
import os
import platform
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.table import Table

import megascale
from megascale import report
from megascale.data.index import read_clips, read_manifest
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS, CellsConfig
from megascale.log import duration
from megascale.spectrogram import log_mel
from megascale.table_baselines import LOG_MEL, read_audio, recording_urls

SYNTHESISED = "synthesised"
NOTHING = "nothing was classified: that takes two or more folders with at least 5 readable files each"
_SYNTHETIC = (
    "The audio was synthesised by this project, in the folder layouts of GTZAN, NSynth and GTZAN music/speech. It holds "
    "nothing of those datasets, and scores on it say nothing about them: they show that the whole way works."
)


# ----------------------------------------------------------------------------------------------- summary and table


def summarise(
    data: str | None,
    recipes: Sequence[str],
    seed: int,
    tokens: dict[str, str],
    table: dict[str, Any],
    budget: CellsConfig,
    found: dict[str, Any],
    results: Sequence[dict[str, Any]],
    wall_seconds: float,
    too_many_quarantined: str | None,
) -> dict[str, Any]:
    """Return what `summary.json` holds: scores, baselines, budget, quarantine, and how all of it was made."""
    means = {
        arm: float(np.mean([s["accuracy"] for s in table["summary"] if s["arm"] == arm]))
        for arm in dict.fromkeys(s["arm"] for s in table["summary"])
    }
    ours = {r["bitrate_kbps"]: r["validation"] for r in results}
    manifests = {name: read_manifest(url) for name, url in tokens.items()}
    return {
        "cells": [{**cell, "seed": seed} for cell in table["summary"]],
        "budget": budget.model_dump(mode="json"),  # the same for every cell
        "baselines": found,
        "mean_accuracy": means,
        "verdict": verdict(means, found),
        "pretraining": list(results),
        "above_unigram_q0": {
            f"{kbps:g}": v["valid/acc_q0"] > v["valid/unigram_acc_q0"] if v else None for kbps, v in ours.items()
        },
        "clips": {name: {"stored": m.num_clips, "quarantined": m.num_quarantined} for name, m in manifests.items()},
        "too_many_quarantined": too_many_quarantined,
        "data": data or SYNTHESISED,
        "recipes": list(recipes),
        "seed": seed,
        "wall_seconds": wall_seconds,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "megascale": megascale.__version__},
    }


def verdict(means: dict[str, float], found: dict[str, Any]) -> str:
    """Say in plain words whether pretraining helped, given mean accuracies by arm and baselines by task."""
    if not means:
        return NOTHING
    parts = []
    for arm in ("ft", "ft_aug"):
        gain = 100 * (means[arm] - means["scratch"])
        word = "above" if gain > 0 else "NOT above"
        parts.append(f"{arm} is {word} scratch in the mean ({gain:+.1f} points)")
    log_mel = float(np.mean([b[LOG_MEL]["accuracy"] for b in found.values()]))
    best = max(means.values())
    word = "above" if best > log_mel else "NOT above"
    parts.append(f"the best arm's mean, {100 * best:.1f}%, is {word} the log-mel baseline's {100 * log_mel:.1f}%")
    return "; ".join(parts) + ". One seed: differences of a few points mean nothing."


def terminal_table(summary: dict[str, Any]) -> Table:
    """Return the table that the terminal shows: a row per task and arm, and the baselines below each task."""
    table = Table(title="accuracy % (macro-F1 %)")
    for column in ("dataset", "type", "1.5 kbps", "12 kbps", "n"):
        table.add_column(column, justify="left" if column in ("dataset", "type") else "right")
    found = {(s["task"], s["arm"], s["bitrate_kbps"]): s for s in summary["cells"]}
    for task in dict.fromkeys(s["task"] for s in summary["cells"]):
        for arm in ARMS:
            two = [found[task, arm, kbps] for kbps in BITRATES_KBPS]
            scores = [f"{100 * s['accuracy']:.1f} ({100 * s['macro_f1']:.1f})" for s in two]
            table.add_row(task, arm, *scores, str(two[0]["count"]))
        for name, b in summary["baselines"][task].items():
            scores = [report.baseline_score(b, kbps) for kbps in BITRATES_KBPS]
            table.add_row(task, name, *scores, str(b["count"]))
        table.add_section()
    return table


# --------------------------------------------------------------------------------------------------------- the page


def write_page(
    root: Path,
    tokens: dict[str, str],
    summary: dict[str, Any],
    table: dict[str, Any],
    runs: Sequence[tuple[dict[str, Any], Path]],
) -> str:
    """Write `report.html`. `runs` are result and folder of each pretraining. Returns the page's URL."""
    own = summary["data"] != SYNTHESISED
    page = report.Page("Quickstart: from audio to a fine-tuned classifier", str(root))
    page.text(f"Audio: {summary['data']}" if own else _SYNTHETIC, note=True)
    page.heading("Classification")
    page.text(summary["verdict"][0].upper() + summary["verdict"][1:])
    if table["summary"]:
        if own:
            page.text("Pretraining saw the audio of every file, test files included; it saw no label.", note=True)
        report.add_table(page, table, {}, summary["baselines"])
    page.heading("Pretraining")
    report.add_pretraining(page, runs)
    page.heading("Audio and tokens")
    for name, clips in summary["clips"].items():
        if clips["quarantined"]:
            where = f"{tokens[name]}/quarantine.jsonl tells which and why"
            page.text(f"{name}: {clips['quarantined']} clips could not be read and were left out; {where}.", note=True)
    page.text("Log-mel spectrograms of example clips, and their tokens below: one row a codebook, one column a frame.")
    report.add_clips(page, [_example_clip(name, url) for name, url in itertools.islice(tokens.items(), 4)])
    if table["summary"]:
        page.heading("Confusion matrices")
        report.add_confusions(page, table)
    page.heading("How it was made")
    codec = read_manifest(tokens["pretrain"]).codec
    page.text(
        f"Codec: {codec.name} ({codec.origin}). Seed {summary['seed']}. {duration(summary['wall_seconds'])} on "
        f"{summary['machine']['cores']} cores. Recipes: {', '.join(summary['recipes'])}."
    )
    return page.write()


def _example_clip(name: str, url: str) -> tuple[str, np.ndarray, np.ndarray]:
    manifest = read_manifest(url)
    clip = next(read_clips(url, manifest, manifest.codec.num_codebooks))
    wave_S = read_audio(recording_urls(manifest), clip)
    return f"{name}: {PurePosixPath(clip.source).name}", log_mel(wave_S), clip.codes_QT
