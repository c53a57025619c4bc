"""What DeepSpeed keeps on each GPU, by ZeRO stage; a test holds it against a real engine's tensors."""

from typing import NamedTuple

# DeepSpeed's defaults: gradients are gathered for reduction in a buffer of at most so many
REDUCE_BUCKET = 500_000_000
MAX_LIVE_WEIGHTS = 1_000_000_000


class StateBytes(NamedTuple):
    """Bytes on one GPU.

    weights: in the run's precision; under ZeRO-3 with those that are gathered while forward and backward run.
    gradients: in the run's precision.
    optimizer: AdamW's two moments, from stage 1 on fp32 master weights, also beside fp32 weights, and averages of weights
        where they are kept; none of it where the optimizer works on the CPU.
    buffers: for reducing gradients, in the run's precision.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(self)


def state_bytes(
    num_weights: int, stage: int, precision: str, ranks: int, offload: bool = False, ema: bool = False
) -> StateBytes:
    """Return what one of `ranks` GPUs keeps of a model between its first update and its last; activations not included.

    Args:
        num_weights: of the whole model.
        stage: 0..3; 0 knows fp32 alone.
        precision: `fp32` or `bf16`.
        ranks: number of GPUs that share.
        offload: whether the optimizer works on the CPU; from stage 1 on.
        ema: whether weights are averaged.
    """
    size = 2 if precision == "bf16" else 4
    share = num_weights / ranks
    if stage == 0:
        # reduced in one flat copy
        buffers = size * num_weights if ranks > 1 else 0
        return StateBytes(size * num_weights, size * num_weights, (12 if ema else 8) * num_weights, buffers)
    gathered = min(num_weights, MAX_LIVE_WEIGHTS) if stage == 3 and ranks > 1 else 0
    return StateBytes(
        weights=size * ((share if stage == 3 else num_weights) + gathered),
        gradients=size * (share if stage >= 2 else num_weights),
        optimizer=0 if offload else (16 if ema else 12) * share,
        buffers=size * min(REDUCE_BUCKET, num_weights),
    )
