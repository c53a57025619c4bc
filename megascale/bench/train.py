"""A training step of our model beside the same model computed plainly, a flat Transformer, ModernBERT and MEGABYTE.

B batch, T frames, Q codebooks. One thread, fp32, eager: forward, backward, and a fused AdamW step, in turn (`rivals` says how
they are made comparable). The local stage with its heads is timed alone, too, given the global encoder's output.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megascale.bench import measure, rivals
from megascale.bench.rivals import FLAT, MEGABYTE, MODERNBERT, OURS, PLAIN, Batch
from megascale.log import say
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters
from megascale.tokens import FRAMES_PER_SECOND

_MASKED = 0.25
_TRAINING_PASSES = 3  # backward makes two gradients of each product
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
            table.append(_measure(plan, num_codebooks, num_frames, [OURS, PLAIN, FLAT, *peers], rounds, count=True))
            _print(table[-1])  # the plots take as long again
        matmul_rate = _matmul_rate()
        print(f"\ntorch's best matrix product: {matmul_rate / 1e9:.1f} GFLOP/s")
        few = [OURS, FLAT, *(name for name in peers if name in (MODERNBERT, MEGABYTE))]
        fewer_rounds = max(1, rounds // 2)
        by_length = [_measure(plan, plan.table[0][0], t, few, fewer_rounds) for t in plan.lengths]
        by_codebooks = [_measure(plan, q, plan.codebooks_frames, few, fewer_rounds) for q in plan.codebooks]
    finally:
        torch.set_num_threads(threads)
    versions = [*_VERSIONS, *(_PEER_VERSIONS[name] for name in rivals.PEERS if set(rivals.PEERS[name]) & set(peers))]
    facts = {
        "rounds": rounds,
        "model": plan.model.model_dump(),
        "batch": plan.batch,
        "table": table,
        "matmul_rate": matmul_rate,
    }
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


def _measure(
    plan: Plan, num_codebooks: int, num_frames: int, names: Sequence[str], rounds: int, count: bool = False
) -> dict[str, Any]:
    """Time a step of each, and return seconds, and ratios to ours where above 1 means that ours is faster.

    `count`: also count operations, which takes a forward pass each.
    """
    gc.collect()  # models of the measurement before: gigabytes
    batch = draw_batch(plan.batch, num_frames, num_codebooks)
    ours = rivals.build(OURS, plan.model, num_codebooks, num_frames)
    assert isinstance(ours.model, MegaAudioFormer), "what is called ours is ours"
    losses: dict[str, Callable[[], Tensor]] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    parameters: dict[str, int] = {}
    for name in names:
        if name == OURS:
            rival = ours
        elif name == PLAIN:
            rival = rivals.plain(ours.model)
        else:
            rival = rivals.build(name, plan.model, num_codebooks, num_frames)
        losses[name], parameters[name] = partial(rival.loss, batch), count_parameters(rival.model)
        if name == PLAIN:
            optimizers[name] = optimizers[OURS]
        else:
            optimizers[name] = torch.optim.AdamW(rival.model.parameters(), fused=True)
    if PLAIN in names:
        losses |= _local_stage(ours.model, batch, plan.model.width)
    steps = {name: _step(loss, optimizers.get(name), ours.model) for name, loss in losses.items()}
    operations = {name: _forward_operations(loss) for name, loss in losses.items()} if count else {}
    rates = measure.in_turn(f"Q = {num_codebooks}, T = {num_frames}", steps, rounds)
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
        "operations": {name: _TRAINING_PASSES * value for name, value in operations.items()},
        "operations_times_ours": {
            name: value / operations[base[name]] for name, value in operations.items() if name not in (OURS, _LOCAL)
        },
        "parameters": parameters,
    }


def _step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None, model: MegaAudioFormer
) -> Callable[[], float]:
    """Return a training step; without an optimizer, the gradients of a part of our model are made and thrown away."""

    def step() -> float:
        loss().backward()
        if optimizer is None:
            model.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()
        return 1.0

    return step


def _local_stage(model: MegaAudioFormer, batch: Batch, width: int) -> dict[str, Callable[[], Tensor]]:
    """Return the loss given the global encoder's output, of whose forward and backward it is."""
    shape = batch["codes_BTQ"].shape
    x_BTD = torch.randn(*shape[:2], width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    frame_P = batch["masked_BTQ"].any(dim=-1).flatten().nonzero()[:, 0]
    x_PD = x_BTD.detach().flatten(0, 1)[frame_P].requires_grad_()

    def given(x: Tensor) -> Tensor:
        # torch's counter of operations cannot take what wants a gradient where there are none
        return x if torch.is_grad_enabled() else x.detach()

    return {
        _LOCAL: lambda: model.predict(given(x_PD), frame_P, batch["codes_BTQ"], batch["masked_BTQ"]).loss_Q.mean(),
        _LOCAL_PLAIN: lambda: rivals.plain_loss(model, given(x_BTD), batch),
    }


def _forward_operations(loss: Callable[[], Tensor]) -> int:
    """Count the operations of matrix products, attention's included: all pairs, also those a causal mask hides."""

    def attention(
        q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int], *rest: Any, **more: Any
    ) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    # the CPU's fused attention, which torch does not know how to count
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        loss()
    return counter.get_total_flops()


def _matmul_rate() -> float:
    """Return operations a second of torch's best matrix product here."""
    best = 0.0
    for size in (768, 1536, 3072):
        a = torch.randn(size, size)
        for _ in range(5):
            started = time.perf_counter()
            a @ a
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _print(facts: dict[str, Any]) -> None:
    print(
        f"\nQ = {facts['codebooks']}, T = {facts['frames']}".ljust(38) + "seconds a step: median     min     max",
        end="",
    )
    print("    times ours                operations times ours   GFLOP/s")
    for name, values in facts["seconds"].items():
        median = float(np.median(values))
        line = f"{name:36s} {median:23.3f} {values[0]:7.3f} {values[-1]:7.3f}"
        if name in facts["times_ours"]:
            ratio = facts["times_ours"][name]
            line += f"    {ratio['median']:6.2f}  ({ratio['min']:.2f} to {ratio['max']:.2f})".ljust(28)
            line += f"{facts['operations_times_ours'][name]:19.2f}"
        else:
            line += " " * 47
        print(f"{line} {facts['operations'][name] / median / 1e9:9.1f}")


def _plot(name: str, points: list[dict[str, Any]], x: Sequence[float], label: str) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, rival in enumerate(points[0]["seconds"]):
        y = [np.median(point["seconds"][rival]) for point in points]
        line = "--" if rival == MODERNBERT else "-"  # it lies on the flat Transformer
        axes.plot(x, y, line, marker="o", lw=2.5 if rival == OURS else 1.5, color=f"C{number}", label=rival)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a training step, one thread")
    axes.set_xticks(list(x), [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(measure.FOLDER / f"{name}.png", dpi=150)
