"""The whole way in one command: audio, tokens, pretrained encoders, classifiers, a table. It calls the same jobs with the
same recipes as the launch scripts; every stage is finished at most once, so the same command goes on where it stopped.
"""

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console

from megascale import quickstart_report, run_folder, storage
from megascale.config import Section, load_config
from megascale.corpora import CorpusSizes, write_corpora
from megascale.data.index import read_clips, read_manifest
from megascale.downstream import table1
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1 import LabelledTokens
from megascale.downstream.table1_config import BITRATES_KBPS, CellsConfig, Table1Config
from megascale.errors import ConfigError, MegascaleError, QuarantineExceeded, Stopped
from megascale.log import Progress, duration, say
from megascale.ports import free_port
from megascale.storage import StorageConfig
from megascale.table_baselines import score_baselines
from megascale.tasks import finetune
from megascale.tasks.finetune_data import check_clips
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tokenize import job
from megascale.tokenize.plan import TokenizeConfig, codec_url
from megascale.tokenize.sources import SourceConfig, list_recordings

_ROOT = Path(__file__).resolve().parents[1]
SUMMARY = "summary.json"
_LABELLED = ("gtzan", "nsynth", "music_speech")
_FILES_OF_A_CLASS = 5


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
        None,
        description="your own audio; null synthesises a corpus. Folders with 5 or more readable files become classes",
    )
    recipes: RecipesConfig = Field(RecipesConfig(), description="the jobs' recipes")
    corpus: CorpusSizes = Field(CorpusSizes(), description="size of the synthesised corpus")
    overrides: list[str] = Field([], description="key=value for every pretraining run, such as train.steps=50")
    ranks: int | None = Field(None, ge=1, description="DeepSpeed processes; null: 2 where there are 2 cores")
    output: QuickstartOutputConfig = Field(QuickstartOutputConfig(), description="where everything goes")
    seed: int = Field(0, description="of the corpus, the pretraining and the fine-tuning")


def describe_plan(config: QuickstartConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    config = _with_absolute_data(config)
    _check_recipes(config)
    source = f"{_count_own_files(config.data)} files of {config.data}" if config.data else "a synthesised corpus"
    page = _folder(config) / "report.html"
    return f"{source} -> tokens -> pretraining at 1.5 and 12 kbps on {_ranks(config)} ranks -> {page}"


def run(config: QuickstartConfig) -> None:
    """Run every stage.

    Raises:
        QuarantineExceeded: everything is finished, but in one of the sources more clips than `quarantine.max_share`
            could not be tokenised.
        MegascaleError: what the jobs raise.
    """
    started = time.monotonic()
    config = _with_absolute_data(config)
    _check_recipes(config)
    root = _folder(config)
    run_folder.check_config(root, config, "quickstart", ("ranks", "output."))
    finished = run_folder.read_result(root, SUMMARY)
    if finished is not None:
        say(f"{root}: already done; see {root / 'report.html'}")
        _tell_quarantine(finished)
        return
    _stage(1, "audio")
    if config.data:
        say(f"{config.data}: {_count_own_files(config.data)} files")  # what cannot be listed leaves nothing behind
    run_folder.write_config(root, config)
    sources = _own_sources(config.data) if config.data else _synthesise(config, root)
    _stage(2, "tokens: EnCodec on Ray")
    tokens, too_many_quarantined = _tokenise(config, root, sources)
    _stage(3, "pretraining: DeepSpeed, masked tokens, 1.5 and 12 kbps")
    runs = [_pretrain(config, root, tokens["pretrain"], kbps) for kbps in BITRATES_KBPS]
    _stage(4, "fine-tuning: scratch, ft, ft_aug at each bitrate")
    rows, budget = _rows(config, tokens)
    checkpoints = {result["bitrate_kbps"]: result["checkpoint"] for result, _ in runs}
    table: dict[str, Any] = {"cells": [], "summary": []}
    if rows:
        cell = table1.CellJob(finetune.FinetuneConfig, finetune.check, check_clips, finetune.run)
        output, stores = str(root / "table1"), StorageConfig()
        table = table1.train_cells(rows, table1.paper_arms(checkpoints), budget, [config.seed], output, stores, cell)
        table1.write_table(table, output)
    _stage(5, "baselines: logistic regressions on log-mel statistics and on bags of codes")
    found = {row.name: score_baselines(row, [config.seed], BITRATES_KBPS) for row in rows}
    _stage(6, "report")
    summary = quickstart_report.summarise(
        config.data,
        list(config.recipes.model_dump().values()),
        config.seed,
        tokens,
        table,
        budget,
        found,
        [result for result, _ in runs],
        time.monotonic() - started,
        too_many_quarantined,
    )
    page = quickstart_report.write_page(root, tokens, summary, table, runs)
    storage.publish_bytes(str(root / SUMMARY), json.dumps(summary, indent=1).encode())
    if rows:
        width = None if sys.stdout.isatty() else 120  # a log has none, and rich would wrap at 80
        Console(width=width).print(quickstart_report.terminal_table(summary))
    print(summary["verdict"])
    print(f"done in {duration(summary['wall_seconds'])}: {page} and {root / SUMMARY}")
    print(f"next: make quickstart DATA=/path/to/wavs, or python launch/pretrain.py {config.recipes.pretrain} --help")
    _tell_quarantine(summary)


def _with_absolute_data(config: QuickstartConfig) -> QuickstartConfig:
    """Name a local folder by its absolute path, so that it is the same audio however it is spelled, from wherever."""
    if config.data is None or not storage.is_local(config.data):
        return config
    return config.model_copy(update={"data": os.path.abspath(storage.local_path(config.data))})


def _check_recipes(config: QuickstartConfig) -> None:
    for recipe in config.recipes.model_dump().values():
        if not _recipe(recipe).exists():
            raise ConfigError(
                f"quickstart.recipes: {_recipe(recipe)}: no such file; run from a checkout of the project"
            )


def _folder(config: QuickstartConfig) -> Path:
    """Return the output folder; where a quickstart on other audio lies there, one beside it named after this audio."""
    asked = storage.local_path(config.output.url)
    before = run_folder.read_config(asked)
    if before is None or before.get("data") == config.data:
        return asked
    beside = asked.with_name(f"{asked.name}-{Path(config.data).name if config.data else quickstart_report.SYNTHESISED}")
    say(f"{asked} holds a quickstart on other audio; this one goes to {beside}")
    return beside


def _tell_quarantine(summary: dict[str, Any]) -> None:
    message = summary.get("too_many_quarantined")
    if message:
        raise QuarantineExceeded(message)


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
    return {"pretrain": SourceConfig(kind="files", url=data, label_from_folder=True)}


def _count_own_files(data: str) -> int:
    """Count the audio files. Raises StorageError or DataError if there are none."""
    return len(list_recordings(_own_sources(data)["pretrain"])[0])


def _tokenise(
    config: QuickstartConfig, root: Path, sources: dict[str, SourceConfig]
) -> tuple[dict[str, str], str | None]:
    """Tokenise every source with one codec: fitted on the first, reused by the others.

    Returns:
        The token folder of each source, and what is to be told at the end about too many quarantined clips.
    """
    tokens: dict[str, str] = {}
    codec = None
    exceeded: list[str] = []
    for name, source in sources.items():
        tokens[name] = str(root / "tokens" / name)
        values = {f"source.{key}": value for key, value in source.model_dump(mode="json").items()}
        values |= {"output.url": tokens[name], "codec.seed": config.seed}
        overrides = _overrides(values | ({"codec.weights": codec} if codec else {}))
        made = load_config(TokenizeConfig, "tokenize", str(_recipe(config.recipes.tokenize)), overrides)
        try:
            job.run(made)
        except QuarantineExceeded as failure:  # its folder is finished, and the way goes on with what could be read
            say(str(failure))
            exceeded.append(str(failure))
        codec = codec_url(made)
    return tokens, "; ".join(exceeded) or None


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
    command += ["--master_port", str(free_port()), "--log_level", "error"]
    command += [str(_ROOT / "launch" / "pretrain.py"), recipe, *overrides]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    code = _run_group(command, {**os.environ, "OMP_NUM_THREADS": threads})
    result = run_folder.read_result(folder)
    if code != 0 or result is None:
        error = Stopped if code == Stopped.exit_code else MegascaleError
        raise error(f"{folder}: pretraining ended with exit code {code}; run the same command to go on")
    return result, folder


def _run_group(command: list[str], environment: dict[str, str]) -> int:
    """Run a launcher and its ranks; if this process is stopped or killed, so are they, and they have time to save."""
    end_with_us = functools.partial(_end_with_parent, os.getpid())
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_us)
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


def _end_with_parent(parent: int) -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies, even of SIGKILL. (prctl(2))"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before it could be asked for
            os.kill(os.getpid(), signal.SIGTERM)


def _fit_to_corpus(config: PretrainConfig, ranks: int) -> list[str]:
    """Shrink the batch where a small corpus of the user's would not fill it twice an epoch."""
    clips = read_manifest(config.data.url).num_clips * (1 - config.data.valid_share)
    batch = config.train.global_batch
    while batch > ranks and batch * 2 > clips and batch % 2 == 0:
        batch //= 2
    if batch == config.train.global_batch:
        return []
    return [f"train.global_batch={batch}", f"train.micro_batch={max(1, batch // ranks)}"]


def _rows(config: QuickstartConfig, tokens: dict[str, str]) -> tuple[list[LabelledTokens], CellsConfig]:
    overrides = _overrides({f"data.{name}": tokens.get(name, "") for name in _LABELLED})  # own audio has none of them
    recipe = load_config(Table1Config, "table1", str(_recipe(config.recipes.table1)), overrides)
    if config.data is None:
        return table1.rows_of(recipe), recipe.cells
    url = tokens["pretrain"]
    classes, small = _classes_by_folder(url)
    if small:
        kept = ", ".join(f"{name} ({count})" for name, count in small.items())
        say(f"fewer than {_FILES_OF_A_CLASS} readable files, so only pretraining uses them: {kept}")
    if len(classes) < 2:
        say(quickstart_report.NOTHING)
        return [], recipe.cells
    say(f"{len(classes)} classes: " + ", ".join(f"{name} ({count})" for name, count in classes.items()))
    task = TaskConfig(label="class", classes=list(classes), protocol="stratified", valid_share=0.2, test_share=0.2)
    return [LabelledTokens("folders", url, task)], recipe.cells


def _classes_by_folder(url: str) -> tuple[dict[str, int], dict[str, int]]:
    """Count the recordings of which something could be tokenised, by folder: of those that are classes, of the others."""
    folder_of = {clip.recording: str(clip.labels["class"]) for clip in read_clips(url, read_manifest(url), 1)}
    counts = dict(sorted(Counter(folder_of.values()).items()))
    classes = {name: count for name, count in counts.items() if count >= _FILES_OF_A_CLASS}
    return classes, {name: count for name, count in counts.items() if name not in classes}
