"""Keeping the workers busy: shards are handed out, dead workers replaced, and the clip found that kills them.

A worker may die of what it reads, or of something else: memory, a lost machine, a signal. So a shard whose worker died is
next given to a worker that has no other; only a death there counts against it, and a clip is left out only if workers died
each time they had that clip alone.
"""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megascale.data.index import Quarantined
from megascale.errors import DataError, MegascaleError
from megascale.log import Progress, say
from megascale.stopping import StopSignal
from megascale.tokenize.plan import Plan, TokenizeConfig
from megascale.tokenize.shards import ShardPlan
from megascale.tokenize.worker import CALLS

_LEAST_STARTS = 10  # a few unlucky starts in a row say nothing where workers are few


class _Crew:
    """The workers: each has a place, and another takes it when it dies. Only one that is up is given work, so that more
    workers than the cluster has room for wait in nobody's way."""

    def __init__(self, ray: Any, start: Callable[[], Any], count: int, attempts: int) -> None:
        self._ray, self._start = ray, start
        self._failed_starts, self._most_failed_starts = 0, attempts * max(count, _LEAST_STARTS)
        self.actors: list[Any] = [None] * count
        self.starting: dict[Any, int] = {}  # the place of each worker that is not up yet, by its call of `ready`
        for place in range(count):
            self.start(place)

    def start(self, place: int) -> None:
        """Give a place to a new worker."""
        if self.actors[place] is not None:
            self._ray.kill(self.actors[place])  # one that is only out of reach would go on
        self.starting = {ready: other for ready, other in self.starting.items() if other != place}
        self.actors[place] = self._start()
        self.starting[self.actors[place].ready.remote()] = place

    def started(self, ready: Any) -> int | None:
        """Return the place of a worker whose call of `ready` came back; None if it died, and another is starting.

        Raises DataError if workers die again and again as they start.
        """
        place = self.starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as failure:
            self._failed_starts += 1
            if self._failed_starts >= self._most_failed_starts:
                raise DataError(f"workers die again and again as they start: {_last_line(failure)}") from None
            say("a worker died as it started; starting another")
            self.start(place)
            return None
        self._failed_starts = 0
        return place

    def wait_for(self, place: int, stop: StopSignal) -> Any:
        """Return the worker of a place once it is up."""
        while waiting := [ready for ready, other in self.starting.items() if other == place]:
            stop.check()
            for ready in self._ray.wait(waiting, timeout=1.0)[0]:
                self.started(ready)
        return self.actors[place]

    def dismiss(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)


@dataclass
class _Task:
    """A shard in the hands of a worker, and whether that worker has had another beside it."""

    place: int
    actor: Any
    shard: ShardPlan
    shared: bool


class _Hands:
    """Which shards wait, and which are in whose hands: a worker has up to `CALLS`, and a second one only if none waits
    for a first."""

    def __init__(
        self, ray: Any, stop: StopSignal, config: TokenizeConfig, crew: _Crew, missing: list[ShardPlan]
    ) -> None:
        self._ray, self._stop, self._config, self._crew = ray, stop, config, crew
        self.waiting = deque(missing)
        self.running: dict[Any, _Task] = {}
        self._suspects: set[int] = set()  # numbers of shards that a worker died with
        self._deaths = Counter[int]()  # of workers that had the shard of this number alone
        self._killers: dict[
            int, list[Quarantined]
        ] = {}  # clips that each shard of this number is to be encoded without

    def give(self) -> None:
        """Give waiting shards to workers that are up."""
        starting = set(self._crew.starting.values())
        held: dict[int, list[_Task]] = {place: [] for place in range(len(self._crew.actors))}
        for task in self.running.values():
            if task.actor is self._crew.actors[task.place]:
                held[task.place].append(task)
        while self.waiting:
            suspect = self.waiting[0].number in self._suspects
            up = [place for place in held if place not in starting and self._has_room(held[place], suspect)]
            if not up:
                break
            place = min(up, key=lambda place: len(held[place]))
            if held[place] and len(self.waiting) <= sum(not tasks for tasks in held.values()):
                break
            task = _Task(place, self._crew.actors[place], self.waiting.popleft(), shared=bool(held[place]))
            for other in held[place]:
                other.shared = True
            held[place].append(task)
            self.running[task.actor.encode.remote(task.shard, self._killers.get(task.shard.number, []))] = task

    def _has_room(self, held: list[_Task], suspect: bool) -> bool:
        return len(held) < (1 if suspect or any(task.shard.number in self._suspects for task in held) else CALLS)

    def take_back(self, result: Any) -> tuple[int, dict[str, float]]:
        """Take what a worker's call came to; its shard waits again if the worker died.

        Returns the clips that are done with it, and what the worker spent. Raises DataError if workers die of a shard
        again and again, and what a worker raised.
        """
        task = self.running.pop(result)
        try:
            spent = self._ray.get(result)
        except self._ray.exceptions.RayTaskError as failure:
            raise users_mistake(failure) from None
        except self._ray.exceptions.RayError as failure:
            self._replace(task, failure)
            return 0, {}
        self._suspects.discard(task.shard.number)
        return len(task.shard.clips), spent

    def _replace(self, task: _Task, failure: Exception) -> None:
        """Replace a worker that died, and look for the clip that did it if its shard was alone with it too often."""
        shard = task.shard
        say(f"{shard.name}: its worker died; trying again")
        self._suspects.add(shard.number)
        self._deaths[shard.number] += not task.shared
        if task.actor is self._crew.actors[task.place]:  # its other call ends here too
            self._crew.start(task.place)
        if self._deaths[shard.number] >= self._config.workers.attempts:
            if shard.number in self._killers:
                raise DataError(f"{shard.name}: its worker dies again and again: {_last_line(failure)}") from None
            found = _find_killers(self._ray, self._stop, self._config, self._crew, task.place, shard)
            self._killers[shard.number] = found
            self._deaths[shard.number] = 0
        self.waiting.appendleft(shard)


def drive(
    ray: Any,
    stop: StopSignal,
    config: TokenizeConfig,
    start: Callable[[], Any],
    count: int,
    missing: list[ShardPlan],
    plan: Plan,
) -> defaultdict[str, float]:
    """Have every missing shard encoded and committed; each is tried a bounded number of times.

    Args:
        ray: the module.
        stop: asked between steps.
        config: the job's.
        start: starts an actor of `ShardWorker`.
        count: workers.
        missing: shards to encode.
        plan: all shards, for the progress line.

    Returns:
        Seconds of audio, seconds spent per stage, and counts, over all workers.
    """
    done = plan.num_clips - sum(len(shard.clips) for shard in missing)
    progress = Progress("tokenising", plan.num_clips, done, "clips")
    spent: defaultdict[str, float] = defaultdict(float)
    spent["quarantined"] = len(plan.unreadable)
    began = time.monotonic()
    crew = _Crew(ray, start, count, config.workers.attempts)
    hands = _Hands(ray, stop, config, crew, missing)
    while hands.waiting or hands.running:
        stop.check()
        hands.give()
        for result in ray.wait([*crew.starting, *hands.running], timeout=1.0)[0]:
            if result in crew.starting:
                crew.started(result)
            elif result in hands.running:
                clips, took = hands.take_back(result)
                done += clips
                for name, value in took.items():
                    spent[name] += value
        rate = spent["audio"] / max(1e-9, time.monotonic() - began)
        progress.update(done, f"{rate:.1f} hours of audio an hour, {spent['quarantined']:.0f} quarantined")
    progress.close(f"{spent['quarantined']:.0f} quarantined")
    crew.dismiss()
    return spent


def _find_killers(
    ray: Any, stop: StopSignal, config: TokenizeConfig, crew: _Crew, place: int, shard: ShardPlan
) -> list[Quarantined]:
    """Give each clip of a shard to a new worker, alone; return those that no worker lives through."""
    say(f"{shard.name}: looking for the clip that its workers die of")
    # the place of one of the crew, because a cluster may have no room for another; who had it alone is dead
    attempts, found = config.workers.attempts, []
    for clip in shard.clips:
        deaths, lived = 0, False
        while not lived and deaths < attempts:
            worker = crew.wait_for(place, stop)
            stop.check()
            try:
                ray.get(worker.probe.remote(clip))
                lived = True
            except ray.exceptions.RayTaskError as failure:
                raise users_mistake(failure) from None
            except ray.exceptions.RayError:
                deaths += 1
                crew.start(place)
        if not lived:
            reason = f"{clip.url}: every worker that read or encoded this clip died"
            found.append(Quarantined(key=clip.key, url=clip.url, reason=reason, attempts=deaths))
    return found


def users_mistake(failure: Any) -> Exception:
    """Return what a worker raised if a user can do something about it, else the failure itself."""
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, MegascaleError) else failure


def _last_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
