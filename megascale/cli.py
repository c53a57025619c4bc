"""The commands: read the config, run the job, end with the exit code that says how it went.

Exit codes: 0 done, 2 bad input, 3 finished with too many clips quarantined, 75 stopped by SIGTERM after saving.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from megascale.config import S, describe_keys, load_config
from megascale.errors import ConfigError, MegascaleError
from megascale.log import rank


def tokenize(argv: Sequence[str] | None = None) -> int:
    """Audio to token shards."""
    from megascale.tokenize import job

    return _main("tokenize", job.TokenizeConfig, job.run, job.describe_plan, argv)


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Token shards to a pretrained encoder."""
    from megascale import report
    from megascale.tasks import pretrain as task

    def run(config: task.PretrainConfig) -> None:
        result = task.run(config)
        if rank() == 0:
            report.write_pretrain_report(config.output.url, result)

    return _main("pretrain", task.PretrainConfig, run, task.describe_plan, argv)


def finetune(argv: Sequence[str] | None = None) -> int:
    """A pretrained encoder, or new weights, to a classifier and its scores."""
    from megascale.tasks import finetune as task

    return _main("finetune", task.FinetuneConfig, task.run, task.describe_plan, argv)


def table1(argv: Sequence[str] | None = None) -> int:
    """Every task, arm and bitrate of the paper's Table 1."""
    from megascale import report
    from megascale.downstream import table1 as job
    from megascale.tasks.finetune import FinetuneConfig
    from megascale.tasks.finetune import run as finetune_run

    def run(config: job.Table1Config) -> None:
        table = job.run(config, FinetuneConfig, finetune_run)
        report.write_table1_report(config.output.url, table, job.PAPER)

    return _main("table1", job.Table1Config, run, job.describe_plan, argv)


def quickstart(argv: Sequence[str] | None = None) -> int:
    """The whole way on a small corpus, made here or your own."""
    from megascale import quickstart as job

    return _main("quickstart", job.QuickstartConfig, job.run, job.describe_plan, argv)


def _main(
    job: str, schema: type[S], run: Callable[[S], Any], describe: Callable[[S], str], argv: Sequence[str] | None
) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        # the deepspeed launcher adds --local_rank=N; LOCAL_RANK in the environment says the same
        arguments = [a for a in arguments if not a.startswith("--local_rank") and not a.startswith("--local-rank")]
        if "-h" in arguments or "--help" in arguments:
            print(_usage(job, schema, run))
            return 0
        flags = [a for a in arguments if a.startswith("-")]
        if set(flags) - {"--dry-run"}:
            raise ConfigError(f"{(set(flags) - {'--dry-run'}).pop()}: unknown option; there are --help and --dry-run")
        rest = [a for a in arguments if not a.startswith("-")]
        path = rest.pop(0) if rest and "=" not in rest[0] else None
        if path is None and not rest:
            raise ConfigError(f"{job}: a config file is needed: CONFIG.yaml [dotted.key=value ...]; see --help")
        config = load_config(schema, job, path, rest)
        if flags:
            print(describe(config))
        else:
            run(config)
        return 0
    except MegascaleError as failure:
        if rank() == 0:
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code


def _usage(job: str, schema: type[S], run: Callable[[S], Any]) -> str:
    exits = (__doc__ or "").splitlines()[2]
    return (
        f"{job}: CONFIG.yaml [dotted.key=value ...] [--dry-run]\n\n"
        f"  --dry-run  resolve, validate, print the plan, write nothing\n\n{exits}\n\n"
        f"Keys of the config:\n{describe_keys(schema)}"
    )


def _quiet_libraries() -> None:
    # each of these is about the inside of a dependency; our own warnings go through log.say
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*weight_norm.*")
    warnings.filterwarnings("ignore", message=".*pynvml.*")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
