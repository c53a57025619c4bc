"""How fast one GPU trains the paper's encoder and tokenises, and where a step's time goes.

Training is timed as the recipes run it: deterministic, with chunk drop, tokens streamed from shards (here on a local disk)
and prefetched. What determinism and streaming cost is measured where the most clips fit.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megascale import seeding, synthesis
from megascale.bench import measure
from megascale.bench.corpus import write_tokens
from megascale.data.folder import TokenFolder, split_held_out
from megascale.data.loader import DataConfig, PretrainBatches, prefetch
from megascale.data.order import Order, default_streams
from megascale.data.resident import ResidentTokens
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import ConfigError
from megascale.log import Progress, say
from megascale.model.config import ModelConfig
from megascale.model.cost import Work, training_flops
from megascale.model.mega_audioformer import MegaAudioFormer, prepare_training
from megascale.tasks.masked import masked_loss
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.encoder import MOST_CHANGED, BatchedEncoder
from megascale.tokens import FRAMES_PER_SECOND, KBPS_PER_CODEBOOK, SAMPLE_RATE_HZ
from megascale.train.device import device_name, peak_memory_gib, peak_tflops
from megascale.train.engine import Engine, init_distributed, make_deterministic
from megascale.train.metrics import Sums
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig

PARTS = ("data", "forward", "backward", "optimizer")
_UNTIMED = 6  # updates that also start kernels and compile: whole batches, and three that were dropped from


@dataclass(frozen=True)
class Sizes:
    """What is run. `device` is cuda but in tests."""

    device: str = "cuda"
    model: ModelConfig = field(default_factory=ModelConfig)
    codebooks: tuple[int, ...] = (2, 16)
    seconds: float = 10.0
    micro_batches: tuple[int, ...] = (16, 32, 64, 128)
    compiled: tuple[bool, ...] = (False, True)
    updates: int = 20
    encoded_clips: int = 64
    encoded_codebooks: int = 16


@dataclass(frozen=True)
class Cell:
    """One way to train: ZeRO-1, bf16, one micro-batch an update."""

    num_codebooks: int
    compiled: bool
    micro_batch: int
    tokens: Literal["streamed", "resident"] = "streamed"
    deterministic: bool = True


def run(rounds: int, sizes: Sizes = Sizes()) -> Path:
    """Measure, print the tables, and write `runs/bench/gpu.json` (after each way, too); return its path.

    What the GPU does not do is a row that says why. Raises ConfigError without a GPU.
    """
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench gpu: there is no CUDA GPU here")
    # asked elsewhere: this process is to take none of the GPU's memory
    name = apart(device_name) if sizes.device == "cuda" else None
    trained: list[dict[str, Any]] = []
    facts = {"gpu": name, "date": date.today().isoformat(), "training": trained, "tokenization": None}
    facts |= {"sizes": {**asdict(sizes), "model": sizes.model.model_dump()}, "rounds": rounds}
    each = len(sizes.compiled) * len(sizes.micro_batches)
    progress = Progress("measuring", len(sizes.codebooks) * (each + 2) + 1, unit="ways")

    def write() -> Path:
        progress.update(len(trained) + (facts["tokenization"] is not None))
        return measure.write("gpu", facts, ["torch", "deepspeed", "encodec"])

    for num_codebooks in sizes.codebooks:
        most = max(sizes.micro_batches)
        with tempfile.TemporaryDirectory() as url:
            write_tokens(Path(url), num_codebooks, 4 * most, round(sizes.seconds * FRAMES_PER_SECOND), most)
            cells = [Cell(num_codebooks, compiled, n) for compiled in sizes.compiled for n in sizes.micro_batches]
            measured = []
            for cell in cells:
                measured.append(asdict(cell) | apart(train, cell, url, rounds, sizes))
                trained.append(measured[-1])
                write()
            for cell in further(cells, measured):
                trained.append(asdict(cell) | apart(train, cell, url, rounds, sizes))
                write()
    facts["tokenization"] = apart(encode, rounds, sizes)
    path = write()
    progress.close()
    _print(facts)
    say(f"{rounds} rounds -> {path}")
    return path


def further(cells: list[Cell], measured: list[dict[str, Any]]) -> list[Cell]:
    """Return what else to measure: the cell of the most clips that fitted, eager if it can be, with its tokens resident
    on the GPU, and not deterministic. None if nothing fitted."""
    fitted = [cell for cell, row in zip(cells, measured, strict=True) if "failed" not in row]
    if not fitted:
        return []
    largest = max(fitted, key=lambda cell: (cell.micro_batch, not cell.compiled))
    return [replace(largest, tokens="resident"), replace(largest, deterministic=False)]


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: what one way leaves on the GPU is not there for the next.

    Returns what the call does, or {"failed": why} if CUDA fails (also for want of memory) or the process is killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_tried, call, *arguments).result()
        except BrokenProcessPool:
            return {"failed": "its process was killed"}


def _tried(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except RuntimeError as failure:  # cuBLAS's own want of memory, for one, has no class
        if "CUDA" not in str(failure):
            raise
        return {"failed": str(failure).splitlines()[0]}


def train(cell: Cell, url: str, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Train on a token folder. Returns:

    clips_per_second and mfu (None without a known peak), round by round; data_wait_share of that time; frames_per_clip,
    the mean after chunk drop; seconds of an update by part, measured apart, as the device is waited for after each
    (forward also copies the batch there); peak_memory_gib; and whether torch was deterministic.
    """
    if cell.deterministic:
        make_deterministic()
    init_distributed()
    model = MegaAudioFormer(sizes.model, cell.num_codebooks, seeding.torch_generator(0, "bench"))
    prepare_training(model, recompute=False, compile=cell.compiled)
    updates = (rounds + 1) * sizes.updates + _UNTIMED
    engine = Engine(model, OptimConfig(), ZeroConfig(stage=1, precision="bf16"), cell.micro_batch, 1, updates)
    batches = prefetch(make_batches(cell, url, sizes, engine.device).micro_batches, 0, updates)
    step, waited, sums = 0, 0.0, Sums()

    def update() -> None:
        nonlocal step, waited
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        engine.on_part("data")
        sums.add(engine.train_step(step, micro_batches, masked_loss))
        step += 1

    def timed() -> tuple[float, Work]:
        started = time.perf_counter()
        for _ in range(sizes.updates):
            update()
        taken = sums.take()  # as training does at each report: it waits for the device
        return time.perf_counter() - started, Work(*(float(taken[name]) for name in Work._fields))

    for _ in range(_UNTIMED):
        update()
    sums.take()
    waited = 0.0
    gc.collect()
    measured = [timed() for _ in range(rounds)]
    seconds = [took for took, _ in measured]
    flops = [training_flops(sizes.model, cell.num_codebooks, work) for _, work in measured]
    wait_share = waited / sum(seconds)
    peak = peak_tflops(device_name() or "", "bf16")
    clips = sizes.updates * cell.micro_batch
    spent = dict.fromkeys(PARTS, 0.0)
    since = time.perf_counter()

    def note(part: str) -> None:
        nonlocal since
        _wait()
        now = time.perf_counter()
        spent[part], since = spent[part] + now - since, now

    engine.on_part = note
    timed()
    return {
        "clips_per_second": [clips / took for took in seconds],
        "mfu": None
        if peak is None
        else [each / took / (peak * 1e12) for each, took in zip(flops, seconds, strict=True)],
        "data_wait_share": wait_share,
        "frames_per_clip": sum(work.frames for _, work in measured) / (rounds * clips),
        "seconds": {part: value / sizes.updates for part, value in spent.items()},
        "peak_memory_gib": peak_memory_gib(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def make_batches(cell: Cell, url: str, sizes: Sizes, device: torch.device) -> PretrainBatches:
    """Return a cell's batches: made on the host of shards that are read as they are needed, or of tokens on the device."""
    bitrate_kbps = cell.num_codebooks * KBPS_PER_CODEBOOK
    config = DataConfig(url=url, bitrate_kbps=bitrate_kbps, clip_seconds=sizes.seconds, valid_share=0)
    folder = TokenFolder(url, bitrate_kbps)
    clips, _, shard_sizes = split_held_out(folder, 0)
    order = Order(shard_sizes, 0, default_streams(cell.micro_batch), cell.micro_batch)
    held = ResidentTokens(folder, clips, device) if cell.tokens == "resident" else None
    return PretrainBatches(
        folder, config, MaskConfig(), DropConfig(), order, clips, cell.micro_batch, rank=0, world_size=1, resident=held
    )


def encode(rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Encode clips with EnCodec; return hours of audio a second by precision, round by round, and the share of codes that
    bf16 changes, of codebook 0 and of all."""
    samples = round(sizes.seconds * SAMPLE_RATE_HZ)
    clips = [
        synthesis.make_mixture(seeding.generator(0, "bench", i), i, sizes.seconds, SAMPLE_RATE_HZ).astype(np.float32)[
            :samples
        ]
        for i in range(sizes.encoded_clips)
    ]
    codec = calibrate(clips, sizes.encoded_codebooks, seed=0)
    encoders = {precision: BatchedEncoder(codec.model, sizes.device, precision) for precision in ("fp32", "bf16")}
    changed = encoders["bf16"].shares_changed(clips, sizes.encoded_codebooks)
    rates: dict[str, list[float]] = {precision: [] for precision in encoders}
    for number in range(rounds + 1):
        for precision, encoder in encoders.items():
            _wait()
            started = time.perf_counter()
            encoder.encode(clips, sizes.encoded_codebooks)
            _wait()
            if number:
                hours = len(clips) * sizes.seconds / 3600
                rates[precision].append(hours / (time.perf_counter() - started))
    return {"hours_per_second": rates, "codes_changed_by_bf16": changed}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print(facts: dict[str, Any]) -> None:
    print(f"\n{facts['gpu'] or 'CPU'}, {facts['date']}: training in bf16, clips of {facts['sizes']['seconds']:g} s")
    print(
        "   Q  compiled  clips    tokens  deterministic   clips/s  (min to max)          MFU  wait   GiB  ms:"
        + "".join(f"{p:>11s}" for p in PARTS)
    )
    for row in facts["training"]:
        compiled, deterministic = ("yes" if row[name] else "no" for name in ("compiled", "deterministic"))
        head = f"{row['num_codebooks']:4d} {compiled:>9s} {row['micro_batch']:6d}  {row['tokens']:>8s} {deterministic:>14s}"
        if "failed" in row:
            print(f"{head}   {row['failed']}")
            continue
        rates, mfu = row["clips_per_second"], row["mfu"]
        spread = f"({min(rates):.1f} to {max(rates):.1f})"
        print(
            f"{head} {np.median(rates):9.1f}  {spread:18s} {f'{np.median(mfu):.1%}' if mfu else '-':>7s} "
            f"{row['data_wait_share']:5.1%} {row['peak_memory_gib']:5.1f}     "
            + "".join(f"{1e3 * row['seconds'][part]:11.2f}" for part in PARTS)
        )
    encoded = facts["tokenization"]
    if "failed" in encoded:
        print(f"EnCodec: {encoded['failed']}")
        return
    for precision, rates in encoded["hours_per_second"].items():
        print(
            f"EnCodec in {precision}: {np.median(rates):.3f} hours of audio a second ({min(rates):.3f} to {max(rates):.3f})"
        )
    first, every = encoded["codes_changed_by_bf16"]
    print(
        f"bf16 changes {first:.3%} of codebook 0's codes, of which tokenization allows {MOST_CHANGED:.1%}, "
        f"and {every:.3%} of all"
    )
