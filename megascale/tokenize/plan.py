"""What a tokenization job is asked for, and its plan: every shard with its clips, fixed before anything is encoded."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from megascale import storage
from megascale.config import Section
from megascale.data.index import Quarantined
from megascale.errors import (
    AudioError,
    ConfigError,
    CredentialsError,
    DataError,
    StorageError,
    StoreUnavailable,
    TokenError,
)
from megascale.log import Progress, say
from megascale.storage import StorageConfig
from megascale.tokenize import audio, streams
from megascale.tokenize.clips import Clip, ClipsConfig, Recording, cut
from megascale.tokenize.codec import CALIBRATE, load_codec
from megascale.tokenize.shards import ShardPlan, plan_shards
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokens import codebooks_for

PLAN = "plan.json"
CODEC_FILE = "codec.safetensors"


class OutputConfig(Section):
    """Where the tokens go."""

    url: str = Field(description="token folder to write, local or any storage URL")


class CodecConfig(Section):
    """Which codec, and how many of its codebooks."""

    weights: str = Field(
        description="path or URL of encodec_24khz-d7cc33bc.th, of a codec.safetensors, or `calibrate` (no download)"
    )
    bitrate_kbps: float = Field(
        12.0, description="0.75 a codebook; every lower bitrate can be read from what is stored"
    )
    seed: int = Field(0, description="calibrate: fixes the sample and the starts of k-means")
    batch_clips: int = Field(
        8, ge=1, description="clips given to the encoder together; a GPU wants 64, and a CPU's codes don't depend on it"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: GPUs only; each worker's first batch is also encoded in fp32, to tell what changes"
    )

    @model_validator(mode="after")
    def _whole_codebooks(self) -> "CodecConfig":
        try:
            codebooks_for(self.bitrate_kbps)
        except TokenError as failure:
            raise ValueError(str(failure)) from None
        return self


class ShardsConfig(Section):
    """How clips are grouped."""

    clips: int = Field(1000, ge=1, description="clips planned per shard")


class WorkersConfig(Section):
    """Ray workers."""

    count: int | None = Field(None, ge=1, description="number of workers; null takes every CPU (or GPU) of the cluster")
    gpus_each: float = Field(0, ge=0, description="GPUs per worker; 0 encodes on CPUs, one thread a worker")
    attempts: int = Field(3, ge=1, description="how often a clip is read, and a shard tried when its worker dies")


class QuarantineConfig(Section):
    """What to do about clips that cannot be tokenised."""

    max_share: float = Field(0.01, ge=0, le=1, description="share of quarantined clips above which the job exits 3")


class TokenizeConfig(Section):
    """Everything `launch/tokenize_audio.py` needs."""

    source: SourceConfig = Field(description="which audio")
    clips: ClipsConfig = Field(ClipsConfig(), description="how it is cut")
    codec: CodecConfig = Field(description="which codec")
    shards: ShardsConfig = Field(ShardsConfig(), description="how clips are grouped")
    output: OutputConfig = Field(description="where the tokens go")
    workers: WorkersConfig = Field(WorkersConfig(), description="Ray workers")
    quarantine: QuarantineConfig = Field(QuarantineConfig(), description="what is allowed to fail")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")

    @model_validator(mode="after")
    def _bf16_on_gpus(self) -> "TokenizeConfig":
        if self.codec.precision == "bf16" and not self.workers.gpus_each:
            raise ValueError("codec.precision=bf16 needs workers.gpus_each above 0; CPUs are slower with it")
        return self


@dataclass(frozen=True)
class Plan:
    """What the job will do: fixed at its first start, and read back by every later one."""

    shards: list[ShardPlan]
    unreadable: list[Quarantined]  # recordings whose length cannot be read, so that they cannot be cut

    @property
    def num_clips(self) -> int:
        return sum(len(shard.clips) for shard in self.shards)


def codec_url(config: TokenizeConfig) -> str:
    """Return where the job's codec lies; a calibrated one is kept beside the shards."""
    calibrated = config.codec.weights == CALIBRATE
    return storage.join(config.output.url, CODEC_FILE) if calibrated else config.codec.weights


def find_codec(config: TokenizeConfig) -> bool:
    """Load the job's codec to check it; return whether there is one, else it is to be fitted.

    Raises:
        ConfigError: it has fewer codebooks than the job stores.
        TokenError, StorageError: it is no codec, or not there.
    """
    where = codec_url(config)
    if config.codec.weights == CALIBRATE and not storage.exists(where):
        return False
    found, needed = load_codec(where).num_codebooks, codebooks_for(config.codec.bitrate_kbps)
    if needed > found:
        raise ConfigError(
            f"tokenize.codec.bitrate_kbps={config.codec.bitrate_kbps}: needs {needed} codebooks, {where} has {found}"
        )
    return True


def describe_plan(config: TokenizeConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    storage.configure(config.storage)
    plan = read_plan(config) or make_plan(config)
    find_codec(config)
    hours = sum(clip.duration_seconds or 0.0 for shard in plan.shards for clip in shard.clips) / 3600
    lines = [f"{plan.num_clips} clips in {len(plan.shards)} shards -> {config.output.url}"]
    lines += [f"{hours:.2f} hours of audio"] if hours else []
    lines += (
        [f"{len(plan.unreadable)} recordings cannot be read: {plan.unreadable[0].reason}"] if plan.unreadable else []
    )
    return "\n".join(lines)


def read_plan(config: TokenizeConfig) -> Plan | None:
    """Read the plan of an earlier start, if there was one.

    Raises:
        ConfigError: the folder is another job's.
        DataError: the plan is broken.
    """
    where = storage.join(config.output.url, PLAN)
    # looked for first: another driver of this job publishes its plan before its codec
    fitted = config.codec.weights == CALIBRATE and storage.exists(codec_url(config))
    if not storage.exists(where):
        if fitted:
            raise ConfigError(
                f"{codec_url(config)}: the codec of another job, for there is no {PLAN} beside it; "
                "choose another tokenize.output.url, or delete it"
            )
        return None
    try:
        stored = json.loads(storage.read_bytes(where))
        shards = [ShardPlan(s["number"], [Clip(**clip) for clip in s["clips"]]) for s in stored["shards"]]
        plan = Plan(shards, [Quarantined(**bad) for bad in stored["unreadable"]])
        fixed, other = _what_fixes_the_shards(config), dict(stored["config"])
    except (ValueError, TypeError, KeyError) as failure:
        raise DataError(
            f"{where}: broken: {failure}; delete it, and {CODEC_FILE} beside it, and run the same command again"
        ) from None
    if other != fixed:
        names = [key for key in fixed if other.get(key) != fixed[key]]
        raise ConfigError(
            f"tokenize.output.url={config.output.url}: holds a job with another {', '.join(names)}; "
            "choose another folder, or delete this one"
        )
    return plan


def publish_plan(config: TokenizeConfig, plan: Plan) -> None:
    """Publish the plan, unless another driver was first."""
    where = storage.join(config.output.url, PLAN)
    data = {"config": _what_fixes_the_shards(config), "shards": [asdict(s) for s in plan.shards]}
    data["unreadable"] = [bad.model_dump() for bad in plan.unreadable]
    if not storage.exists(where):  # create-only alone is ignored by some stores
        storage.publish_bytes(where, json.dumps(data).encode(), create_only=True)


def _what_fixes_the_shards(config: TokenizeConfig) -> dict[str, Any]:
    fixed = config.model_dump(mode="json", include={"source", "clips", "codec", "shards"})
    return {**fixed, "device": "cuda" if config.workers.gpus_each else "cpu"}


def make_plan(config: TokenizeConfig) -> Plan:
    """List the corpus, read the headers that cutting needs, and cut it to clips and shards; writes nothing.

    Raises:
        ConfigError: no such codec, or nothing to fit one to.
        DataError: nothing can be read, or the corpus is not laid out as its kind says.
        StorageError: nothing is there, or the store does not answer.
    """
    if config.codec.weights != CALIBRATE and not storage.exists(config.codec.weights):
        raise ConfigError(f"tokenize.codec.weights={config.codec.weights}: no such file (or write `calibrate`)")
    recordings, notes = list_recordings(config.source)
    clips: list[Clip] = []
    unreadable: list[Quarantined] = []
    for recording, length in _with_lengths(recordings, config.clips):
        if isinstance(length, Exception):
            key = cut(recording, None, ClipsConfig(seconds=None))[0].key
            unreadable.append(Quarantined(key=key, url=recording.url, reason=str(length), attempts=1))
        else:
            clips += cut(recording, length, config.clips)
    if not clips:
        raise DataError(
            f"{config.source.url}: none of {len(recordings)} recordings can be read: {unreadable[0].reason}"
        )
    if config.codec.weights == CALIBRATE and all(streams.is_stream(clip.url) for clip in clips):
        raise ConfigError(
            f"tokenize.codec.weights={CALIBRATE}: {config.source.url} holds .ecdc streams and no audio to fit a codec "
            "to; give the codec that wrote them"
        )
    for what, count in notes.items():
        if count:
            say(f"{count} {what}")
    return Plan(plan_shards(clips, config.shards.clips), unreadable)


def _with_lengths(
    recordings: list[Recording], config: ClipsConfig
) -> Iterator[tuple[Recording, float | Exception | None]]:
    """Pair each recording with its file's length where cutting needs it; headers are read side by side."""

    def probe(recording: Recording) -> float | Exception | None:
        if config.seconds is None or recording.duration_seconds is not None:
            return None
        try:
            stream = streams.is_stream(recording.url)
            return streams.probe_seconds(recording.url) if stream else audio.probe_seconds(recording.url)
        except (CredentialsError, StoreUnavailable):
            raise  # no fault of the recording's, and the plan would leave it out for good
        except (AudioError, StorageError, TokenError) as failure:
            return failure

    progress = Progress("reading headers", len(recordings), unit="recordings")
    with ThreadPoolExecutor(16) as pool:
        for i, (recording, length) in enumerate(zip(recordings, pool.map(probe, recordings), strict=True), start=1):
            yield recording, length
            progress.update(i)
