"""What ranks send each other for an update under DeepSpeed ZeRO, and how long an update takes on a cluster; on paper.

Ring algorithms: of S bytes each of R ranks sends (R - 1)/R S in a reduce-scatter or an all-gather, and twice that in an
all-reduce. What is sent was counted with DeepSpeed's own log of collectives, and a test counts it again. (The ZeRO
paper, arXiv:1910.02054, section 7, has fewer for stages 1 and 2: there gradients are reduce-scattered, here DeepSpeed
all-reduces them.)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megascale.train.memory import MAX_LIVE_WEIGHTS

# what AdamW reads and writes of a weight: fp32 master and both moments twice, gradient once
_ADAMW_BYTES = 4 * (3 * 2 + 1)


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes. GB/s are 10^9 bytes a second, in one direction."""

    peak_tflops: float
    mfu: float  # of one GPU alone, while it computes
    memory_gb_per_second: float  # of a GPU
    gpus_per_node: int
    node_gb_per_second: float  # of a GPU, to others of its node
    network_gb_per_second: float  # of a node, all its network cards together: there is a ring through each
    latency_seconds: float  # of a message between nodes

    def link_gb_per_second(self, ranks: int) -> float:
        """Return the rate at which a ring over `ranks` GPUs carries a GPU's bytes."""
        inside = ranks <= self.gpus_per_node
        return self.node_gb_per_second if inside else min(self.node_gb_per_second, self.network_gb_per_second)


class StepTime(NamedTuple):
    """Seconds of one update. They follow each other: DeepSpeed's buckets are as large as the model here, so gradients are
    sent when all are there."""

    compute: float
    communication: float
    optimizer: float


def sent_bytes(num_weights: int, stage: int, precision: str, ranks: int, accumulation: int) -> float:
    """Return the bytes that each rank sends for one update; the norm of the gradients and the like are left out.

    Args:
        num_weights: of the model.
        stage: of ZeRO, 0..3.
        precision: `fp32` or `bf16`, in which gradients and weights are sent.
        ranks: R.
        accumulation: forward passes per update. Stages 2 and 3 send gradients after each.

    Raises:
        ValueError: ZeRO-3 of a model so large that its weights are gathered again in the backward pass.
    """
    if stage == 3 and num_weights > MAX_LIVE_WEIGHTS:
        raise ValueError(f"{num_weights} weights: counted only up to {MAX_LIVE_WEIGHTS}")
    one_way = (2 if precision == "bf16" else 4) * num_weights * (ranks - 1) / ranks
    return passes(stage, accumulation) * one_way


def passes(stage: int, accumulation: int) -> int:
    """Return how often an update sends (R - 1)/R of the model: an all-reduce does it twice."""
    return {
        0: 2,  # all-reduce of gradients
        1: 2 + 1,  # and all-gather of weights
        2: 2 * accumulation + 1,
        3: 2 * accumulation,  # all-gather of weights, which stay from forward to backward; reduce-scatter of gradients
    }[stage]


def step_time(
    flops: float, num_weights: int, stage: int, precision: str, ranks: int, accumulation: int, cluster: Cluster
) -> StepTime:
    """Return the time of one update, without stragglers and waiting for data: the least it can be. Messages take as many
    hops as a tree over the nodes is deep.

    Args:
        flops: of one rank's share of the global batch, forward and backward.
        num_weights, stage, precision, ranks, accumulation: as for `sent_bytes`.
        cluster: where.
    """
    sent = sent_bytes(num_weights, stage, precision, ranks, accumulation)
    nodes = -(-ranks // cluster.gpus_per_node)
    hops = passes(stage, accumulation) * math.ceil(math.log2(nodes))
    updated = num_weights / (ranks if stage else 1)
    return StepTime(
        compute=flops / (cluster.peak_tflops * 1e12 * cluster.mfu),
        communication=sent / (cluster.link_gb_per_second(ranks) * 1e9) + hops * cluster.latency_seconds,
        optimizer=_ADAMW_BYTES * updated / (cluster.memory_gb_per_second * 1e9),
    )
