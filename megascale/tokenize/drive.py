"""Keeping the workers busy: shards are handed out, dead workers replaced, and the clip found that kills them.

A worker may die of what it reads, or of something else: memory, a lost machine, a signal. So a death counts against a
shard only if it came while the worker, started whole, had the shard in hand; and a clip is left out only if workers died
each time they had that clip alone.
"""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
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
    """The workers: each has a place, and another takes it when it dies."""

    def __init__(self, ray: Any, start: Callable[[], Any], count: int, attempts: int) -> None:
        self._ray, self._start = ray, start
        self._failed_starts, self._most_failed_starts = 0, attempts * max(count, _LEAST_STARTS)
        self.actors = [start() for _ in range(count)]
        self.ready = {actor: actor.ready.remote() for actor in self.actors}

    def was_at_work(self, actor: Any) -> bool:
        """Return whether an actor that died had been started whole."""
        try:
            self._ray.get(self.ready[actor], timeout=0)
        except self._ray.exceptions.RayError:
            return False
        return True

    def replace(self, place: int, failure: Exception) -> None:
        """Give a dead worker's place to a new one. Raises DataError if they die again and again as they start."""
        dead = self.actors[place]
        self._failed_starts = 0 if self.was_at_work(dead) else self._failed_starts + 1
        if self._failed_starts >= self._most_failed_starts:
            raise DataError(f"workers die again and again as they start: {_last_line(failure)}")
        self._ray.kill(dead)  # one that is only out of reach would go on
        self.actors[place] = self._start()
        self.ready[self.actors[place]] = self.actors[place].ready.remote()

    def dismiss(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)


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
    waiting, deaths, killers = deque(missing), Counter[int](), dict[int, list[Quarantined]]()
    running: dict[Any, tuple[int, Any, ShardPlan]] = {}
    done = plan.num_clips - sum(len(shard.clips) for shard in missing)
    progress = Progress("tokenising", plan.num_clips, done, "clips")
    spent: defaultdict[str, float] = defaultdict(float)
    spent["quarantined"] = len(plan.unreadable)
    began = time.monotonic()
    crew = _Crew(ray, start, count, config.workers.attempts)
    idle = deque([*range(count)] * CALLS)
    while waiting or running:
        stop.check()
        while idle and waiting:
            place, shard = idle.popleft(), waiting.popleft()
            actor = crew.actors[place]
            running[actor.encode.remote(shard, killers.get(shard.number, []))] = (place, actor, shard)
        for result in ray.wait(list(running), timeout=1.0)[0]:
            place, actor, shard = running.pop(result)
            try:
                for name, value in ray.get(result).items():
                    spent[name] += value
                done += len(shard.clips)
            except ray.exceptions.RayTaskError as failure:
                raise users_mistake(failure) from None
            except ray.exceptions.RayError as failure:
                say(f"{shard.name}: its worker died; trying again")
                deaths[shard.number] += crew.was_at_work(actor)
                if actor is crew.actors[place]:  # its other call ends here too
                    crew.replace(place, failure)
                if deaths[shard.number] >= config.workers.attempts:
                    if shard.number in killers:
                        raise DataError(
                            f"{shard.name}: its worker dies again and again: {_last_line(failure)}"
                        ) from None
                    killers[shard.number] = _find_killers(ray, stop, config, start, shard)
                    deaths[shard.number] = 0
                waiting.appendleft(shard)
            idle.append(place)
        rate = spent["audio"] / max(1e-9, time.monotonic() - began)
        progress.update(done, f"{rate:.1f} hours of audio an hour, {spent['quarantined']:.0f} quarantined")
    progress.close(f"{spent['quarantined']:.0f} quarantined")
    crew.dismiss()
    return spent


def _find_killers(
    ray: Any, stop: StopSignal, config: TokenizeConfig, start: Callable[[], Any], shard: ShardPlan
) -> list[Quarantined]:
    """Give each clip of a shard to a worker alone; return those that no worker lives through."""
    say(f"{shard.name}: looking for the clip that its workers die of")
    attempts, found = config.workers.attempts, []
    crew = _Crew(ray, start, 1, attempts)
    for clip in shard.clips:
        deaths, lived = 0, False
        while not lived and deaths < attempts:
            stop.check()
            (actor,) = crew.actors
            try:
                ray.get(crew.ready[actor])
                ray.get(actor.probe.remote(clip))
                lived = True
            except ray.exceptions.RayTaskError as failure:
                raise users_mistake(failure) from None
            except ray.exceptions.RayError as failure:
                deaths += crew.was_at_work(actor)
                crew.replace(0, failure)
        if not lived:
            reason = f"{clip.url}: every worker that read or encoded this clip died"
            found.append(Quarantined(key=clip.key, url=clip.url, reason=reason, attempts=deaths))
    crew.dismiss()
    return found


def users_mistake(failure: Any) -> Exception:
    """Return what a worker raised if a user can do something about it, else the failure itself."""
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, MegascaleError) else failure


def _last_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
