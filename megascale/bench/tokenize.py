"""How fast tokenization is, beside the `encodec` package and beside the limit that its arithmetic sets."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from megascale import seeding, synthesis
from megascale.bench import measure
from megascale.cluster import start_ray
from megascale.config import load_config
from megascale.log import say
from megascale.tokenize.audio import read_clip
from megascale.tokenize.codec import Codec, calibrate
from megascale.tokenize.plan import CODEC_FILE, TokenizeConfig, make_plan
from megascale.tokenize.shards import ShardPlan
from megascale.tokenize.worker import CALLS, ShardWorker

_SECONDS, _RATE_HZ = 10, 44_100
_CLIPS, _PER_SHARD = 32, 8
_KBPS, _Q = 12, 16
# multiplications and additions for a second of audio: convolutions, LSTM, 16 codebooks (counted from their shapes)
_FLOP_PER_SECOND = 2.35e9 + 0.63e9 + 0.32e9
_GEMM = 1024


def run(rounds: int) -> Path:
    """Measure, print the table, and write `runs/bench/tokenize.json`; return its path."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"rendering {_CLIPS} clips of {_SECONDS} s and fitting a codec to them")
        paths = _render(Path(folder, "audio"))
        codec = calibrate([read_clip(str(path)) for path in paths], _Q, seed=0)
        Path(folder, CODEC_FILE).write_bytes(codec.to_bytes())
        changed = _changed(codec, paths)
        rates = measure.in_turn("tokenization", _things(codec, paths, folder), rounds)
    limit = [gflops * 1e9 / _FLOP_PER_SECOND for gflops in rates.pop("gemm")]
    facts = {
        "times_real_time": {name: sorted(values) for name, values in rates.items()},
        "arithmetic_limit_one_thread": sorted(limit),
        "ratios": {
            "encoder / encodec, one thread each": measure.ratio(rates["encoder"], rates["encodec"]),
            "job with one worker / encodec, one thread": measure.ratio(rates["job"], rates["encodec"]),
            "job / encodec, the same two cores": measure.ratio(rates["job, 2 workers"], rates["encodec, 2 threads"]),
            "encodec / limit": measure.ratio(rates["encodec"], limit),
            "encoder / limit": measure.ratio(rates["encoder"], limit),
            "job with one worker / limit": measure.ratio(rates["job"], limit),
            "job without Ray / job with one worker": measure.ratio(rates["job without Ray"], rates["job"]),
        },
        "codes_changed": changed,
        "rounds": rounds,
    }
    _print(facts)
    path = measure.write("tokenize", facts, ["torch", "encodec", "ray", "numpy", "soundfile", "soxr"])
    say(f"{rounds} rounds -> {path}")
    return path


def _render(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i:03d}.wav" for i in range(_CLIPS)]
    for i, path in enumerate(paths):
        sound = synthesis.make_mixture(seeding.generator(0, "bench", i), i, _SECONDS, _RATE_HZ)
        soundfile.write(path, sound, _RATE_HZ, subtype="PCM_16")
    return paths


def _changed(codec: Codec, paths: list[Path]) -> dict[str, float]:
    """Return the share of codes in which the encoder differs from `encodec`'s."""
    ours = np.concatenate(codec.encode([read_clip(str(path)) for path in paths], _Q), axis=1)
    theirs = np.concatenate([_encodec(codec, path) for path in paths], axis=1)
    return {"codebook 0": float((ours[0] != theirs[0]).mean()), "all": float((ours != theirs).mean())}


def _encodec(codec: Codec, path: Path) -> np.ndarray:
    """Encode one file as the package's README shows. (Its torchaudio, which does not load beside a CPU torch, is not
    needed for that: soundfile and soxr are the faster way to 24 kHz mono anyway.)"""
    codec.model.set_target_bandwidth(_KBPS)
    with torch.no_grad():
        ((codes_1QT, _),) = codec.model.encode(torch.from_numpy(read_clip(str(path)))[None, None])
    return codes_1QT[0].numpy()


def _things(codec: Codec, paths: list[Path], folder: str) -> dict[str, Callable[[], float]]:
    config = load_config(
        TokenizeConfig,
        "tokenize",
        None,
        [
            "source.kind=files",
            f"source.url={folder}/audio",
            f"codec.weights={folder}/{CODEC_FILE}",
            f"codec.bitrate_kbps={_KBPS}",
            f"shards.clips={_PER_SHARD}",
            f"output.url={folder}/tokens",
        ],
    )
    shards = make_plan(config).shards
    few = paths[:_PER_SHARD]
    audio = [read_clip(str(path)) for path in few]
    ray = start_ray()
    actor = ray.remote(ShardWorker).options(num_cpus=1, max_concurrency=CALLS)
    workers = [actor.remote(config, config.codec.weights) for _ in range(2)]
    alone = ShardWorker(config, config.codec.weights)

    def one_thread(work: Callable[[], Any], clips: int, threads: int = 1) -> Callable[[], float]:
        def timed() -> float:
            torch.set_num_threads(threads)
            work()
            return float(clips * _SECONDS)

        return timed

    def in_workers(count: int) -> None:
        ray.get([workers[i % count].encode.remote(shard, []) for i, shard in enumerate(shards)])

    def without_ray() -> None:
        with ThreadPoolExecutor(CALLS) as pool:
            list(pool.map(lambda shard: alone.encode(shard, []), shards))

    return {
        "gemm": _gemm(),
        "encodec": one_thread(lambda: [_encodec(codec, path) for path in few], len(few)),
        "encoder": one_thread(lambda: codec.encode(audio, _Q), len(few)),
        "job without Ray": one_thread(without_ray, _count(shards)),
        "job": one_thread(lambda: in_workers(1), _count(shards)),
        "encodec, 2 threads": one_thread(lambda: [_encodec(codec, path) for path in few], len(few), threads=2),
        "job, 2 workers": one_thread(lambda: in_workers(2), _count(shards)),
    }


def _gemm() -> Callable[[], float]:
    """Return what measures the largest rate of multiplication that torch reaches here on one thread, in GFLOP/s."""
    a, b = torch.randn(_GEMM, _GEMM), torch.randn(_GEMM, _GEMM)

    def timed() -> float:
        torch.set_num_threads(1)
        for _ in range(50):
            torch.mm(a, b)
        return 50 * 2 * _GEMM**3 / 1e9

    return timed


def _count(shards: list[ShardPlan]) -> int:
    return sum(len(shard.clips) for shard in shards)


def _print(facts: dict[str, Any]) -> None:
    print("\nhours of audio an hour                 median      min      max")
    rows = {**facts["times_real_time"], "limit of the arithmetic, one thread": facts["arithmetic_limit_one_thread"]}
    for name, values in rows.items():
        print(f"{name:36s} {np.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    print("\nratio, round by round")
    for name, values in facts["ratios"].items():
        print(f"{name:42s} {values['median']:6.3f}  ({values['min']:.3f} to {values['max']:.3f})")
    print(
        "\nshare of codes that differ from encodec's: "
        + ", ".join(f"{k} {v:.4%}" for k, v in facts["codes_changed"].items())
    )
