"""Downstream accuracy over the course of pretraining: while a run goes on, every Nth of its checkpoints is fine-tuned and
scored, beside classifiers that were trained from scratch.

A checkpoint's model is copied as soon as it is seen, so that it may be pruned while its classifiers wait for a GPU; the copy
goes when all of them are trained.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megascale import run_folder, storage
from megascale.cluster import check_stays
from megascale.config import validate
from megascale.downstream.intervals import summarise
from megascale.downstream.pool import CellJob, Pool
from megascale.downstream.watch_config import WatchConfig
from megascale.errors import ConfigError, MegascaleError
from megascale.log import say
from megascale.model.config import ModelConfig
from megascale.stopping import StopSignal
from megascale.tokens import KBPS_PER_CODEBOOK
from megascale.train.checkpoint import read_model, write_model
from megascale.train.manifest import CHECKPOINTS, list_checkpoints

CURVE = "watch.json"
_COPIES = "models"
SCRATCH = -1  # the step of classifiers that start from new weights

Key = tuple[int, str, int]  # step, task, seed
Curve = dict[str, Any]


def describe_plan(config: WatchConfig, job: CellJob) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    storage.configure(config.storage)
    if not storage.exists(storage.join(config.run, run_folder.CONFIG)):
        raise ConfigError(
            f"watch.run={config.run}: no pretraining run there: {run_folder.CONFIG} is missing; start it first"
        )
    steps = _committed(config)
    if not steps and _is_over(config):
        raise _nothing_to_watch(config)
    for url in list(steps.values())[:1]:
        _check(config, url, job)
    seeds = len(config.seeds)
    return (
        f"{config.run}: {len(steps)} checkpoints so far; {len(config.tasks)} tasks x {seeds} seeds for each, and from scratch "
        f"-> {config.output.url}"
    )


def run(config: WatchConfig, job: CellJob, report: Callable[[Curve], None]) -> Curve:
    """Evaluate checkpoints as they come; finished classifiers are not trained again, and a finished curve is not drawn again.

    Args:
        config: the job.
        job: trains one classifier.
        report: told the curve whenever it grew.

    Returns:
        The curve, as `watch.json` holds it.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, or a classifier could not be trained.
        Stopped: SIGTERM came; finished classifiers stay.
    """
    storage.configure(config.storage)
    check_stays(config.output.url, "watch.output.url")
    path = storage.local_path(config.output.url)
    run_folder.check_config(path, config, "watch", ("storage.", "poll_seconds", "follow", "gpus_each"))
    finished = _finished(config, path)
    if finished is not None:
        say(f"{path / CURVE}: already done")
        return finished
    describe_plan(config, job)
    with run_folder.lock(path):
        run_folder.write_config(path, config)
        with StopSignal() as stop, Pool[Key](job, config.gpus_each) as pool:
            curve = _Watch(config, path, job, report, pool, stop).follow()
    if not curve["points"]:
        raise _nothing_to_watch(config)
    return curve


def _nothing_to_watch(config: WatchConfig) -> ConfigError:
    return ConfigError(f"watch.run={config.run}: has no checkpoint whose step is a multiple of every={config.every}")


@dataclass
class _Watch:
    config: WatchConfig
    path: Path
    job: CellJob
    report: Callable[[Curve], None]
    pool: Pool[Key]
    stop: StopSignal

    def __post_init__(self) -> None:
        self._results: dict[Key, dict[str, Any]] = {}
        self._known: set[int] = set()

    def follow(self) -> Curve:
        while True:
            over = _is_over(self.config)
            grew = self._begin_new()  # after that, so that a run's last checkpoint is seen
            grew |= self._collect()
            if grew:
                self._write()
            if over and not self.pool:
                return self._curve()
            self._pause()

    def _begin_new(self) -> bool:
        """Start the classifiers of checkpoints that were not there before; return whether finished ones were found."""
        grew = SCRATCH not in self._known and self._take_finished(SCRATCH)
        found = dict.fromkeys((*_copied(self.path), *_evaluated(self.path)), "") | _committed(self.config)
        for step, url in sorted(found.items()):
            if step in self._known:
                continue
            if SCRATCH in self._known and self._take_finished(step):
                grew = True
                continue
            copy = _copy_of(self.path, step)
            try:
                _copy_model(url, copy)
            except MegascaleError:
                if step in _committed(self.config):
                    raise
                say(
                    f"{url}: was pruned before it could be read; a larger checkpoint.keep_last, or keep_every, keeps it"
                )
                continue
            _check(self.config, str(copy), self.job)
            for each in (step,) if SCRATCH in self._known else (SCRATCH, step):
                self._known.add(each)
                grew |= self._begin(each, copy)
            self._drop_copy(step)
        return grew

    def _take_finished(self, step: int) -> bool:
        """Take the results of a step whose classifiers were all trained; their checkpoint is not needed any more."""
        found = {
            key: run_folder.read_result(storage.local_path(_run_url(self.config, *key))) for key in self._keys(step)
        }
        whole = {key: result for key, result in found.items() if result is not None}
        if len(whole) < len(found):
            return False
        self._results |= whole
        self._known.add(step)
        self._drop_copy(step)
        return True

    def _keys(self, step: int) -> list[Key]:
        return list(itertools.product((step,), self.config.tasks, self.config.seeds))

    def _drop_copy(self, step: int) -> None:
        """Delete a checkpoint's copy, if every classifier of it is trained."""
        if self._results.keys() >= set(self._keys(step)):
            shutil.rmtree(_copy_of(self.path, step), ignore_errors=True)

    def _begin(self, step: int, copy: Path) -> bool:
        found = False
        for config, key in _configs(self.config, step, str(copy), self.job):
            folder = storage.local_path(config.output.url)
            run_folder.check_config(folder, config, "finetune", ("storage.",))
            finished = run_folder.read_result(folder)
            if finished is None:
                self.pool.begin(key, config)
            else:
                self._results[key], found = finished, True
        return found

    def _collect(self) -> bool:
        finished = self.pool.take()
        for (step, task, seed), result in finished.items():
            what = "from scratch" if step == SCRATCH else f"step {step}"
            say(f"{what}, {task}, seed {seed}: accuracy {result['accuracy']:.3f}")
        self._results |= finished
        for step in {step for step, _, _ in finished} - {SCRATCH}:
            self._drop_copy(step)
        return bool(finished)

    def _pause(self) -> None:
        until = time.monotonic() + self.config.poll_seconds
        while time.monotonic() < until:
            self.stop.check()
            if self.pool.wait(0.5):
                return
            if not self.pool:
                time.sleep(0.5)

    def _curve(self) -> Curve:
        points = []
        for step, task in sorted({(step, task) for step, task, _ in self._results}):
            found = [r for (s, t, _), r in sorted(self._results.items()) if (s, t) == (step, task)]
            point = {"step": None if step == SCRATCH else step, "task": task, "seeds": [r["seed"] for r in found]}
            points.append(point | summarise(found))
        return {"run": self.config.run, "arm": self.config.arm, "points": points, "waiting": len(self.pool)}

    def _write(self) -> None:
        curve = self._curve()
        self.report(curve)
        # last: it says that all is done, once nothing waits
        storage.publish_bytes(str(self.path / CURVE), json.dumps(curve, indent=1).encode())


def _finished(config: WatchConfig, path: Path) -> Curve | None:
    """Return the curve if nothing can be added to it: the run is over, and every classifier of it is there."""
    curve = run_folder.read_result(path, CURVE)
    if curve is None or curve["waiting"] or not _is_over(config):
        return None
    steps = {SCRATCH, *_committed(config), *_copied(path), *_evaluated(path)}
    if {SCRATCH if point["step"] is None else point["step"] for point in curve["points"]} != steps:
        return None
    runs = [_run_url(config, *key) for key in itertools.product(steps, config.tasks, config.seeds)]
    return curve if all(storage.exists(storage.join(url, run_folder.RESULT)) for url in runs) else None


def _is_over(config: WatchConfig) -> bool:
    return not config.follow or storage.exists(storage.join(config.run, run_folder.RESULT))


def _run_url(config: WatchConfig, step: int, task: str, seed: int) -> str:
    name = "scratch" if step == SCRATCH else f"step-{step:08d}"
    return storage.join(config.output.url, "runs", f"{name}-{task}-seed{seed}")


def _copied(path: Path) -> list[int]:
    """Return the steps whose models an earlier start copied; their checkpoints may be pruned by now."""
    return sorted(int(copy.parent.name) for copy in path.glob(f"{_COPIES}/*/config.json"))


def _evaluated(path: Path) -> set[int]:
    """Return the steps of which a classifier is trained."""
    return {int(result.parent.name.split("-")[1]) for result in path.glob(f"runs/step-*/{run_folder.RESULT}")}


def _copy_of(path: Path, step: int) -> Path:
    return path / _COPIES / f"{step:08d}"  # no checkpoint, and not named like one


def _committed(config: WatchConfig) -> dict[int, str]:
    """Return the URLs of the run's checkpoints that are to be evaluated, by step."""
    listed = list_checkpoints(storage.join(config.run, CHECKPOINTS))
    return {each.step: each.url for each in listed if each.manifest is not None and each.step % config.every == 0}


def _copy_model(url: str, folder: Path) -> None:
    """Copy a checkpoint's verified model; `config.json`, written last, says that the copy is whole."""
    if not (folder / "config.json").exists():
        write_model(folder, *read_model(url))


def _configs(config: WatchConfig, step: int, checkpoint: str, job: CellJob) -> list[tuple[Any, Key]]:
    """Return the configs of one checkpoint's classifiers, or of those from scratch."""
    _, facts = read_model(checkpoint, keep=True)
    configs = []
    for task, labelled in config.tasks.items():
        for seed in config.seeds:
            tree = config.finetune | {
                "data": {"url": labelled.url, "bitrate_kbps": facts["num_codebooks"] * KBPS_PER_CODEBOOK},
                "task": labelled.task.model_dump(),
                "arm": "scratch" if step == SCRATCH else config.arm,
                "checkpoint": None if step == SCRATCH else checkpoint,
                "model": ModelConfig(**facts["model"]).model_dump(),
                "output": {"url": _run_url(config, step, task, seed), "save_model": False},
                "storage": config.storage.model_dump(),
                "seed": seed,
            }
            configs.append((validate(job.schema, "watch.finetune", tree), (step, task, seed)))
    return configs


def _check(config: WatchConfig, checkpoint: str, job: CellJob) -> None:
    for step in (SCRATCH, 0):
        for each, _ in _configs(config, step, checkpoint, job):
            job.check(each)
