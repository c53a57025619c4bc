"""A training step of our model beside the same model computed plainly, a flat Transformer, ModernBERT and MEGABYTE.

B batch, T frames, Q codebooks. One thread, fp32, eager: forward, backward, and a fused AdamW step, in turn (`rivals` says how
they are made comparable). The local stage with its heads is timed alone, too, given the global encoder's output.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from megascale.bench import measure, rivals
from megascale.bench.rivals import FLAT, MEGABYTE, MODERNBERT, OURS, PLAIN, Batch
from megascale.log import say
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters
from megascale.tokens import FRAMES_PER_SECOND

_MASKED = 0.25
_LOCAL, _LOCAL_PLAIN = "local stage of ours", "local stage, computed plainly"
_VERSIONS = ("torch", "numpy", "matplotlib")
_PEER_VERSIONS = {"transformers": "transformers", "MEGABYTE_pytorch": "megabyte-pytorch"}


@dataclass(frozen=True)
class Plan:
    """What is timed: (Q, T) of the table; of the plots, clip lengths (frames) at the first Q, and Qs at one length.

    One clip a step: the paper's model takes seconds for it on one thread.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    table: tuple[tuple[int, int], ...] = ((2, 750), (16, 250))
    lengths: tuple[int, ...] = (75, 150, 300, 600, 1200)
    codebooks: tuple[int, ...] = (2, 4, 8, 16)
    codebooks_frames: int = 75
    batch: int = 1


def run(rounds: int, plan: Plan | None = None) -> Path:
    """Measure, print the table, draw `runs/bench/train-*.png`, write `runs/bench/train.json`; return its path."""
    plan = plan or Plan()
    peers = rivals.installed()
    for package in rivals.PEERS:
        if not set(rivals.PEERS[package]) & set(peers):
            say(f"{package} is not installed, and left out; `make bench-train` installs it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = []
        for num_codebooks, num_frames in plan.table:
            table.append(_measure(plan, num_codebooks, num_frames, [OURS, PLAIN, FLAT, *peers], rounds))
            _print(table[-1])  # the plots take as long again
        few = [OURS, FLAT, *(name for name in peers if name in (MODERNBERT, MEGABYTE))]
        fewer_rounds = max(1, rounds // 2)
        by_length = [_measure(plan, plan.table[0][0], t, few, fewer_rounds) for t in plan.lengths]
        by_codebooks = [_measure(plan, q, plan.codebooks_frames, few, fewer_rounds) for q in plan.codebooks]
    finally:
        torch.set_num_threads(threads)
    versions = [*_VERSIONS, *(_PEER_VERSIONS[name] for name in rivals.PEERS if set(rivals.PEERS[name]) & set(peers))]
    facts = {"rounds": rounds, "model": plan.model.model_dump(), "batch": plan.batch, "table": table}
    facts |= {"by_length": by_length, "by_codebooks": by_codebooks, "plot_rounds": fewer_rounds}
    path = measure.write("train", facts, versions)
    seconds = [facts["frames"] / FRAMES_PER_SECOND for facts in by_length]
    _plot("train-length", by_length, seconds, f"clip, seconds (Q = {plan.table[0][0]})")
    length = f"{plan.codebooks_frames / FRAMES_PER_SECOND:g} s"
    _plot("train-codebooks", by_codebooks, plan.codebooks, f"codebooks Q ({length} of audio)")
    say(f"{rounds} rounds -> {path}, {path.parent}/train-length.png, {path.parent}/train-codebooks.png")
    return path


def draw_batch(batch: int, num_frames: int, num_codebooks: int) -> Batch:
    """Draw random codes_BTQ, of which a quarter of each codebook of each clip is masked."""
    rng = torch.Generator().manual_seed(0)
    shape = (batch, num_frames, num_codebooks)
    return {
        "codes_BTQ": torch.randint(1024, shape, generator=rng),
        "masked_BTQ": torch.rand(shape, generator=rng).argsort(dim=1) < max(1, round(_MASKED * num_frames)),
        "positions_BT": torch.arange(num_frames).expand(batch, -1),
    }


def _measure(plan: Plan, num_codebooks: int, num_frames: int, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time a step of each, and return seconds, and ratios to ours where above 1 means that ours is faster."""
    gc.collect()  # models of the measurement before: gigabytes
    batch = draw_batch(plan.batch, num_frames, num_codebooks)
    ours = rivals.build(OURS, plan.model, num_codebooks, num_frames)
    assert isinstance(ours.model, MegaAudioFormer), "what is called ours is ours"
    optimizer = _optimizer(ours.model)
    things, parameters = {OURS: _step(ours.loss, batch, optimizer)}, {OURS: count_parameters(ours.model)}
    for name in names[1:]:
        if name == PLAIN:
            things[name] = _step(rivals.plain(ours.model).loss, batch, optimizer)
            things |= _local_stage(ours.model, batch, plan.model.width)
            continue
        rival = rivals.build(name, plan.model, num_codebooks, num_frames)
        things[name], parameters[name] = (
            _step(rival.loss, batch, _optimizer(rival.model)),
            count_parameters(rival.model),
        )
    rates = measure.in_turn(f"Q = {num_codebooks}, T = {num_frames}", things, rounds)
    base = {name: _LOCAL if name == _LOCAL_PLAIN else OURS for name in rates}
    return {
        "codebooks": num_codebooks,
        "frames": num_frames,
        "seconds": {name: sorted(1 / rate for rate in values) for name, values in rates.items()},
        "times_ours": {
            name: measure.ratio(rates[base[name]], values)
            for name, values in rates.items()
            if name not in (OURS, _LOCAL)
        },
        "parameters": parameters,
    }


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _step(loss: Callable[[Batch], Tensor], batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    def step() -> float:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    return step


def _local_stage(model: MegaAudioFormer, batch: Batch, width: int) -> dict[str, Callable[[], float]]:
    """Forward and backward of all that comes after the global encoder."""
    shape = batch["codes_BTQ"].shape
    x_BTD = torch.randn(*shape[:2], width, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def lean() -> float:
        model.predict(x_BTD, batch["codes_BTQ"], batch["masked_BTQ"]).loss_Q.mean().backward()
        return clear()

    def plain() -> float:
        rivals.plain_loss(model, x_BTD, batch).backward()
        return clear()

    def clear() -> float:
        model.zero_grad()
        x_BTD.grad = None
        return 1.0

    return {_LOCAL: lean, _LOCAL_PLAIN: plain}


def _print(facts: dict[str, Any]) -> None:
    print(
        f"\nQ = {facts['codebooks']}, T = {facts['frames']}        seconds a step: median     min     max    times ours"
    )
    for name, values in facts["seconds"].items():
        line = f"{name:36s} {np.median(values):9.3f} {values[0]:7.3f} {values[-1]:7.3f}"
        if name in facts["times_ours"]:
            ratio = facts["times_ours"][name]
            line += f"    {ratio['median']:6.2f}  ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(line)


def _plot(name: str, points: list[dict[str, Any]], x: Sequence[float], label: str) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, rival in enumerate(points[0]["seconds"]):
        y = [np.median(point["seconds"][rival]) for point in points]
        axes.plot(x, y, marker="o", lw=2.5 if rival == OURS else 1.5, color=f"C{number}", label=rival)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a training step, one thread")
    axes.set_xticks(list(x), [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(measure.FOLDER / f"{name}.png", dpi=150)
