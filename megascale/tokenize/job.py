"""The tokenization job: plan the shards, let Ray workers encode them, write the manifest last.

A worker's unit is one shard with fixed bytes, so a shard may be encoded twice
(after a crash, or by two drivers) without harm; what is committed is never encoded again.
"""

import json
import platform
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from megascale import storage
from megascale.cluster import check_stays, start_ray
from megascale.data.index import (
    MANIFEST,
    CodecFacts,
    Manifest,
    ShardFacts,
    ShardIndex,
    read_manifest,
)
from megascale.errors import ConfigError, DataError, QuarantineExceeded
from megascale.log import Progress, duration, say
from megascale.stopping import StopSignal
from megascale.tokenize.codec import CALIBRATE, Codec, load_codec
from megascale.tokenize.drive import drive, users_mistake
from megascale.tokenize.plan import (
    CODEC_FILE,
    PLAN,
    Plan,
    TokenizeConfig,
    codec_url,
    find_codec,
    make_plan,
    publish_plan,
    read_plan,
)
from megascale.tokenize.shards import ShardPlan, read_committed
from megascale.tokenize.summary import REPORT, summarise
from megascale.tokenize.worker import CALLS, CodecFitter, ShardWorker
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for

QUARANTINE = "quarantine.jsonl"
_SETTLE_SECONDS = 20.0  # longer than one request may take


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
    storage.remove_leftovers(url)
    if storage.exists(storage.join(url, MANIFEST)):
        manifest = read_manifest(url)
        say(f"{url}: already done: {manifest.num_clips} clips in {len(manifest.shards)} shards")
        _check_quarantine(config, manifest)
        return manifest
    started = time.monotonic()
    plan = stored or make_plan(config)
    fitted = None if find_codec(config) else _fit_codec(config, plan)
    if stored is None or fitted is not None:
        plan = _agree(config, plan, fitted)
    codec = load_codec(codec_url(config))
    _keep_codec(config, codec)
    missing = [shard for shard in plan.shards if read_committed(url, shard, codec.fingerprint) is None]
    spent = _encode_shards(config, codec_url(config), plan, missing) if missing else {}
    indexes = [_committed(url, shard, codec) for shard in plan.shards]
    manifest = _finish(config, codec, plan, indexes, spent, time.monotonic() - started)
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
        fitter = ray.remote(CodecFitter).options(num_cpus=1, max_concurrency=2, **lives).remote()
        fitted = fitter.fit.remote(config, plan, int(ray.cluster_resources().get("CPU", 1)))
        progress = Progress("fitting the codec", 0, unit="steps")
        asked = fitter.progress.remote()  # comes back late where the cluster has no CPU free
        try:
            while not ray.wait([fitted], timeout=1.0)[0]:
                stop.check()
                if ray.wait([asked], timeout=0)[0]:
                    done, progress.total = ray.get(asked)
                    if progress.total:
                        progress.update(done)
                    asked = fitter.progress.remote()
            codec = bytes(ray.get(fitted))
            done, progress.total = ray.get(fitter.progress.remote())
            progress.update(done)
            progress.close()
            return codec
        except ray.exceptions.RayTaskError as failure:
            raise users_mistake(failure) from None
        except ray.exceptions.RayActorError:
            raise DataError("codec.weights=calibrate: the worker that fits the codec dies again and again") from None
        finally:
            ray.kill(fitter)


def _agree(config: TokenizeConfig, plan: Plan, fitted: bytes | None) -> Plan:
    """Publish the plan and a fitted codec; return the plan that counts, because another driver may have been first.

    Codecs count like plans: fitting is not bit-equal on every machine, and shards of two codecs must not mix. So no
    driver encodes before all that began together read the same codec, also where a store lets the later one win.
    """
    publish_plan(config, plan)
    if fitted is not None and not storage.exists(codec_url(config)):
        storage.publish_bytes(codec_url(config), fitted, create_only=True)
    where = storage.join(config.output.url, PLAN)
    if storage.publish_bytes(where, storage.read_bytes(where), create_only=True):
        time.sleep(_SETTLE_SECONDS)  # the store, or a disk without hard links, ignores create-only
    agreed = read_plan(config)
    assert agreed is not None, "it was just written"
    return agreed


def _keep_codec(config: TokenizeConfig, codec: Codec) -> None:
    """Put a codec that was given beside the shards: whoever has them, or a model of them, has what tokenises for them."""
    if config.codec.weights == CALIBRATE or codec.published:  # a fitted one lies there; published ones are never copied
        return
    where, data = storage.join(config.output.url, CODEC_FILE), codec.to_bytes()
    if not storage.exists(where) or storage.read_bytes(where) != data:  # a disk that was full has no room for two
        storage.publish_bytes(where, data)


# ------------------------------------------------------------------------------------------------------- the workers


def _encode_shards(
    config: TokenizeConfig, codec_file: str, plan: Plan, missing: list[ShardPlan]
) -> defaultdict[str, float]:
    with StopSignal() as stop:
        ray = start_ray()
        resource = "GPU" if config.workers.gpus_each > 0 else "CPU"
        each = config.workers.gpus_each if resource == "GPU" else 1
        available = int(ray.cluster_resources().get(resource, 0) / each)
        if config.workers.count is None and available < 1:
            asked = f"tokenize.workers.gpus_each={config.workers.gpus_each}"
            raise ConfigError(f"{asked}: the Ray cluster has too little of resource {resource} for one worker")
        count = min(config.workers.count or available, len(missing))
        if available < count:
            say(f"the Ray cluster has room for {available} of {count} workers; the others start when there is more")
        actor = ray.remote(ShardWorker).options(num_cpus=1, num_gpus=config.workers.gpus_each, max_concurrency=CALLS)
        say(f"encoding {sum(len(s.clips) for s in missing)} clips in {len(missing)} shards with {count} workers")
        return drive(ray, stop, config, lambda: actor.remote(config, codec_file), count, _from_anywhere(missing), plan)


def _from_anywhere(missing: list[ShardPlan]) -> list[ShardPlan]:
    """Begin at any shard: another driver of this job, if there is one, begins elsewhere. No byte depends on the order."""
    first = random.SystemRandom().randrange(len(missing))
    return missing[first:] + missing[:first]


# --------------------------------------------------------------------------------------------------------- the finish


def _committed(url: str, shard: ShardPlan, codec: Codec) -> ShardIndex:
    index = read_committed(url, shard, codec.fingerprint)
    if index is None:
        raise DataError(
            f"{storage.join(url, shard.name)}: gone, cut, or made by another codec, since it was written; "
            "run the same command again"
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
    bad = plan.unreadable + [item for index in indexes for item in index.quarantined]
    seconds = sum(clip.frames for index in indexes for clip in index.clips) / FRAMES_PER_SECOND
    num_clips = sum(len(index.clips) for index in indexes)
    storage.publish_bytes(
        storage.join(url, QUARANTINE), "".join(item.model_dump_json() + "\n" for item in bad).encode()
    )
    if num_clips == 0:
        raise DataError(f"{config.source.url}: not one clip could be tokenised: {bad[0].reason}")
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
    return {
        **{package: version(package) for package in ("torch", "encodec", "soundfile", "soxr")},
        "machine": platform.machine(),
        "device": "cuda" if config.workers.gpus_each > 0 else "cpu",
        "batch_clips": config.codec.batch_clips,
        "precision": config.codec.precision,
    }
