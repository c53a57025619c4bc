"""How pretraining scales: one and two ranks measured here, one to 1,024 GPUs on paper."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megascale import seeding
from megascale.bench import measure
from megascale.bench.corpus import write_tokens
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import MegascaleError
from megascale.log import Progress, read_metrics, say
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters
from megascale.tasks.plan import Plan, mean_flops
from megascale.tokens import FRAMES_PER_SECOND
from megascale.train.communication import Cluster, sent_bytes, step_time

_LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
_UNTIMED = 2  # updates that also start threads and buffers

# what the table on paper is for: configs/pretrain/paper_*.yaml
_SECONDS, _GLOBAL_BATCH = 10, 1024
_MICRO_BATCH = {2: 64, 16: 32}
_GPUS = tuple(2**power for power in range(11))
# H100 SXM by NVIDIA's data sheet: 989.4 TFLOP/s of dense bf16, 3.35 TB/s, 900 GB/s of NVLink both ways; a 400 Gbit/s card
# for each GPU, as in its DGX. Latency is a guess; MFU is assumed, as `--dry-run` assumes it.
CLUSTER = Cluster(
    peak_tflops=989.4,
    mfu=0.4,
    memory_gb_per_second=3350,
    gpus_per_node=8,
    node_gb_per_second=450,
    network_gb_per_second=8 * 50,
    latency_seconds=10e-6,
)


@dataclass(frozen=True)
class Sizes:
    """What is trained here; a clip takes a core about a second."""

    layers: int = 4
    width: int = 384
    seconds: float = 10.0
    global_batch: int = 8
    updates: int = 5


def run(rounds: int, sizes: Sizes = Sizes()) -> Path:
    """Measure, print the tables, and write `runs/bench/scale.json`; return its path."""
    rates: dict[str, list[float]] = {"1 rank": [], "2 ranks": []}
    progress = Progress("pretraining", 2 * rounds, unit="runs")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens")
        write_tokens(tokens, 2, 64, round(sizes.seconds * FRAMES_PER_SECOND), 16)
        for number in range(rounds):
            for place, found in enumerate(rates.values(), start=1):
                found.append(_clips_per_second(tokens, Path(folder, f"{number}-{place}"), place, sizes))
                progress.update(2 * number + place)
    progress.close()
    facts = {
        "clips_per_second": {name: sorted(values) for name, values in rates.items()},
        "ratios": {"2 ranks / 1 rank": measure.ratio(rates["2 ranks"], rates["1 rank"])},
        "sizes": sizes.__dict__,
        "rounds": rounds,
        "cluster": CLUSTER.__dict__,
        "on_paper": {f"Q={q}": on_paper(q, CLUSTER) for q in (2, 16)},
    }
    _print(facts)
    path = measure.write("scale", facts, ["torch", "deepspeed"])
    say(f"{rounds} rounds -> {path}")
    return path


def _clips_per_second(tokens: Path, output: Path, ranks: int, sizes: Sizes) -> float:
    """Pretrain with the same recipe on so many ranks, one thread each; return the rate of its updates, start left out."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    overrides = [
        *(f"data.url={tokens}", f"output.url={output}", "data.bitrate_kbps=1.5", "data.valid_share=0"),
        *(f"data.clip_seconds={sizes.seconds}", f"model.layers={sizes.layers}", f"model.width={sizes.width}"),
        *("model.heads=6", f"model.mlp_width={4 * sizes.width}", "model.local_width=96", "model.local_heads=2"),
        *(f"train.global_batch={sizes.global_batch}", f"train.micro_batch={sizes.global_batch // 2}"),
        *(f"train.steps={sizes.updates + _UNTIMED}", "drop.p=0", "log.every=1", "log.tensorboard=false"),
    ]
    line = [
        sys.executable,
        *launcher,
        str(_LAUNCH),
        str(_LAUNCH.parents[1] / "configs/pretrain/small.yaml"),
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MegascaleError(f"pretraining on {ranks} ranks ended with {done.returncode}: {done.stderr[-1000:]}")
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "train/seconds" in row][_UNTIMED:]
    return sum(row["train/clips"] for row in rows) / sum(row["train/seconds"] for row in rows)


def on_paper(num_codebooks: int, cluster: Cluster) -> dict[str, Any]:
    """Return what the paper's encoder costs, and how its recipe scales with ZeRO-1 in bf16.

    Returns:
        `flops` of a clip, forward and backward; `sent_bytes` by ZeRO stage, of each of 8 GPUs an update; and `rows`, one for
        each number of GPUs that divides the global batch: clips and seconds of an update by part, MFU, clips per second, and
        `efficiency`, clips per second over that of one GPU times the number.
    """
    model = ModelConfig()
    num_weights = count_parameters(MegaAudioFormer(model, num_codebooks, seeding.torch_generator(0, "bench")))
    flops = mean_flops(_plan(model, num_codebooks, num_weights, cluster))
    rows: list[dict[str, float]] = []
    for ranks in _GPUS:
        share = _GLOBAL_BATCH // ranks
        accumulation = -(-share // _MICRO_BATCH[num_codebooks])
        took = step_time(flops * share, num_weights, 1, "bf16", ranks, accumulation, cluster)
        rate = _GLOBAL_BATCH / sum(took)
        row = {"gpus": ranks, "clips": share, **took._asdict(), "mfu": cluster.mfu * took.compute / sum(took)}
        first = rows[0]["clips_per_second"] if rows else rate
        rows.append({**row, "clips_per_second": rate, "efficiency": rate / (ranks * first)})
    accumulation = _GLOBAL_BATCH // 8 // _MICRO_BATCH[num_codebooks]
    sent = {str(stage): sent_bytes(num_weights, stage, "bf16", 8, accumulation) for stage in (1, 2, 3)}
    return {"weights": num_weights, "flops": flops, "accumulation_on_8": accumulation, "sent_bytes": sent, "rows": rows}


def _plan(model: ModelConfig, num_codebooks: int, num_weights: int, cluster: Cluster) -> Plan:
    return Plan(
        model=model,
        num_codebooks=num_codebooks,
        num_frames=_SECONDS * FRAMES_PER_SECOND,
        mask=MaskConfig(),
        drop=DropConfig(),
        num_weights=num_weights,
        num_global_weights=num_weights,
        precision="bf16",
        micro_batch=_MICRO_BATCH[num_codebooks],
        num_clips=_GLOBAL_BATCH,
        mfu=cluster.mfu,
        peak_tflops=cluster.peak_tflops,
    )


def _print(facts: dict[str, Any]) -> None:
    print("\nclips a second, one thread each    median      min      max")
    for name, values in facts["clips_per_second"].items():
        print(f"{name:32s} {np.median(values):8.3f} {min(values):8.3f} {max(values):8.3f}")
    found = facts["ratios"]["2 ranks / 1 rank"]
    print(f"2 ranks / 1 rank: {found['median']:.3f}  ({found['min']:.3f} to {found['max']:.3f})")
    print(
        f"\non paper: {CLUSTER.peak_tflops:g} TFLOP/s a GPU at MFU {CLUSTER.mfu:.0%} while it computes, "
        f"{CLUSTER.node_gb_per_second:g} GB/s in a node of {CLUSTER.gpus_per_node}, {CLUSTER.network_gb_per_second:g} GB/s "
        f"and {1e6 * CLUSTER.latency_seconds:g} µs between nodes; {_GLOBAL_BATCH} clips of {_SECONDS} s an update"
    )
    for name, paper in facts["on_paper"].items():
        sent = ", ".join(f"{size / 1e6:,.0f} MB with ZeRO-{stage}" for stage, size in paper["sent_bytes"].items())
        print(
            f"\n{name}: {paper['weights'] / 1e6:.0f}M weights, {paper['flops'] / 1e9:,.0f} GFLOP a clip; each of 8 GPUs "
            f"sends, with {paper['accumulation_on_8']} forward passes an update: {sent}\n"
            "  GPUs  clips/GPU  compute ms  send ms  optimizer ms     MFU    clips/s  efficiency"
        )
        for row in paper["rows"]:
            milliseconds = (1e3 * row[part] for part in ("compute", "communication", "optimizer"))
            print(
                "{:6d} {:10d} {:11.1f} {:8.2f} {:13.2f}".format(row["gpus"], row["clips"], *milliseconds)
                + f" {row['mfu']:7.1%} {row['clips_per_second']:10,.0f} {row['efficiency']:11.1%}"
            )
