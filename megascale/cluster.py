"""Ray behind one call; the only file that imports it."""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from megascale import storage
from megascale.errors import ConfigError
from megascale.stopping import StopSignal


def start_ray() -> Any:
    """Join the cluster that the environment names (`ray job submit`, RAY_ADDRESS) or that runs on this machine
    (`ray submit`), or start a local one; return `ray`.

    Raises:
        Stopped: SIGTERM came meanwhile.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CPU-only workers
    with StopSignal() as stop:
        import ray

        # Ray's handler exits from wherever it is called, and Python drops that in some callbacks: the signal is lost
        ray._private.utils.set_sigterm_handler = lambda handler: None
        if not ray.is_initialized():
            # a cluster has its own dashboard; for one job on one machine it is ten more processes
            ray.init(
                logging_level=logging.ERROR,
                include_dashboard=False,
                runtime_env={"worker_process_setup_hook": _enter(os.getcwd())},
            )
        if stop.asked:
            signal.alarm(0)  # by which Ray's core, if it met the signal too, would abort this process 3 s later
        stop.check()
    return ray


def _enter(folder: str) -> Callable[[], None]:
    """Return what makes a worker begin in the job's folder, where its node has it.

    A cluster's workers begin where `ray start` was called, and there a relative URL of the job means something else.
    """

    def enter() -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)

    return enter


def check_stays(url: str, key: str) -> None:
    """Refuse an output that would be deleted: `ray job submit --working-dir` runs a job in Ray's own copy of a folder.

    Raises:
        ConfigError: the job runs in such a copy, and the URL is a relative path.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    in_copy = "working_dir" in submitted.get("runtime_env", {})
    if in_copy and storage.is_local(url) and not storage.local_path(url).is_absolute():
        raise ConfigError(
            f"{key}={url}: lies in Ray's copy of the working directory, which Ray deletes; "
            "name a store's URL, or an absolute path that every node sees"
        )
