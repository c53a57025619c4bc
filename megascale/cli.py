"""The commands: read the config, run the job, end with the exit code that says how it went.

A mistake of the user's is one line on stderr; anything else is a fault of the code and keeps its traceback.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megascale.config import S, describe_keys, load_config
from megascale.errors import ConfigError, MegascaleError, QuarantineExceeded
from megascale.log import local_rank, rank, say
from megascale.stopping import ignore_sigterm, note_signals, stop_on_signal

_RANKS_CODES = "MEGASCALE_EXIT_CODES"  # names a folder
_EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input, 3 finished with too many clips quarantined, 4 a loss or gradient is not finite, "
    "75 stopped by SIGTERM after saving."
)


def tokenize(argv: Sequence[str] | None = None) -> int:
    """Audio to token shards."""
    note_signals()
    from megascale.tokenize import job, plan

    def write_page(config: plan.TokenizeConfig) -> None:
        from megascale import tokenize_report  # Matplotlib, which takes a second

        tokenize_report.write_page(config)

    def run(config: plan.TokenizeConfig) -> None:
        try:
            job.run(config)
        except QuarantineExceeded:  # finished all the same, and the page tells why
            write_page(config)
            raise
        write_page(config)

    return _main("tokenize", plan.TokenizeConfig, run, plan.describe_plan, argv)


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Token shards to a pretrained encoder."""
    note_signals()
    from megascale.tasks import pretrain as task

    def run(config: task.PretrainConfig) -> None:
        result = task.run(config)
        if rank() == 0:
            from megascale import report  # Matplotlib, which takes a second

            report.write_pretrain_report(config.output.url, result)

    return _main("pretrain", task.PretrainConfig, run, task.describe_plan, argv, ended=_note_end)


def finetune(argv: Sequence[str] | None = None) -> int:
    """A pretrained encoder, or new weights, to a classifier and its scores."""
    note_signals()
    from megascale.tasks import finetune as task

    return _main("finetune", task.FinetuneConfig, task.run, task.describe_plan, argv)


def table1(argv: Sequence[str] | None = None) -> int:
    """Every task, arm and bitrate of the paper's Table 1."""
    note_signals()
    from megascale.downstream import table1 as job
    from megascale.downstream.pool import CellJob
    from megascale.downstream.table import PAPER
    from megascale.table_baselines import check_recordings, score_baselines
    from megascale.table_embeddings import embedding_maps
    from megascale.table_page import write_table1_report
    from megascale.tasks import finetune as task
    from megascale.tasks.finetune_data import check_clips

    cell = CellJob(task.FinetuneConfig, task.check, check_clips, task.run)
    baselines = job.BaselineJob(check_recordings, score_baselines)

    def run(config: job.Table1Config) -> None:
        def maps() -> list[tuple[Any, ...]]:
            if not config.map_recordings:
                return []
            found = embedding_maps(job.rows_of(config), job.checkpoints_of(config), config.map_recordings)
            return [(each.title, each.points_R2, each.classes) for each in found]

        write_table1_report(config.output.url, job.run(config, cell, baselines), PAPER, maps)

    return _main("table1", job.Table1Config, run, lambda config: job.describe_plan(config, cell, baselines), argv)


def watch(argv: Sequence[str] | None = None) -> int:
    """Downstream accuracy over the course of a pretraining run, while it goes on."""
    note_signals()
    from megascale import watch_page
    from megascale.downstream import watch as job
    from megascale.downstream.pool import CellJob
    from megascale.downstream.watch_config import WatchConfig
    from megascale.tasks import finetune as task
    from megascale.tasks.finetune_data import check_clips

    cell = CellJob(task.FinetuneConfig, task.check, check_clips, task.run)

    def run(config: WatchConfig) -> None:
        curve = job.run(config, cell, lambda curve: watch_page.write_watch_report(config.output.url, curve))
        steps = len({point["step"] for point in curve["points"]} - {None})
        say(f"{steps} checkpoints evaluated -> {config.output.url}/{job.CURVE}, {config.output.url}/report.html")

    return _main("watch", WatchConfig, run, lambda config: job.describe_plan(config, cell), argv)


def predict(argv: Sequence[str] | None = None) -> int:
    """A model and compressed audio to labels and embeddings; its arguments are no config's."""
    note_signals()
    from megascale import predict_command

    _quiet_libraries()
    try:
        stop_on_signal()
        return predict_command.run(argv)
    except MegascaleError as failure:
        _tell(failure)
        return failure.exit_code


def quickstart(argv: Sequence[str] | None = None) -> int:
    """The whole way on a small corpus, made here or your own."""
    note_signals()
    from megascale import quickstart as job

    return _main("quickstart", job.QuickstartConfig, job.run, job.describe_plan, argv)


def _main(
    job: str,
    schema: type[S],
    run: Callable[[S], Any],
    describe: Callable[[S], str],
    argv: Sequence[str] | None,
    ended: Callable[[int, str], None] = lambda exit_code, failure: None,
) -> int:
    _quiet_libraries()
    try:
        arguments = _without_local_rank(sys.argv[1:] if argv is None else argv)
        if "-h" in arguments or "--help" in arguments:
            print(_usage(job, schema))
            return 0
        unknown = [a for a in arguments if a.startswith("-") and a != "--dry-run"]
        if unknown:
            raise ConfigError(f"{unknown[0]}: unknown option; there are --help and --dry-run")
        rest = [a for a in arguments if a != "--dry-run"]
        if not rest:
            raise ConfigError(f"{job}: a config file is needed: CONFIG.yaml [dotted.key=value ...]; see --help")
        # a folder's name may hold a `=`, as in sweeps/lr=3/config.yaml
        path = rest.pop(0) if "=" not in rest[0] or Path(rest[0]).is_file() else None
        config = load_config(schema, job, path, rest)
        stop_on_signal()
        if "--dry-run" in arguments:
            plan = describe(config)
            if rank() == 0:
                print(plan)
        else:
            run(config)
        ended(0, "")
        return 0
    except MegascaleError as failure:
        ignore_sigterm()  # a launcher that sees one rank end sends it to the others, and it would change their code
        _tell(failure)
        ended(failure.exit_code, type(failure).__name__)
        return failure.exit_code


def _note_end(exit_code: int, failure: str) -> None:
    """Leave this rank's exit code, and the name of what it ended with, in the folder of MEGASCALE_EXIT_CODES, if it is set.

    Launchers end with a code of their own, so who starts them looks there. A rank that left none was killed or crashed.
    """
    if _RANKS_CODES in os.environ:
        folder = Path(os.environ[_RANKS_CODES])
        with contextlib.suppress(OSError):  # a full disk, say: a code that is missing there never says that all is well
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{rank():05d}").write_text(f"{exit_code} {failure}".rstrip() + "\n")


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Leave out --local_rank=N or --local_rank N, which launchers add; LOCAL_RANK in the environment says the same."""
    kept: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, _ = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(argument)
        elif not equals:
            next(waiting, None)
    return kept


def _tell(failure: MegascaleError) -> None:
    """Print the error as one line: from rank 0, and from a rank that may be the only one to have met it.

    Before the ranks have joined, what one of a machine meets (no tokens there, say) the others of that machine meet, too,
    unless it is about a GPU.
    """
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank() == 0 or failure.of_own_device or (not failure.on_every_rank and (joined or local_rank() == 0)):
        where = f"[rank {rank()}] " if rank() else ""
        print(f"{where}{type(failure).__name__}: {failure}", file=sys.stderr, flush=True)


def _usage(job: str, schema: type[S]) -> str:
    return (
        f"{job}: CONFIG.yaml [dotted.key=value ...] [--dry-run]\n\n"
        f"  --dry-run  resolve, validate, print the plan, write nothing\n\n{_EXIT_CODES}\n\n"
        f"Keys of the config:\n{describe_keys(schema)}"
    )


def _quiet_libraries() -> None:
    # each of these is about the inside of a dependency; our own warnings go through log.say
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*weight_norm.*")
    warnings.filterwarnings("ignore", message=".*pynvml.*")
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
