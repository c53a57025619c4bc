"""`megascale doctor`: is everything here that a long job needs?"""

import argparse
from collections import Counter
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from megascale import doctor, doctor_services, storage
from megascale.config import has_credentials
from megascale.doctor import Finding
from megascale.errors import ConfigError, Stopped
from megascale.retry import ATTEMPTS


def add_to(commands: Any) -> None:
    """Add `doctor` to the commands of an argument parser."""
    parser = commands.add_parser(
        "doctor",
        help="check an installation before a long job",
        description="Check torch and CUDA, shared memory, disk, ranks (NCCL or gloo) with DeepSpeed, Ray, stores, the "
        "clock, the codec and wandb. One line each: ok, warn (a job runs, less well), FAIL or skip (not looked at), and "
        "after -> what to do. Nothing is left behind.",
        epilog="Exit codes: 0 nothing failed, 2 something did.",
    )
    parser.add_argument(
        "--storage",
        action="append",
        default=[],
        metavar="URL",
        help="a job's output, a folder or prefix: written to, listed, read, deleted from; can be given again",
    )
    parser.add_argument("--endpoint-url", help="S3 endpoint, for stores other than AWS")
    parser.add_argument("--codec", metavar="URL", help="codec.weights to be checked, a path or URL")
    parser.add_argument("--disk", default=".", metavar="FOLDER", help="where runs and caches go (default: here)")
    parser.add_argument(
        "--disk-gb", type=float, default=10.0, metavar="N", help="room they need (default 10: the paper's checkpoints)"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks to start (default: one for each GPU, or 2 on CPUs); 0 starts none"
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="N", help="how long the ranks may take (default 120)"
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if any(has_credentials(url) for url in [*arguments.storage, arguments.codec or "", arguments.endpoint_url or ""]):
        raise ConfigError("URL: has credentials in it; leave them to the store's own chain")
    if arguments.ranks is not None and arguments.ranks < 0:
        raise ConfigError(f"--ranks {arguments.ranks}: is no number of 0 or more")
    storage.configure(storage.StorageConfig(endpoint_url=arguments.endpoint_url))
    return copy_context().run(_check, arguments)  # so that later calls of this process are as patient as ever


def _check(arguments: argparse.Namespace) -> int:
    ATTEMPTS.set(1)
    urls = arguments.storage
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("torch", doctor.check_torch),
        ("compiler", doctor.check_compiler),
        ("shm", doctor.check_shared_memory),
        ("disk", lambda: doctor.check_disk(arguments.disk, arguments.disk_gb)),
        ("tmp", doctor.check_temporary),
        ("ranks", lambda: doctor.check_ranks(arguments.ranks, arguments.seconds)),
        ("ray", doctor.check_ray),
        ("storage", lambda: [doctor_services.check_storage(url) for url in urls] or _NO_STORAGE),
        ("clock", lambda: doctor_services.check_clock(urls)),
        ("codec", lambda: doctor_services.check_codec(arguments.codec)),
        ("wandb", doctor_services.check_wandb),
    ]
    states: Counter[str] = Counter()
    for name, check in checks:
        for finding in _findings(name, check):
            print(finding, flush=True)
            states[finding.state] += 1
    print(", ".join(f"{states[state]} {state}" for state in ("ok", "warn", "FAIL", "skip")), end="; next: ")
    print("mend what FAILs, and run this again" if states["FAIL"] else "the job, with --dry-run first")
    return 2 if states["FAIL"] else 0


_NO_STORAGE = Finding("storage", "skip", "no store was named", "--storage URL")


def _findings(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    try:
        found = check()
    except Stopped:
        raise
    except Exception as failure:  # a broken package raises anything, and the other lines are wanted all the same
        return [Finding(name, "FAIL", f"{type(failure).__name__}: {failure}", "make clean install")]
    return found if isinstance(found, list) else [found]
