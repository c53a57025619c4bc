"""Ray behind one call; the only file that imports it."""

import logging
import os
import signal
from typing import Any

from megascale.stopping import StopSignal


def start_ray() -> Any:
    """Join the cluster that the environment names (`ray job submit`, RAY_ADDRESS), or start a local one; return `ray`.

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
            ray.init(logging_level=logging.ERROR)
        if stop.asked:
            signal.alarm(0)  # by which Ray's core, if it met the signal too, would abort this process 3 s later
        stop.check()
    return ray
