"""How fast clips are loaded, beside plain `webdataset` on `.npy` members: one thread, from the page cache and the disk."""

import io
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale import seeding
from megascale.bench import measure
from megascale.bench.corpus import write_tokens
from megascale.data.folder import TokenFolder, split_held_out
from megascale.data.loader import DataConfig, PretrainBatches
from megascale.data.order import Order, default_streams
from megascale.data.resident import ResidentTokens
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.log import say
from megascale.tokens import FRAMES_PER_SECOND, KBPS_PER_CODEBOOK

CODEBOOKS = (2, 16)

THINGS = {
    "webdataset .npy": "WebDataset(tars), np.load of each member, batched: int16 in the order of the tar, not cropped",
    "streaming, codes": "int16 of random crops, clips in training's order; shards mapped, their hashes checked before",
    "streaming, batches": "all that training gets: order, crop, chunk drop (half of the batches), mask, int64",
    "resident, codes": "as streaming, from int16 codes in memory (data.resident=cpu)",
    "resident, batches": "as streaming, from int16 codes in memory",
    "webdataset .npy, cold": "as above, files dropped from the page cache",
    "streaming, codes, cold": "as above, files dropped from the page cache, shards mapped anew",
    "streaming, codes, first": "files dropped from the page cache, folder opened anew: indexes, hashes, headers, then codes",
}


@dataclass(frozen=True)
class Sizes:
    """What is loaded: clips, for each of `CODEBOOKS` more than a processor's cache holds, of which webdataset reads the first
    so many. `repeats`: times over all clips in one run, where that takes milliseconds."""

    clips: tuple[int, int] = (65536, 8192)
    rival_clips: int = 8192
    clips_per_shard: int = 1024
    batch: int = 256
    frames: int = 750
    stored_frames: int = 800  # so that there is something to crop
    repeats: int = 2


def run(rounds: int, sizes: Sizes = Sizes()) -> Path:
    """Measure, print the table, and write `runs/bench/load.json`; return its path."""
    torch.set_num_threads(1)
    measure.FOLDER.mkdir(parents=True, exist_ok=True)
    things: dict[str, Callable[[], float]] = {}
    before: dict[str, Callable[[], None]] = {}
    # not in the folder for temporary files, which may be memory
    with tempfile.TemporaryDirectory(dir=measure.FOLDER) as folder:
        for num_codebooks, num_clips in zip(CODEBOOKS, sizes.clips, strict=True):
            say(f"writing {num_clips} clips of {num_codebooks} codebooks")
            place = Path(folder, str(num_codebooks))
            _write(place, num_codebooks, num_clips, sizes)
            for name, (thing, first) in _things(place, num_codebooks, sizes).items():
                things[f"Q={num_codebooks} {name}"], before[f"Q={num_codebooks} {name}"] = thing, first
        rates = measure.in_turn("loading", things, rounds, before)
    facts = {
        "clips_per_core_second": {name: sorted(values) for name, values in rates.items()},
        "ratios": {f"Q={q} {name} / {rival}": r for q in CODEBOOKS for name, rival, r in _ratios(rates, f"Q={q} ")},
        "what": THINGS,
        "sizes": sizes.__dict__,
        "rounds": rounds,
    }
    _print(facts)
    path = measure.write("load", facts, ["torch", "numpy", "webdataset"])
    say(f"{rounds} rounds -> {path}")
    return path


def _ratios(rates: dict[str, list[float]], prefix: str) -> Iterable[tuple[str, str, dict[str, float]]]:
    rivals = ("webdataset .npy", "webdataset .npy, cold")
    for name in THINGS:
        if name not in rivals:
            rival = rivals[name.endswith(("cold", "first"))]
            yield name, rival, measure.ratio(rates[prefix + name], rates[prefix + rival])


def _write(folder: Path, num_codebooks: int, num_clips: int, sizes: Sizes) -> None:
    """Write clips as a token folder, and the first of them as tars of `.npy`."""
    import webdataset  # of the extra `dev`; other benchmarks do without

    clips = write_tokens(folder, num_codebooks, num_clips, sizes.stored_frames, sizes.clips_per_shard)
    for first in range(0, sizes.rival_clips, sizes.clips_per_shard):
        with webdataset.TarWriter(str(folder / f"npy-{first:08d}.tar"), encoder=False) as tar:
            for key, codes_QT in clips[first : first + sizes.clips_per_shard]:
                array = io.BytesIO()
                np.save(array, np.ascontiguousarray(codes_QT.T[: sizes.frames]))
                tar.write({"__key__": key, "npy": array.getvalue()})


def _things(place: Path, num_codebooks: int, sizes: Sizes) -> dict[str, tuple[Callable[[], float], Callable[[], None]]]:
    """Return what is timed, and what is done before without being timed."""
    kbps = num_codebooks * KBPS_PER_CODEBOOK
    folder = TokenFolder(str(place), kbps)
    train, _, shard_sizes = split_held_out(folder, 0.0)
    order = Order(shard_sizes, 0, default_streams(sizes.batch), sizes.batch)
    resident = ResidentTokens(folder, train, torch.device("cpu"))
    _check_same(place, folder, resident, sizes)
    config = DataConfig(url=str(place), bitrate_kbps=kbps, clip_seconds=sizes.frames / FRAMES_PER_SECOND)
    steps, lengths_B = range(order.batches_per_epoch), np.full(sizes.batch, sizes.frames)
    starts_B = seeding.generator(0, "bench crops").integers(0, sizes.stored_frames - sizes.frames + 1, sizes.batch)
    clips = [order.batch(step)[1] for step in steps]
    amount = float(len(steps) * sizes.batch)

    def webdataset_npy() -> float:
        return float(sum(len(codes_BTQ) for (codes_BTQ,) in _plain(place, sizes.batch)))

    def codes(source: TokenFolder | ResidentTokens, repeats: int = sizes.repeats) -> float:
        for _ in range(repeats):
            for clips_B in clips:
                source.codes(clips_B, starts_B, lengths_B)
        return amount * repeats

    def batches(held: ResidentTokens | None) -> float:
        loader = PretrainBatches(
            folder, config, MaskConfig(), DropConfig(), order, train, sizes.batch, rank=0, world_size=1, resident=held
        )
        for step in steps:
            loader.micro_batches(step)
        return amount

    def first_time() -> float:
        opened = TokenFolder(str(place), kbps)
        try:
            return codes(opened, repeats=1)
        finally:
            opened.close()

    def cold() -> None:
        folder.close()  # mapped pages are not dropped
        _drop_from_page_cache(place)

    def warm() -> None:
        for path in place.iterdir():
            path.read_bytes()

    return {
        "webdataset .npy": (webdataset_npy, warm),
        "streaming, codes": (lambda: codes(folder), warm),
        "streaming, batches": (lambda: batches(None), warm),
        "resident, codes": (lambda: codes(resident), warm),
        "resident, batches": (lambda: batches(resident), warm),
        "webdataset .npy, cold": (webdataset_npy, cold),
        "streaming, codes, cold": (lambda: codes(folder, repeats=1), cold),
        "streaming, codes, first": (first_time, cold),
    }


def _plain(place: Path, batch: int) -> Iterable[tuple[np.ndarray]]:
    """Read `.npy` members as webdataset's documentation shows, batched; nothing is shuffled, which is faster. Its own
    `decode()` is left out because it may run code that a tar holds; `np.load` is what it would call."""
    import webdataset

    tars = sorted(str(path) for path in place.glob("npy-*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=False)
    return dataset.to_tuple("npy").map_tuple(lambda data: np.load(io.BytesIO(data))).batched(batch)


def _check_same(place: Path, folder: TokenFolder, resident: ResidentTokens, sizes: Sizes) -> None:
    """Every way has to give the same codes, before it is timed."""
    first = 0
    for (theirs_BTQ,) in _plain(place, sizes.batch):
        clips = np.arange(first, first + len(theirs_BTQ))
        for source in (folder, resident):
            ours_BTQ = source.codes(clips, np.zeros(len(clips), np.int64), np.full(len(clips), sizes.frames))
            assert np.array_equal(ours_BTQ, theirs_BTQ), "the loaders read different codes"
        first += len(theirs_BTQ)
    assert first == sizes.rival_clips, "webdataset read another number of clips"


def _drop_from_page_cache(folder: Path) -> None:
    """Let the next read of a folder's files come from the disk; files that are mapped stay."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _print(facts: dict[str, Any]) -> None:
    print("\nclips per core-second                      median        min        max    / webdataset, round by round")
    for name, values in facts["clips_per_core_second"].items():
        found = next((r for key, r in facts["ratios"].items() if key.startswith(f"{name} / ")), None)
        over = f"{found['median']:10.1f}  ({found['min']:.1f} to {found['max']:.1f})" if found else ""
        print(f"{name:36s} {np.median(values):12,.0f} {min(values):10,.0f} {max(values):10,.0f} {over}")
    print()
    for name, what in facts["what"].items():
        print(f"{name}: {what}")
