"""What every benchmark needs: things timed in turn, ratios with their spread, a table, and a file that says where."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megascale.log import Progress

FOLDER = Path("runs/bench")


def in_turn(
    title: str, things: Mapping[str, Callable[[], float]], rounds: int, before: Mapping[str, Callable[[], None]] = {}
) -> dict[str, list[float]]:
    """Run each thing once a round, after one round that is not counted, so that a machine whose speed wanders is the
    same for all. Each returns how much it did; the result is how much of it a second, round by round. `before` is done
    before the thing of its name, and not timed."""
    rates: dict[str, list[float]] = {name: [] for name in things}
    progress = Progress(title, (rounds + 1) * len(things), unit="runs")
    for number in range(rounds + 1):
        for place, (name, thing) in enumerate(things.items(), start=1):
            before.get(name, lambda: None)()
            started = time.perf_counter()
            amount = thing()
            if number:
                rates[name].append(amount / (time.perf_counter() - started))
            progress.update(number * len(things) + place)
    progress.close()
    return rates


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of a ratio taken round by round."""
    ratios = np.array(above) / np.array(below)
    return {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())}


def write(name: str, facts: Mapping[str, Any], packages: Sequence[str]) -> Path:
    """Write `runs/bench/NAME.json`, with the versions and the machine that it holds for."""
    machine = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    content = {**facts, "versions": {package: version(package) for package in packages}, "machine": machine}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
