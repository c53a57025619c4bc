"""How fast one GPU trains the paper's encoder and tokenises, and where a step's time goes."""

import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
from megascale.tokenize.codec import calibrate
from megascale.tokenize.encoder import BatchedEncoder
from megascale.tokens import FRAMES_PER_SECOND, KBPS_PER_CODEBOOK, SAMPLE_RATE_HZ
from megascale.train.device import device_name, peak_memory_gib, peak_tflops
from megascale.train.engine import Engine, init_distributed
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig

PARTS = ("data", "forward", "backward", "optimizer")
_UNTIMED = 3  # updates that also start kernels and buffers; those that compile take them long


@dataclass(frozen=True)
class Sizes:
    """What is run. `device` is cuda but in tests."""

    device: str = "cuda"
    model: ModelConfig = field(default_factory=ModelConfig)
    seconds: float = 10.0
    micro_batches: tuple[int, ...] = (16, 32, 64, 128)
    compiled: tuple[bool, ...] = (False, True)
    updates: int = 20
    encoded_clips: int = 64
    encoded_codebooks: int = 16


@dataclass(frozen=True)
class Cell:
    """One way to train: ZeRO-1, bf16, no chunk drop, one micro-batch an update."""

    num_codebooks: int
    compiled: bool
    micro_batch: int
    tokens: str


def run(rounds: int, sizes: Sizes = Sizes()) -> Path:
    """Measure, print the tables, and write `runs/bench/gpu.json`; return its path. Raises ConfigError without a GPU."""
    if sizes.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench gpu: there is no CUDA GPU here")
    with tempfile.TemporaryDirectory() as folder:
        cells = []
        for num_codebooks in (2, 16):
            tokens = Path(folder, str(num_codebooks))
            most = max(sizes.micro_batches)
            write_tokens(tokens, num_codebooks, 4 * most, round(sizes.seconds * FRAMES_PER_SECOND), most)
            cells += [
                Cell(num_codebooks, compiled, micro_batch, str(tokens))
                for compiled in sizes.compiled
                for micro_batch in sizes.micro_batches
            ]
        progress = Progress("measuring", len(cells) + 1, unit="ways")
        trained = []
        for cell in cells:
            trained.append({**asdict(cell), **_apart(train, cell, rounds, sizes)})
            del trained[-1]["tokens"]
            progress.update(len(trained))
        encoded = _apart(encode, rounds, sizes)
        progress.update(len(cells) + 1)
        progress.close()
    facts = {
        "gpu": device_name(),
        "date": date.today().isoformat(),
        "training": trained,
        "tokenization": encoded,
        "sizes": {**asdict(sizes), "model": sizes.model.model_dump()},
        "rounds": rounds,
    }
    _print(facts)
    path = measure.write("gpu", facts, ["torch", "deepspeed", "encodec"])
    say(f"{rounds} rounds -> {path}")
    return path


def _apart(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call in a process of its own: what one way leaves on the GPU is not there for the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def train(cell: Cell, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Train; return, or say that the GPU's memory does not hold it:

    clips_per_second and mfu (None without a known peak), round by round, as training runs; data_wait_share of that time;
    seconds of an update by part, measured apart, as the device is waited for after each; peak_memory_gib.
    """
    try:
        return _train(cell, rounds, sizes)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


def _train(cell: Cell, rounds: int, sizes: Sizes) -> dict[str, Any]:
    init_distributed()
    model = MegaAudioFormer(sizes.model, cell.num_codebooks, seeding.torch_generator(0, "bench"))
    prepare_training(model, recompute=False, compile=cell.compiled)
    updates = (2 * rounds + 1) * sizes.updates + _UNTIMED
    engine = Engine(model, OptimConfig(), ZeroConfig(stage=1, precision="bf16"), cell.micro_batch, 1, updates)
    batches = prefetch(_batches(cell, sizes, engine.device).micro_batches, 0, updates)
    step, waited, work = 0, 0.0, np.zeros(len(Work._fields))

    def update() -> None:
        nonlocal step, waited, work
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        engine.on_part("data")
        sums = engine.train_step(step, micro_batches, masked_loss)
        work, step = work + [float(sums[name]) for name in Work._fields], step + 1

    def timed() -> float:
        started = time.perf_counter()
        for _ in range(sizes.updates):
            update()
        _wait()
        return time.perf_counter() - started

    for _ in range(_UNTIMED):
        update()
    _wait()
    waited = 0.0
    gc.collect()
    seconds, flops = [], []
    for _ in range(rounds):
        work = np.zeros(len(Work._fields))
        seconds.append(timed())
        flops.append(training_flops(sizes.model, cell.num_codebooks, Work(*work)))
    wait_share = waited / sum(seconds)
    peak = peak_tflops(device_name() or "", "bf16")
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
        "clips_per_second": [sizes.updates * cell.micro_batch / took for took in seconds],
        "mfu": None
        if peak is None
        else [each / took / (peak * 1e12) for each, took in zip(flops, seconds, strict=True)],
        "data_wait_share": wait_share,
        "seconds": {part: value / sizes.updates for part, value in spent.items()},
        "peak_memory_gib": peak_memory_gib(),
    }


def _batches(cell: Cell, sizes: Sizes, device: torch.device) -> PretrainBatches:
    config = DataConfig(
        url=cell.tokens, bitrate_kbps=cell.num_codebooks * KBPS_PER_CODEBOOK, clip_seconds=sizes.seconds, valid_share=0
    )
    folder = TokenFolder(config.url, config.bitrate_kbps)
    clips, _, shard_sizes = split_held_out(folder, 0)
    order = Order(shard_sizes, 0, default_streams(cell.micro_batch), cell.micro_batch)
    held = ResidentTokens(folder, clips, device)
    return PretrainBatches(
        folder,
        config,
        MaskConfig(),
        DropConfig(p=0),
        order,
        clips,
        cell.micro_batch,
        rank=0,
        world_size=1,
        resident=held,
    )


def encode(rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Encode clips with EnCodec; return hours of audio a second by precision, round by round, and the share of codes that
    bf16 changes, of codebook 0 and of all, None where that is more than tokenization allows."""
    samples = round(sizes.seconds * SAMPLE_RATE_HZ)
    clips = [
        synthesis.make_mixture(seeding.generator(0, "bench", i), i, sizes.seconds, SAMPLE_RATE_HZ).astype(np.float32)[
            :samples
        ]
        for i in range(sizes.encoded_clips)
    ]
    codec = calibrate(clips, sizes.encoded_codebooks, seed=0)
    encoders = {precision: BatchedEncoder(codec.model, sizes.device, precision) for precision in ("fp32", "bf16")}
    try:
        changed = encoders["bf16"].check_precision(clips, sizes.encoded_codebooks)
    except ConfigError as refused:
        say(str(refused))
        changed = None
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
        "   Q  compiled  clips    clips/s  (min to max)          MFU  wait   GiB  ms:"
        + "".join(f"{p:>11s}" for p in PARTS)
    )
    for row in facts["training"]:
        head = f"{row['num_codebooks']:4d} {'yes' if row['compiled'] else 'no':>9s} {row['micro_batch']:6d}"
        if row.get("out_of_memory"):
            print(f"{head}    out of memory")
            continue
        rates, mfu = row["clips_per_second"], row["mfu"]
        spread = f"({min(rates):.1f} to {max(rates):.1f})"
        print(
            f"{head} {np.median(rates):10.1f}  {spread:18s} {f'{np.median(mfu):.1%}' if mfu else '-':>7s} "
            f"{row['data_wait_share']:5.1%} {row['peak_memory_gib']:5.1f}     "
            + "".join(f"{1e3 * row['seconds'][part]:11.2f}" for part in PARTS)
        )
    encoded = facts["tokenization"]
    for precision, rates in encoded["hours_per_second"].items():
        print(
            f"EnCodec in {precision}: {np.median(rates):.3f} hours of audio a second ({min(rates):.3f} to {max(rates):.3f})"
        )
    changed = encoded["codes_changed_by_bf16"]
    if changed is not None:
        print(f"bf16 changes {changed[0]:.3%} of codebook 0's codes, {changed[1]:.3%} of all")
