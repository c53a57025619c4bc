"""How fast tokenization is, beside the `encodec` package and beside the limit that its arithmetic sets."""

import shutil
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
from megascale.tokenize import job
from megascale.tokenize.audio import read_clip
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import Codec
from megascale.tokenize.plan import CODEC_FILE, TokenizeConfig, make_plan
from megascale.tokenize.worker import CALLS, ShardWorker

_SECONDS, _RATE_HZ = 10, 44_100
_CLIPS, _PER_SHARD, _COPIES = 32, 8, 4
_KBPS, _Q = 12, 16
# multiplications and additions for a second of audio: convolutions, LSTM, 16 codebooks (counted from their shapes)
_FLOP_PER_SECOND = 2.35e9 + 0.63e9 + 0.32e9
_GEMM = 1024


def run(rounds: int) -> Path:
    """Measure, print the table, and write `runs/bench/tokenize.json`; return its path."""
    with tempfile.TemporaryDirectory() as folder:
        say(f"rendering {_CLIPS} clips of {_SECONDS} s and fitting a codec to them")
        paths = _render(Path(folder, "audio"), Path(folder, "more"))
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
            "1 worker / encodec, one thread": measure.ratio(rates["1 worker"], rates["encodec"]),
            "2 workers / encodec, two threads": measure.ratio(rates["2 workers"], rates["encodec, 2 threads"]),
            "whole job / encodec, two threads": measure.ratio(rates["whole job"], rates["encodec, 2 threads"]),
            "encodec / limit": measure.ratio(rates["encodec"], limit),
            "encoder / limit": measure.ratio(rates["encoder"], limit),
            "1 worker / limit": measure.ratio(rates["1 worker"], limit),
            "1 worker without Ray / 1 worker": measure.ratio(rates["1 worker without Ray"], rates["1 worker"]),
        },
        "codes_changed": changed,
        "rounds": rounds,
    }
    _print(facts)
    path = measure.write("tokenize", facts, ["torch", "encodec", "ray", "numpy", "soundfile", "soxr"])
    say(f"{rounds} rounds -> {path}")
    return path


def _render(folder: Path, more: Path) -> list[Path]:
    """Write the clips, and a folder of several copies of them for the whole job, whose start takes seconds."""
    folder.mkdir()
    paths = [folder / f"{i:03d}.wav" for i in range(_CLIPS)]
    for i, path in enumerate(paths):
        sound = synthesis.make_mixture(seeding.generator(0, "bench", i), i, _SECONDS, _RATE_HZ)
        soundfile.write(path, sound, _RATE_HZ, subtype="PCM_16")
    for copy in range(_COPIES):
        shutil.copytree(folder, more / str(copy))
    return paths


def _changed(codec: Codec, paths: list[Path]) -> dict[str, float]:
    """Return the share of codes in which the encoder differs from `encodec`'s."""
    torch.set_num_threads(1)
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
    config, whole = _config(folder, "audio"), _config(folder, "more")
    shards, few = make_plan(config).shards, paths[:_PER_SHARD]
    ray = start_ray()
    actor = ray.remote(ShardWorker).options(num_cpus=0, max_concurrency=CALLS)  # the whole job needs the CPUs
    workers = [actor.remote(config, config.codec.weights) for _ in range(2)]
    alone = ShardWorker(config, config.codec.weights)

    def timed(work: Callable[[], Any], clips: int, threads: int = 1) -> Callable[[], float]:
        def thing() -> float:
            torch.set_num_threads(threads)
            shutil.rmtree(config.output.url, ignore_errors=True)  # what is committed is not encoded again
            work()
            return float(clips * _SECONDS)

        return thing

    def by_ray(count: int) -> None:
        ray.get([workers[i % count].encode.remote(shard, []) for i, shard in enumerate(shards)])

    def without_ray() -> None:
        with ThreadPoolExecutor(CALLS) as pool:
            list(pool.map(lambda shard: alone.encode(shard, []), shards))

    return {
        "gemm": _gemm(),
        "encodec": timed(lambda: [_encodec(codec, path) for path in few], len(few)),
        "encoder": timed(lambda: codec.encode([read_clip(str(path)) for path in few], _Q), len(few)),
        "1 worker without Ray": timed(without_ray, _CLIPS),
        "1 worker": timed(lambda: by_ray(1), _CLIPS),
        "encodec, 2 threads": timed(lambda: [_encodec(codec, path) for path in few], len(few), threads=2),
        "2 workers": timed(lambda: by_ray(2), _CLIPS),
        "whole job": timed(lambda: job.run(whole), _CLIPS * _COPIES),  # with two workers, their start, the manifest
    }


def _config(folder: str, audio: str) -> TokenizeConfig:
    overrides = [
        "source.kind=files",
        f"source.url={folder}/{audio}",
        f"codec.weights={folder}/{CODEC_FILE}",
        f"codec.bitrate_kbps={_KBPS}",
        f"shards.clips={_PER_SHARD}",
        "workers.count=2",
        f"output.url={folder}/tokens",
    ]
    return load_config(TokenizeConfig, "tokenize", None, overrides)


def _gemm() -> Callable[[], float]:
    """Return what measures the largest rate of multiplication that torch reaches here on one thread, in GFLOP/s."""
    a, b = torch.randn(_GEMM, _GEMM), torch.randn(_GEMM, _GEMM)

    def timed() -> float:
        torch.set_num_threads(1)
        for _ in range(50):
            torch.mm(a, b)
        return 50 * 2 * _GEMM**3 / 1e9

    return timed


def _print(facts: dict[str, Any]) -> None:
    print("\nhours of audio an hour                 median      min      max")
    rows = {**facts["times_real_time"], "limit of the arithmetic, one thread": facts["arithmetic_limit_one_thread"]}
    for name, values in rows.items():
        print(f"{name:36s} {np.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    print("\nratio, round by round")
    for name, values in facts["ratios"].items():
        print(f"{name:42s} {values['median']:6.3f}  ({values['min']:.3f} to {values['max']:.3f})")
    changed = ", ".join(f"{name} {share:.4%}" for name, share in facts["codes_changed"].items())
    print(f"\nshare of codes that differ from encodec's: {changed}")
