"""The tokenization job: plan the shards, let Ray workers encode them, write the manifest last.

A worker's unit is one shard with fixed bytes, so a shard may be encoded twice
(after a crash, or by two drivers) without harm; what is committed is never encoded again.
"""

import json
import platform
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from megascale import storage
from megascale.cluster import check_stays, start_ray
from megascale.data.index import (
    MANIFEST,
    CodecFacts,
    Manifest,
    Quarantined,
    ShardFacts,
    ShardIndex,
    read_manifest,
)
from megascale.errors import ConfigError, DataError, MegascaleError, QuarantineExceeded
from megascale.log import Progress, duration, say
from megascale.stopping import StopSignal
from megascale.tokenize.codec import Codec, load_codec
from megascale.tokenize.plan import Plan, TokenizeConfig, codec_url, find_codec, make_plan, publish_plan, read_plan
from megascale.tokenize.shards import ShardPlan, read_committed
from megascale.tokenize.summary import REPORT, summarise
from megascale.tokenize.worker import CALLS, CodecFitter, ShardWorker
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for

QUARANTINE = "quarantine.jsonl"
# glibc gives large blocks back to the kernel after every convolution: half of the encoder's time would be page faults
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
_TUNED = {"env_vars": {"GLIBC_TUNABLES": _MALLOC}}


def run(config: TokenizeConfig) -> Manifest:
    """Tokenise a corpus; resumes where an earlier run of the same config stopped.

    Returns:
        The manifest of the finished folder.

    Raises:
        ConfigError, DataError, StorageError, TokenError: bad input; nothing is committed.
        QuarantineExceeded: finished, but more clips than `quarantine.max_share` could not be tokenised.
    """
    storage.configure(config.storage)
    url = config.output.url
    check_stays(url, "tokenize.output.url")
    stored = read_plan(config)
    if storage.exists(storage.join(url, MANIFEST)):
        manifest = read_manifest(url)
        say(f"{url}: already done: {manifest.num_clips} clips in {len(manifest.shards)} shards")
        _check_quarantine(config, manifest)
        return manifest
    started = time.monotonic()
    plan = stored or make_plan(config)
    fitted = None if find_codec(config) else _fit_codec(config, plan)
    if stored is None:
        plan = publish_plan(config, plan)
    codec_file = _publish_codec(config, fitted)
    missing = [shard for shard in plan.shards if read_committed(url, shard) is None]
    spent = _encode_shards(config, codec_file, plan, missing) if missing else {}
    indexes = [_committed(url, shard) for shard in plan.shards]
    manifest = _finish(config, load_codec(codec_file), plan, indexes, spent, time.monotonic() - started)
    _check_quarantine(config, manifest)
    return manifest


def _check_quarantine(config: TokenizeConfig, manifest: Manifest) -> None:
    total = manifest.num_clips + manifest.num_quarantined
    if manifest.num_quarantined > config.quarantine.max_share * total:
        raise QuarantineExceeded(
            f"{storage.join(config.output.url, QUARANTINE)}: {manifest.num_quarantined} of {total} clips quarantined, "
            f"quarantine.max_share={config.quarantine.max_share} allows {config.quarantine.max_share * total:.0f}"
        )


# --------------------------------------------------------------------------------------------------------- the codec


def _fit_codec(config: TokenizeConfig, plan: Plan) -> bytes:
    """Fit a codec in an actor, and show how far it is. Returns its file."""
    say("codec.weights=calibrate: fitting a codec to a sample of the corpus (its tokens do not decode to audio)")
    with StopSignal() as stop:
        ray = start_ray()
        lives = {"max_restarts": 2, "max_task_retries": 2}
        fitter = ray.remote(CodecFitter).options(num_cpus=1, max_concurrency=2, runtime_env=_TUNED, **lives).remote()
        fitted = fitter.fit.remote(config, plan)
        progress = Progress("fitting the codec", 0, unit="steps")
        try:
            while not ray.wait([fitted], timeout=1.0)[0]:
                stop.check()
                done, progress.total = ray.get(fitter.progress.remote())
                if progress.total:
                    progress.update(done)
            codec = bytes(ray.get(fitted))
            done, progress.total = ray.get(fitter.progress.remote())
            progress.update(done)
            progress.close()
            return codec
        except ray.exceptions.RayTaskError as failure:
            raise _users_mistake(failure) from None
        finally:
            ray.kill(fitter)


def _publish_codec(config: TokenizeConfig, fitted: bytes | None) -> str:
    """Publish a fitted codec; return the URL of the one that counts: fitting is not bit-equal on every machine."""
    if fitted is not None:
        storage.publish_bytes(codec_url(config), fitted, create_only=True)
    return codec_url(config)


# ------------------------------------------------------------------------------------------------------- the workers


def _encode_shards(
    config: TokenizeConfig, codec_file: str, plan: Plan, missing: list[ShardPlan]
) -> defaultdict[str, float]:
    with StopSignal() as stop:
        ray = start_ray()
        resource = "GPU" if config.workers.gpus_each > 0 else "CPU"
        each = config.workers.gpus_each if resource == "GPU" else 1
        available = int(ray.cluster_resources().get(resource, 0) / each)
        if available < 1:
            raise ConfigError(f"tokenize.workers.gpus_each={each}: the Ray cluster has too few of resource {resource}")
        count = min(config.workers.count or available, len(missing))
        actor = ray.remote(ShardWorker).options(
            num_cpus=1, num_gpus=config.workers.gpus_each, max_concurrency=CALLS, runtime_env=_TUNED
        )
        say(f"encoding {sum(len(s.clips) for s in missing)} clips in {len(missing)} shards with {count} workers")
        return _drive(ray, stop, config, lambda: actor.remote(config, codec_file), count, missing, plan)


def _drive(
    ray: Any, stop: StopSignal, config: TokenizeConfig, start: Any, count: int, missing: list[ShardPlan], plan: Plan
) -> defaultdict[str, float]:
    """Keep every worker busy; replace a worker that dies, and give its shards to others, a bounded number of times.

    Returns:
        Seconds of audio, seconds spent per stage, and counts, over all workers.
    """
    waiting = deque(missing)
    tries, killers = {shard.number: 0 for shard in missing}, dict[int, list[Quarantined]]()
    running: dict[Any, tuple[Any, ShardPlan]] = {}
    total = sum(len(shard.clips) for shard in plan.shards)
    done = total - sum(len(shard.clips) for shard in missing)
    progress = Progress("tokenising", total, done, "clips")
    spent: defaultdict[str, float] = defaultdict(float)
    spent["quarantined"] = len(plan.unreadable)
    began = time.monotonic()
    workers = [start() for _ in range(count)]
    idle, successors = deque(workers * CALLS), dict[Any, Any]()
    while waiting or running:
        stop.check()
        while idle and waiting:
            worker, shard = idle.popleft(), waiting.popleft()
            while worker in successors:
                worker = successors[worker]
            tries[shard.number] += 1
            running[worker.encode.remote(shard, killers.get(shard.number, []))] = (worker, shard)
        for result in ray.wait(list(running), timeout=1.0)[0]:
            worker, shard = running.pop(result)
            try:
                for name, value in ray.get(result).items():
                    spent[name] += value
                done += len(shard.clips)
            except ray.exceptions.RayActorError as failure:
                say(f"{shard.name}: its worker died; trying again")
                if tries[shard.number] >= config.workers.attempts:
                    if shard.number in killers:
                        raise DataError(f"{shard.name}: its worker dies again and again: {failure}") from None
                    killers[shard.number], tries[shard.number] = _find_killers(ray, stop, config, start, shard), 0
                waiting.appendleft(shard)
                if worker not in successors:  # its other call ends here too
                    successors[worker] = start()
            except ray.exceptions.RayTaskError as failure:
                raise _users_mistake(failure) from None
            idle.append(worker)
        rate = spent["audio"] / max(1e-9, time.monotonic() - began)
        progress.update(done, f"{rate:.1f} hours of audio an hour, {spent['quarantined']:.0f} quarantined")
    progress.close(f"{spent['quarantined']:.0f} quarantined")
    for worker in {*workers, *successors.values()} - successors.keys():
        ray.kill(worker)
    return spent


def _find_killers(
    ray: Any, stop: StopSignal, config: TokenizeConfig, start: Any, shard: ShardPlan
) -> list[Quarantined]:
    """Give each clip of a shard to a worker alone; return those that no worker lives through."""
    say(f"{shard.name}: looking for the clip that its workers die of")
    worker, found, attempts = start(), [], config.workers.attempts
    for clip in shard.clips:
        for _ in range(attempts):
            stop.check()
            try:
                ray.get(worker.probe.remote(clip))
                break
            except ray.exceptions.RayActorError:
                worker = start()
        else:
            reason = f"{clip.url}: every worker that read or encoded this clip died"
            found.append(Quarantined(key=clip.key, url=clip.url, reason=reason, attempts=attempts))
    ray.kill(worker)
    return found


def _users_mistake(failure: Any) -> Exception:
    """Return what a worker raised if a user can do something about it, else the failure itself."""
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, MegascaleError) else failure


# --------------------------------------------------------------------------------------------------------- the finish


def _committed(url: str, shard: ShardPlan) -> ShardIndex:
    index = read_committed(url, shard)
    if index is None:
        raise DataError(
            f"{storage.join(url, shard.name)}: gone, or cut, since it was written; run the same command again"
        )
    return index


def _finish(
    config: TokenizeConfig,
    codec: Codec,
    plan: Plan,
    indexes: list[ShardIndex],
    spent: Mapping[str, float],
    wall_seconds: float,
) -> Manifest:
    url = config.output.url
    for index in indexes:
        if index.codec != codec.fingerprint:
            raise DataError(f"{storage.join(url, index.shard)}: committed by another codec than this job's")
    bad = plan.unreadable + [item for index in indexes for item in index.quarantined]
    seconds = sum(clip.frames for index in indexes for clip in index.clips) / FRAMES_PER_SECOND
    num_clips = sum(len(index.clips) for index in indexes)
    if num_clips == 0:
        raise DataError(f"{config.source.url}: not one clip could be tokenised: {bad[0].reason}")
    storage.publish_bytes(
        storage.join(url, QUARANTINE), "".join(item.model_dump_json() + "\n" for item in bad).encode()
    )
    manifest = Manifest(
        codec=CodecFacts(
            name=codec.name,
            fingerprint=codec.fingerprint,
            origin=codec.origin,
            num_codebooks=codebooks_for(config.codec.bitrate_kbps),
        ),
        source=config.source.model_dump(mode="json"),
        cut=config.clips.model_dump(mode="json"),
        environment=_environment(config),
        shards=[ShardFacts(name=i.shard, clips=len(i.clips), sha256=i.sha256, size=i.size) for i in indexes],
        num_clips=num_clips,
        num_quarantined=len(bad),
        seconds=seconds,
    )
    report = summarise(url, manifest, bad, spent, wall_seconds)
    if "codes_changed" in report:
        first, every = report["codes_changed"]["codebook_0"], report["codes_changed"]["all"]
        say(f"{config.codec.precision} changes {first:.3%} of codebook 0's codes and {every:.3%} of all against fp32")
    storage.publish_bytes(storage.join(url, REPORT), json.dumps(report, indent=2).encode())
    storage.publish_bytes(storage.join(url, MANIFEST), manifest.model_dump_json(indent=1).encode())
    say(
        f"{num_clips} clips, {duration(seconds)} of audio, {len(bad)} quarantined -> {url} ({codec.name}); "
        f"next: python launch/pretrain.py CONFIG data.url={url}"
    )
    return manifest


def _environment(config: TokenizeConfig) -> dict[str, Any]:
    import torch

    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": "cuda" if config.workers.gpus_each > 0 else "cpu",
        "batch_clips": config.codec.batch_clips,
        "precision": config.codec.precision,
    }
