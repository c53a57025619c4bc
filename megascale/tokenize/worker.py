"""What runs inside a Ray worker: encoding shards, and fitting a codec to a sample. Nothing here knows of Ray."""

import itertools
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megascale import seeding, storage
from megascale.data.index import Quarantined
from megascale.errors import AudioError, CredentialsError, StorageError, StoreUnavailable, TokenError
from megascale.tokenize import audio, streams
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.clips import Clip
from megascale.tokenize.codec import load_codec
from megascale.tokenize.encoder import BatchedEncoder
from megascale.tokenize.plan import Plan, TokenizeConfig
from megascale.tokenize.shards import EncodedClip, ShardPlan, build_shard, publish_shard, read_committed
from megascale.tokens import SAMPLE_RATE_HZ, codebooks_for

CALLS = 2  # shards a worker has in hand
_CALIBRATION_SECONDS = 240.0
_READERS = 4  # threads


class ShardWorker:
    """Encodes shards; lives in a Ray actor that runs two calls at once, so that one reads or publishes while the other
    encodes."""

    def __init__(self, config: TokenizeConfig, codec_file: str) -> None:
        import torch

        storage.configure(config.storage)
        torch.set_num_threads(1)
        self._config = config
        self._codec = load_codec(codec_file)
        self._num_codebooks = codebooks_for(config.codec.bitrate_kbps)
        self._gpu = (
            BatchedEncoder(self._codec.model, "cuda", config.codec.precision) if config.workers.gpus_each else None
        )
        self._encoder = threading.Lock()
        self._idle_since = time.perf_counter()  # of the encoder

    def ready(self) -> None:
        """Return once the worker is whole, which tells a death at work from one at the start."""

    def encode(self, plan: ShardPlan, excluded: list[Quarantined]) -> dict[str, float]:
        """Encode one shard and publish it.

        Args:
            plan: the shard.
            excluded: clips of it that are quarantined already.

        Returns:
            Seconds of audio, seconds spent per stage, and counts.
        """
        spent: defaultdict[str, float] = defaultdict(float)
        committed = read_committed(self._config.output.url, plan, self._codec.fingerprint)
        if committed is not None:  # by another driver of this job
            return {"clips": len(committed.clips), "quarantined": len(committed.quarantined)}
        began = time.perf_counter()
        bad = {item.key: item for item in excluded}
        places = [i for i, clip in enumerate(plan.clips) if clip.key not in bad]
        encoded: dict[int, EncodedClip] = {}
        clips = self._read(plan.clips, places, bad, encoded, spent)
        while batch := list(itertools.islice(clips, self._config.codec.batch_clips)):
            with self._encoder:
                started = time.perf_counter()
                spent["idle"] += started - max(began, self._idle_since)
                sounds = [audio_S for _, audio_S in batch]
                if self._gpu and not self._gpu.is_checked:
                    changed = self._gpu.check_precision(sounds, self._num_codebooks)
                    spent["checked"], spent["changed_q0"], spent["changed"] = 1, *changed
                codes = (self._gpu or self._codec).encode(sounds, self._num_codebooks)
                self._idle_since = time.perf_counter()
                spent["encode"] += self._idle_since - started
            for (i, audio_S), codes_QT in zip(batch, codes, strict=True):
                encoded[i] = EncodedClip(plan.clips[i], codes_QT, len(audio_S))
                spent["audio"] += len(audio_S) / SAMPLE_RATE_HZ
        started = time.perf_counter()
        in_order = [encoded[i] for i in sorted(encoded)]
        bad_in_order = [bad[clip.key] for clip in plan.clips if clip.key in bad]
        data, index = build_shard(plan, in_order, bad_in_order, self._codec.name, self._codec.fingerprint)
        publish_shard(self._config.output.url, data, index)
        spent["write"] += time.perf_counter() - started
        return {**spent, "clips": len(encoded), "quarantined": len(bad)}

    def probe(self, clip: Clip) -> None:
        """Read and encode one clip for nothing but to see whether the worker lives through it."""
        found, _ = _read_clip(clip, self._config, self._codec.name)
        if isinstance(found, np.ndarray):
            (self._gpu or self._codec).encode([found], self._num_codebooks)

    def _read(
        self,
        clips: list[Clip],
        places: list[int],
        bad: dict[str, Quarantined],
        encoded: dict[int, EncodedClip],
        spent: defaultdict[str, float],
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (place, float32 samples) of the clips that can be read, in order; a few are read ahead.

        What cannot be read goes to `bad`, and what holds codes already to `encoded`.
        """
        most = 2 * self._config.codec.batch_clips  # ready for the encoder
        with ThreadPoolExecutor(_READERS) as pool:
            ahead: deque[Future[tuple[np.ndarray | EncodedClip | Quarantined, dict[str, float]]]] = deque()
            for n in range(len(places) + most):
                if n < len(places):
                    ahead.append(pool.submit(_read_clip, clips[places[n]], self._config, self._codec.name))
                if n >= most:
                    found, took = ahead.popleft().result()
                    for stage, seconds in took.items():
                        spent[stage] += seconds
                    if isinstance(found, Quarantined):
                        bad[found.key] = found
                    elif isinstance(found, EncodedClip):
                        encoded[places[n - most]] = found
                    else:
                        yield places[n - most], found


def _read_clip(
    clip: Clip, config: TokenizeConfig, codec_name: str
) -> tuple[np.ndarray | EncodedClip | Quarantined, dict[str, float]]:
    """Read one clip. What its bytes say is final; a store that fails is asked again, a bounded number of times.

    Raises StoreUnavailable if the store then answers nothing else, either: what it holds is not known, and not left out.
    """
    attempts, most_seconds = config.workers.attempts, config.clips.max_seconds
    spent: defaultdict[str, float] = defaultdict(float)
    for attempt in range(1, attempts + 1):
        try:
            if streams.is_stream(clip.url):
                num_codebooks = codebooks_for(config.codec.bitrate_kbps)
                return EncodedClip(clip, *streams.read_stream(clip.url, codec_name, num_codebooks, most_seconds)), spent
            return audio.read_clip(clip.url, clip.start_seconds, clip.duration_seconds, spent, most_seconds), spent
        except (AudioError, TokenError) as failure:
            return Quarantined(key=clip.key, url=clip.url, reason=str(failure), attempts=attempt), spent
        except CredentialsError:
            raise  # no fault of the clip's, and the next would meet it too
        except StorageError as failure:
            reason = str(failure)
            if attempt == attempts and isinstance(failure, StoreUnavailable):
                _check_store(clip)
    return Quarantined(key=clip.key, url=clip.url, reason=reason, attempts=attempts), spent


def _check_store(clip: Clip) -> None:
    """Raise StoreUnavailable unless the store of a clip, which it does not give, answers at all; a refusal is an answer."""
    try:
        storage.exists(f"{clip.url.rpartition('/')[0]}/.nothing")
    except (CredentialsError, StoreUnavailable):
        raise
    except StorageError:
        pass


class CodecFitter:
    """Fits a codec; lives in a Ray actor that runs two calls at once, so that it can be asked how far it is."""

    def __init__(self) -> None:
        self._progress = 0, 0

    def progress(self) -> tuple[int, int]:
        """Return the steps done and their number, which is 0 until the sample is read."""
        return self._progress

    def fit(self, config: TokenizeConfig, plan: Plan, cluster_cpus: int) -> bytes:
        """Fit a codec to a sample of the plan's clips; return its file. Raises AudioError if too little can be read.

        `cluster_cpus` is the number that Ray counts: a container has fewer than its machine.
        """
        import torch

        storage.configure(config.storage)
        torch.set_num_threads(min(cluster_cpus, os.cpu_count() or 1))  # nothing else runs yet
        sample = _calibration_sample(config, plan)
        num_codebooks = codebooks_for(config.codec.bitrate_kbps)
        return calibrate(sample, num_codebooks, config.codec.seed, self._report).to_bytes()

    def _report(self, done: int, total: int) -> None:
        self._progress = done, total


def _calibration_sample(config: TokenizeConfig, plan: Plan) -> list[np.ndarray]:
    clips = [clip for shard in plan.shards for clip in shard.clips if not streams.is_stream(clip.url)]
    sample: list[np.ndarray] = []
    seconds = 0.0
    for i in seeding.generator(config.codec.seed, "calibration sample").permutation(len(clips)):
        try:
            stretch = clips[i].start_seconds, clips[i].duration_seconds
            sample.append(audio.read_clip(clips[i].url, *stretch, most_seconds=config.clips.max_seconds))
        except CredentialsError:
            raise
        except StoreUnavailable:
            _check_store(clips[i])
            continue
        except (AudioError, StorageError):
            continue  # its worker will quarantine it
        seconds += len(sample[-1]) / SAMPLE_RATE_HZ
        if seconds >= _CALIBRATION_SECONDS:
            break
    if not sample:
        raise AudioError(f"{config.source.url}: no recording can be read")
    return sample
