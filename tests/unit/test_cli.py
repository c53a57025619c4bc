"""The command line: exit codes, one-line errors, help that tells every key, and a dry run that writes nothing."""

import dataclasses
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import write_pretrained, write_token_folder, write_tones

from megascale import cli
from megascale.config import Section
from megascale.downstream.table1_config import Table1Config
from megascale.downstream.watch_config import WatchConfig
from megascale.quickstart import QuickstartConfig
from megascale.tasks.finetune import FinetuneConfig
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tokenize.plan import TokenizeConfig

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "tokenize": TokenizeConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "table1": Table1Config,
    "watch": WatchConfig,
    "quickstart": QuickstartConfig,
}
RECIPES = {
    "tokenize": "tokenize/smoke.yaml source.url=audio",
    "pretrain": "pretrain/smoke.yaml data.url=tokens",
    "finetune": "finetune/smoke.yaml data.url=tokens arm=scratch checkpoint=null",
    "table1": "table1/small.yaml data.gtzan=tokens data.nsynth=tokens data.music_speech=tokens "
    "tasks.gtzan.label=class tasks.nsynth.label=class checkpoints.1k5=model-q2 checkpoints.12k=model-q16 "
    "baselines=false",
    "watch": "watch/smoke.yaml run=run tasks.class.url=tokens",
    "quickstart": "quickstart/small.yaml data=audio",
}
jobs = pytest.mark.parametrize("job", SCHEMAS)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], work: Path) -> Iterator[Call]:
    """Run a job in this process, inside `work`; return exit code, stdout, stderr."""

    def run(job: str, *arguments: str) -> tuple[int, str, str]:
        code = getattr(cli, job)(list(arguments))
        return code, *capsys.readouterr()

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds a token folder and some audio."""
    write_token_folder(tmp_path / "tokens", 32, num_codebooks=16)
    write_tones(tmp_path / "audio", 4, seconds=1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")  # of a pretraining run without a checkpoint yet
    for num_codebooks in (2, 16):
        write_pretrained(tmp_path / f"model-q{num_codebooks}", num_codebooks)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder, with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def recipe(job: str) -> list[str]:
    """Arguments that every job takes without complaint."""
    name, *overrides = RECIPES[job].split()
    return [str(ROOT / "configs" / name), *overrides, "output.url=out"]


def script(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def keys_of(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and meaning of every key."""
    for name, field in schema.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        inner = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
        named = "NAME." if typing.get_origin(field.annotation) is dict else ""
        if inner:
            yield from keys_of(inner[0], f"{prefix}{field.alias or name}.{named}")
        else:
            hidden = [o for o in options if dataclasses.is_dataclass(o) or hasattr(o, "model_fields")]
            assert not hidden, f"{prefix}{name}: what has keys must be a Section, or --help lists none of them"
            yield prefix + (field.alias or name), field.description or "no description"


# -------------------------------------------------------------------------------------------------- the real scripts


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("tokenize_audio", [], "ConfigError: tokenize: a config file is needed: "),
        ("pretrain", [*recipe("pretrain"), "optim.lrr=1"], "ConfigError: pretrain.optim.lrr=1: unknown key; did you"),
        ("pretrain", ["--local_rank=0", *recipe("pretrain"), "data.url=gone"], "DataError: gone: no manifest.json; "),
        ("finetune", ["none.yaml", "seed=1"], "ConfigError: none.yaml: cannot read this config: No such file"),
    ],
)
def test_script_tells_a_mistake_in_one_line_exits_2_and_writes_nothing(work, name, arguments, line):
    before = listing(work)
    done = script(name, *arguments, folder=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert listing(work) == before


def test_script_prints_help(work):
    done = script("table1", "--help", folder=work)
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoints.1k5" in done.stdout


def test_script_plans_without_writing_under_a_launcher_that_adds_local_rank(work):
    before = listing(work)
    done = script("tokenize_audio", "--local_rank", "0", *recipe("tokenize"), "--dry-run", folder=work)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 clips in 1 shards -> out\n")
    assert listing(work) == before


# ---------------------------------------------------------------------------------------------- every job, in process


@jobs
def test_help_lists_every_key_with_type_default_and_meaning(call, job):
    code, out, err = call(job, "none.yaml", "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    keys = dict(keys_of(SCHEMAS[job]))
    assert len(keys) >= 9
    for key, meaning in keys.items():
        place = next(i for i, line in enumerate(lines) if line.split()[:1] == [key])
        kind, default = lines[place].split(maxsplit=1)[1].rsplit("default ", maxsplit=1)
        assert kind.strip()
        assert default.strip()
        assert lines[place + 1].strip() == meaning
    assert "75 stopped" in out
    assert "--dry-run" in out


@jobs
def test_no_arguments_is_bad_input(call, job):
    text = f"ConfigError: {job}: a config file is needed: CONFIG.yaml [dotted.key=value ...]; see --help\n"
    assert call(job) == (2, "", text)


def refused(call: Call, work: Path, job: str, *arguments: str) -> str:
    """Run a job that must refuse its input; return its one line."""
    before = listing(work)
    code, out, err = call(job, *recipe(job), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert listing(work) == before
    return err


@jobs
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("outptu.url=x", "outptu={'url': 'x'}: unknown key; did you mean 'output'?"),
        ("output.ulr=x", "output.ulr=x: unknown key; did you mean 'url'?"),
        ("output.url=[1]", "output.url=[1]: "),
        ("--dryrun", "--dryrun: unknown option; there are --help and --dry-run"),
        ("--local_ranks=0", "--local_ranks=0: unknown option"),
        ("again.yaml", "again.yaml: an override reads dotted.key=value"),
    ],
)
def test_mistake_is_one_line_and_nothing_is_written(call, work, job, wrong, text):
    line = refused(call, work, job, wrong)
    assert line.startswith("ConfigError: ")
    assert text in line


@pytest.mark.parametrize(
    ("job", "wrong", "line"),
    [
        ("tokenize", "source.url=gone", "StorageError: gone: no such folder"),
        ("tokenize", "codec.weights=gone.th", "ConfigError: tokenize.codec.weights=gone.th: no such file"),
        ("tokenize", "codec.weights=tokens/manifest.json", "TokenError: tokens/manifest.json: "),
        ("pretrain", "data.bitrate_kbps=24", "DataError: tokens: stored with 16 codebooks"),
        ("pretrain", "train.global_batch=64", "DataError: "),
        ("pretrain", "output.url=s3://bucket/run", "StorageError: s3://bucket/run: a local path is needed here"),
        ("pretrain", "data.bitrate_kbps=12 model.width=36", "ConfigError: pretrain.model.width=36"),
        ("pretrain", "zero.stage=0 zero.precision=bf16", "ConfigError: pretrain.zero: precision=bf16 with stage=0"),
        (
            "pretrain",
            "checkpoint.upload_url=out",
            "ConfigError: pretrain.checkpoint.upload_url=out: in the run's own folder",
        ),
        ("pretrain", "checkpoint.keep_every=0", "ConfigError: pretrain.checkpoint.keep_every=0: "),
        ("finetune", "task.label=mood", "DataError: 0000.wav: has no label 'mood'"),
        ("finetune", "checkpoint=gone", "CheckpointError: gone"),
        ("table1", "checkpoints.1k5=gone", "CheckpointError: gone"),
        ("table1", "checkpoints.12k=model-q2", "ConfigError: finetune.data.bitrate_kbps=12.0: model-q2 was pretrained"),
        ("table1", "data.nsynth=gone", "DataError: gone: no manifest.json"),
        ("table1", "baselines=true", "StorageError: /nowhere: no such folder"),
        ("table1", "cells.finetune.seed=1", "ConfigError: table1.cells: finetune.seed: "),
    ],
)
def test_input_that_cannot_be_used_is_told_before_anything_is_written(call, work, monkeypatch, job, wrong, line):
    monkeypatch.setattr("megascale.tasks.pretrain.init_distributed", lambda: (0, 1))
    assert refused(call, work, job, *wrong.split()).startswith(line)


def test_global_batch_that_the_ranks_cannot_share_is_refused(call, work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = "ConfigError: pretrain.train.global_batch=4: must be a multiple of 3 ranks"
    assert refused(call, work, "pretrain", "train.micro_batch=1").startswith(line)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("data=gone", "StorageError: {work}/gone: no such folder"),
        ("data=tokens", "DataError: {work}/tokens: no audio found"),
        ("recipes.pretrain=gone.yaml", f"ConfigError: quickstart.recipes: {ROOT}/gone.yaml: no such file"),
        (
            "corpus.gtzan_per_genre=0",
            "ConfigError: quickstart.corpus.gtzan_per_genre=0: Input should be greater than 0",
        ),
    ],
)
def test_dry_run_of_a_quickstart_refuses_what_it_cannot_use(call, work, wrong, line):
    assert refused(call, work, "quickstart", "--dry-run", wrong).startswith(line.format(work=work))


def test_dry_run_of_a_quickstart_counts_the_files(call, work):
    assert call("quickstart", "--dry-run", *recipe("quickstart"))[1].startswith(f"4 files of {work}/audio -> tokens")


@jobs
def test_dry_run_prints_the_plan_and_writes_nothing(call, work, job):
    before = listing(work)
    code, out, err = call(job, "--dry-run", *recipe(job))
    assert (code, err) == (0, "")
    assert "-> out" in out
    assert listing(work) == before


@pytest.mark.parametrize("added", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_local_rank_is_left_out_wherever_a_launcher_puts_it(call, added):
    arguments = [*recipe("tokenize"), "--dry-run"]
    plain = call("tokenize", *arguments)
    assert plain[0] == 0
    assert call("tokenize", *added, *arguments) == call("tokenize", *arguments, *added) == plain
