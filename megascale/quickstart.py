"""The whole way in one command: audio, tokens, pretrained encoders, classifiers, a table. It calls the same jobs with the
same recipes as the launch scripts; every stage is finished at most once, so the same command goes on where it stopped.
"""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

import megascale
from megascale import report, run_folder, storage
from megascale.config import Section, load_config
from megascale.corpora import CorpusSizes, write_corpora
from megascale.data.index import Manifest, StoredClip, read_clips, read_manifest
from megascale.downstream import baselines, table1
from megascale.downstream.protocols import TaskConfig, classes_of, split_clips
from megascale.downstream.table1 import LabelledTokens, Table1Config
from megascale.errors import ConfigError, DataError, MegascaleError, Stopped
from megascale.log import Progress, duration, say
from megascale.storage import StorageConfig
from megascale.tasks import finetune
from megascale.tasks.pretrain import PretrainConfig
from megascale.tokenize import audio, job
from megascale.tokenize.plan import TokenizeConfig, codec_url
from megascale.tokenize.sources import SourceConfig, list_recordings

_ROOT = Path(__file__).resolve().parents[1]
SUMMARY = "summary.json"
_LABELLED = ("gtzan", "nsynth", "music_speech")
_SYNTHETIC = (
    "The audio was synthesised by this project, in the folder layouts of GTZAN, NSynth and GTZAN music/speech. It holds "
    "nothing of those datasets, and scores on it say nothing about them: they show that the whole way works."
)


class RecipesConfig(Section):
    """The recipes of the jobs; relative to the checkout."""

    tokenize: str = Field("configs/tokenize/small.yaml", description="of launch/tokenize_audio.py")
    pretrain: str = Field("configs/pretrain/small.yaml", description="of launch/pretrain.py, run at both bitrates")
    table1: str = Field("configs/table1/small.yaml", description="of launch/table1.py")


class QuickstartOutputConfig(Section):
    """Where everything goes."""

    url: str = Field("runs/quickstart", description="local folder")


class QuickstartConfig(Section):
    """Everything `launch/quickstart.py` needs."""

    data: str | None = Field(
        None, description="your own audio; null synthesises a corpus. Folders with 5 or more files each become classes"
    )
    recipes: RecipesConfig = Field(RecipesConfig(), description="the jobs' recipes")
    corpus: CorpusSizes = Field(CorpusSizes(), description="size of the synthesised corpus")
    overrides: list[str] = Field([], description="key=value for every pretraining run, such as train.steps=50")
    ranks: int | None = Field(None, ge=1, description="DeepSpeed processes; null: 2 where there are 2 cores")
    output: QuickstartOutputConfig = Field(QuickstartOutputConfig(), description="where everything goes")
    seed: int = Field(0, description="of the corpus, the pretraining and the fine-tuning")


def describe_plan(config: QuickstartConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    source = config.data or "a synthesised corpus"
    return f"{source} -> tokens -> pretraining at 1.5 and 12 kbps on {_ranks(config)} ranks -> {config.output.url}/report.html"


def run(config: QuickstartConfig) -> None:
    """Run every stage. Raises what the jobs raise; exits like them."""
    started = time.monotonic()
    root = _folder(config)
    for recipe in (config.recipes.tokenize, config.recipes.pretrain, config.recipes.table1):
        if not _recipe(recipe).exists():
            raise ConfigError(
                f"quickstart.recipes: {_recipe(recipe)}: no such file; run from a checkout of the project"
            )
    run_folder.check_config(root, config, "quickstart", ("ranks",))
    if (root / SUMMARY).exists():
        say(f"{root}: already done; see {root / 'report.html'}")
        return
    _stage(1, "audio")
    sources = _own_sources(config.data) if config.data else _synthesise(config, root)
    run_folder.write_config(root, config)
    _stage(2, "tokens: EnCodec on Ray")
    tokens = _tokenise(config, root, sources)
    _stage(3, "pretraining: DeepSpeed, masked tokens, 1.5 and 12 kbps")
    runs = [_pretrain(config, root, tokens["pretrain"], kbps) for kbps in table1.BITRATES_KBPS]
    _stage(4, "fine-tuning: scratch, ft, ft_aug at each bitrate")
    rows, budget = _rows(config, tokens)
    checkpoints = {result["bitrate_kbps"]: result["checkpoint"] for result, _ in runs}
    table: dict[str, Any] = {"cells": [], "summary": []}
    if rows:
        cell = table1.CellJob(finetune.FinetuneConfig, finetune.check, finetune.run)
        output, stores = str(root / "table1"), StorageConfig()
        table = table1.run_cells(rows, checkpoints, budget, [config.seed], output, stores, cell)
    else:
        say("no labels: the files do not lie in two or more folders of at least 5, so there is nothing to classify")
    _stage(5, "baselines: log-mel statistics, logistic regression")
    found = {row.name: _baselines(row, config.seed) for row in rows}
    _stage(6, "report")
    summary = _summarise(config, table, budget, found, runs, time.monotonic() - started)
    page = _write_page(config, root, tokens, summary, table, found, runs)
    storage.publish_bytes(str(root / SUMMARY), json.dumps(summary, indent=1).encode())
    if rows:
        Console().print(_terminal_table(summary))
        print(summary["verdict"])
    print(f"done in {duration(summary['wall_seconds'])}: {page} and {root / SUMMARY}")
    print(f"next: make quickstart DATA=/path/to/wavs, or python launch/pretrain.py {config.recipes.pretrain} --help")


def _folder(config: QuickstartConfig) -> Path:
    """Return the output folder; where a quickstart on other audio lies there, one beside it named after this audio."""
    asked = storage.local_path(config.output.url)
    before = run_folder.read_config(asked)
    if before is None or before.get("data") == config.data:
        return asked
    beside = asked.with_name(f"{asked.name}-{Path(config.data).resolve().name if config.data else 'synthesised'}")
    say(f"{asked} holds a quickstart on other audio; this one goes to {beside}")
    return beside


def _stage(number: int, title: str) -> None:
    say(f"\n[{number}/6] {title}")


def _recipe(path: str) -> Path:
    return _ROOT / path


def _ranks(config: QuickstartConfig) -> int:
    return config.ranks or min(2, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------ audio and tokens


def _synthesise(config: QuickstartConfig, root: Path) -> dict[str, SourceConfig]:
    corpus = root / "corpus"
    progress: list[Progress] = []

    def update(done: int, total: int) -> None:
        if not progress:
            progress.append(Progress("synthesising", total, unit="files"))
        progress[0].update(done)

    write_corpora(corpus, config.corpus, config.seed, os.cpu_count() or 1, update)
    for line in progress:
        line.close()
    sources = {"pretrain": SourceConfig(kind="files", url=str(corpus / "pretrain"))}
    for kind in _LABELLED:
        sources[kind] = SourceConfig.model_validate({"kind": kind, "url": str(corpus / kind)})
    return sources


def _own_sources(data: str) -> dict[str, SourceConfig]:
    recordings, _ = list_recordings(SourceConfig(kind="files", url=data))
    folders = Counter(PurePosixPath(r.source).parent.name for r in recordings)
    labelled = len(folders) >= 2 and min(folders.values()) >= 5
    say(f"{data}: {len(recordings)} files" + (f", {len(folders)} classes by folder" if labelled else ""))
    return {"pretrain": SourceConfig(kind="files", url=data, label_from_folder=labelled)}


def _tokenise(config: QuickstartConfig, root: Path, sources: dict[str, SourceConfig]) -> dict[str, str]:
    """Tokenise every source with one codec: fitted on the first, reused by the others."""
    tokens: dict[str, str] = {}
    codec = None
    for name, source in sources.items():
        tokens[name] = str(root / "tokens" / name)
        values = {f"source.{key}": value for key, value in source.model_dump(mode="json").items()}
        values |= {"output.url": tokens[name], "codec.seed": config.seed}
        overrides = _overrides(values | ({"codec.weights": codec} if codec else {}))
        made = load_config(TokenizeConfig, "tokenize", str(_recipe(config.recipes.tokenize)), overrides)
        job.run(made)
        codec = codec_url(made)
    return tokens


def _overrides(values: dict[str, Any]) -> list[str]:
    """Spell keys and values as dotted overrides; as JSON, so that no path is taken for YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


# ------------------------------------------------------------------------------------------------------- training


def _pretrain(config: QuickstartConfig, root: Path, tokens: str, kbps: float) -> tuple[dict[str, Any], Path]:
    """Run launch/pretrain.py under the deepspeed launcher. Returns its result and its folder."""
    folder = root / f"pretrain-{kbps:g}kbps"
    ranks = _ranks(config)
    recipe = str(_recipe(config.recipes.pretrain))
    values = {"data.url": tokens, "data.bitrate_kbps": kbps, "output.url": str(folder), "seed": config.seed}
    overrides = _overrides(values) + config.overrides
    overrides += _fit_to_corpus(load_config(PretrainConfig, "pretrain", recipe, overrides), ranks)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    command += ["--master_port", str(_free_port()), "--log_level", "error"]
    command += [str(_ROOT / "launch" / "pretrain.py"), recipe, *overrides]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    code = _run_group(command, {**os.environ, "OMP_NUM_THREADS": threads})
    result = run_folder.read_result(folder)
    if code != 0 or result is None:
        error = Stopped if code == Stopped.exit_code else MegascaleError
        raise error(f"{folder}: pretraining ended with exit code {code}; run the same command to go on")
    return result, folder


def _run_group(command: list[str], environment: dict[str, str]) -> int:
    """Run a launcher and its ranks; if this process is stopped, so are they, and they have time to save."""
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return launcher.wait()
    except BaseException:
        # the launcher alone would leave its ranks behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGTERM)
            for _ in range(600):
                launcher.poll()
                os.killpg(launcher.pid, 0)
                time.sleep(0.1)
            os.killpg(launcher.pid, signal.SIGKILL)
        raise


def _fit_to_corpus(config: PretrainConfig, ranks: int) -> list[str]:
    """Shrink the batch where a small corpus of the user's would not fill it twice an epoch."""
    clips = read_manifest(config.data.url).num_clips * (1 - config.data.valid_share)
    batch = config.train.global_batch
    while batch > ranks and batch * 2 > clips and batch % 2 == 0:
        batch //= 2
    if batch == config.train.global_batch:
        return []
    return [f"train.global_batch={batch}", f"train.micro_batch={max(1, batch // ranks)}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rows(config: QuickstartConfig, tokens: dict[str, str]) -> tuple[list[LabelledTokens], table1.CellsConfig]:
    overrides = _overrides({f"data.{name}": tokens.get(name, "") for name in _LABELLED})  # own audio has none of them
    recipe = load_config(Table1Config, "table1", str(_recipe(config.recipes.table1)), overrides)
    if config.data is None:
        return table1.rows_of(recipe), recipe.cells
    manifest = read_manifest(tokens["pretrain"])
    if not manifest.source["label_from_folder"]:
        return [], recipe.cells
    task = TaskConfig(label="class", protocol="stratified", valid_share=0.2, test_share=0.2)
    return [LabelledTokens("folders", tokens["pretrain"], task)], recipe.cells


def _baselines(row: LabelledTokens, seed: int) -> dict[str, Any]:
    """Score a log-mel logistic regression, and the most frequent class, on the same split as the cells."""
    manifest = read_manifest(row.url)
    clips = list(read_clips(row.url, manifest, 1))
    classes, splits = classes_of(clips, row.task.label), split_clips(clips, row.task, seed)
    url_of = _recording_urls(manifest)
    features: dict[str, np.ndarray] = {}
    targets: dict[str, np.ndarray] = {}
    progress = Progress(f"log-mel, {row.name}", len(clips), unit="clips")
    done = 0
    for split, members in splits.items():
        by_recording = {clips[i].recording: clips[i] for i in members}
        vectors = []
        for clip in by_recording.values():
            vectors.append(baselines.log_mel_statistics(audio.read_clip(url_of[clip.source])))
            done += 1
            progress.update(done)
        features[split] = np.stack(vectors)
        targets[split] = np.array([classes.index(str(c.labels[row.task.label])) for c in by_recording.values()])
    log_mel = baselines.logistic_regression(features, targets, classes)
    most = np.bincount(targets["train"]).argmax()
    chance = baselines.score(targets["test"], np.full_like(targets["test"], most), classes)
    return {"log-mel logistic regression": log_mel, "chance": chance}


def _recording_urls(manifest: Manifest) -> dict[str, str]:
    recordings, _ = list_recordings(SourceConfig.model_validate(manifest.source))
    return {recording.source: recording.url for recording in recordings}


# --------------------------------------------------------------------------------------------------- what is told


def _summarise(
    config: QuickstartConfig,
    table: dict[str, Any],
    budget: table1.CellsConfig,
    found: dict[str, Any],
    runs: list[tuple[dict[str, Any], Path]],
    wall_seconds: float,
) -> dict[str, Any]:
    means = {
        arm: float(np.mean([s["accuracy"] for s in table["summary"] if s["arm"] == arm]))
        for arm in dict.fromkeys(s["arm"] for s in table["summary"])
    }
    ours = {r["bitrate_kbps"]: r["validation"] for r, _ in runs}
    return {
        "cells": [{**cell, "seed": config.seed} for cell in table["summary"]],
        "budget": budget.model_dump(mode="json"),  # the same for every cell
        "baselines": found,
        "mean_accuracy": means,
        "verdict": _verdict(means, found),
        "pretraining": [result for result, _ in runs],
        "above_unigram_q0": {
            f"{kbps:g}": v["valid/acc_q0"] > v["valid/unigram_acc_q0"] if v else None for kbps, v in ours.items()
        },
        "data": config.data or "synthesised",
        "seed": config.seed,
        "wall_seconds": wall_seconds,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "megascale": megascale.__version__},
    }


def _verdict(means: dict[str, float], found: dict[str, Any]) -> str:
    """Say in plain words whether pretraining helped."""
    if not means:
        return "nothing was classified"
    parts = []
    for arm in ("ft", "ft_aug"):
        gain = 100 * (means[arm] - means["scratch"])
        word = "above" if gain > 0 else "NOT above"
        parts.append(f"{arm} is {word} scratch in the mean ({gain:+.1f} points)")
    log_mel = float(np.mean([b["log-mel logistic regression"]["accuracy"] for b in found.values()]))
    best = 100 * max(means.values())
    word = "above" if best > 100 * log_mel else "below"
    parts.append(f"the best arm's mean, {best:.1f}%, is {word} the log-mel baseline's {100 * log_mel:.1f}%")
    return "; ".join(parts) + ". One seed: differences of a few points mean nothing."


def _terminal_table(summary: dict[str, Any]) -> Table:
    table = Table(title="accuracy % (macro-F1 %)")
    for column, justify in (
        ("dataset", "left"),
        ("type", "left"),
        ("1.5 kbps", "right"),
        ("12 kbps", "right"),
        ("n", "right"),
    ):
        table.add_column(column, justify="right" if justify == "right" else "left")
    found = {(s["task"], s["arm"], s["bitrate_kbps"]): s for s in summary["cells"]}
    for task in dict.fromkeys(s["task"] for s in summary["cells"]):
        for arm in table1.ARMS:
            two = [found[task, arm, kbps] for kbps in table1.BITRATES_KBPS]
            scores = [f"{100 * s['accuracy']:.1f} ({100 * s['macro_f1']:.1f})" for s in two]
            table.add_row(task, arm, *scores, str(two[0]["count"]))
        for name, b in summary["baselines"][task].items():
            table.add_row(task, name, f"{100 * b['accuracy']:.1f} ({100 * b['macro_f1']:.1f})", "", str(b["count"]))
        table.add_section()
    return table


def _write_page(
    config: QuickstartConfig,
    root: Path,
    tokens: dict[str, str],
    summary: dict[str, Any],
    table: dict[str, Any],
    found: dict[str, Any],
    runs: list[tuple[dict[str, Any], Path]],
) -> Path:
    page = report.Page("Quickstart: from audio to a fine-tuned classifier", root)
    page.text(_SYNTHETIC if config.data is None else f"Audio: {config.data}", note=True)
    if table["summary"]:
        page.heading("Classification")
        page.text(summary["verdict"][0].upper() + summary["verdict"][1:])
        if config.data is not None:
            page.text("Pretraining saw the audio of every file, test files included; it saw no label.", note=True)
        report.add_table(page, table, {}, found)
    page.heading("Pretraining")
    report.add_pretraining(page, runs)
    page.heading("Audio and tokens")
    page.text("Log-mel spectrograms of example clips, and their tokens below: one row a codebook, one column a frame.")
    report.add_clips(page, [clip for name in tokens for clip in _example_clips(name, tokens[name])][:4])
    if table["summary"]:
        page.heading("Confusion matrices")
        report.add_confusions(page, table)
    page.heading("How it was made")
    codec = read_manifest(tokens["pretrain"]).codec
    page.text(
        f"Codec: {codec.name} ({codec.origin}). Seed {config.seed}. {duration(summary['wall_seconds'])} on "
        f"{os.cpu_count()} cores. Recipes: {config.recipes.tokenize}, {config.recipes.pretrain}, {config.recipes.table1}."
    )
    return page.write()


def _example_clips(name: str, url: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    manifest = read_manifest(url)
    clip: StoredClip = next(read_clips(url, manifest, manifest.codec.num_codebooks))
    recording = _recording_urls(manifest).get(clip.source)
    if recording is None:
        raise DataError(f"{url}: {clip.source} is no longer in {manifest.source['url']}")
    seconds = clip.codes_QT.shape[1] / 75
    wave = audio.read_clip(recording)[: round(seconds * 24_000)]
    return [(f"{name}: {PurePosixPath(clip.source).name}", baselines.log_mel(wave), clip.codes_QT)]
