"""What a pretraining run will cost, before it starts: memory of a GPU, operations, hours. T frames, Q codebooks."""

import math
from dataclasses import dataclass

from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import ConfigError
from megascale.log import duration
from megascale.model.config import ModelConfig
from megascale.model.cost import Work, activation_bytes, training_flops
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tokens import codebooks_for
from megascale.train.device import REFERENCE_GPU, device_name, peak_tflops
from megascale.train.memory import state_bytes


@dataclass(frozen=True)
class Plan:
    """What is to be trained. `mfu` is assumed; `peak_tflops` None asks the GPU, or takes a well-known one."""

    model: ModelConfig
    num_codebooks: int
    num_frames: int
    mask: MaskConfig
    drop: DropConfig
    num_weights: int
    num_global_weights: int
    precision: str
    micro_batch: int
    num_clips: int
    mfu: float
    peak_tflops: float | None
    recompute: bool = False
    offload: bool = False
    ema: bool = False


def make_plan(config: PretrainConfig, model: MegaAudioFormer, ranks: int) -> Plan:
    """Return the plan of a run on so many ranks. Raises ConfigError as `largest_micro_batch`."""
    return Plan(
        model=config.model,
        num_codebooks=codebooks_for(config.data.bitrate_kbps),
        num_frames=config.data.crop_frames,
        mask=config.mask,
        drop=config.drop,
        num_weights=count_parameters(model),
        num_global_weights=count_parameters(model.global_encoder),
        precision=config.zero.precision,
        micro_batch=largest_micro_batch(config, ranks),
        recompute=config.train.activation_checkpointing,
        offload=config.zero.offload_optimizer,
        ema=config.train.ema_decay is not None,
        num_clips=config.train.steps * config.train.global_batch,
        mfu=config.log.plan_mfu,
        peak_tflops=config.log.peak_tflops,
    )


def largest_micro_batch(config: PretrainConfig, ranks: int) -> int:
    """Return the most clips a rank can take at a time: `train.micro_batch`, or the next below that divides its share.

    Raises ConfigError unless the ranks have equal shares of a global batch.
    """
    share, rest = divmod(config.train.global_batch, ranks)
    if rest:
        raise ConfigError(
            f"pretrain.train.global_batch={config.train.global_batch}: must be a multiple of {ranks} ranks"
        )
    return max(n for n in range(1, min(share, config.train.micro_batch) + 1) if share % n == 0)


def clip_work(num_frames: int, num_codebooks: int, mask: MaskConfig) -> Work:
    """Return what one clip of T frames asks of the model, in the mean over masks."""
    count = max(1, round(mask.ratio * num_frames))
    held = num_frames * (1 - (1 - count / num_frames) ** num_codebooks) if mask.kind == "token" else count
    return Work(num_frames, num_frames**2, held, count * num_codebooks)


def mean_flops(plan: Plan) -> float:
    """Return the operations of training on one clip, in the mean over masks and chunk drops."""
    drop, frames = plan.drop, plan.num_frames
    whole = training_flops(plan.model, plan.num_codebooks, clip_work(frames, plan.num_codebooks, plan.mask))
    if drop.p == 0:
        return whole
    dropped = 0.0
    for removed, chance in _removed_frames(frames, drop.min_share, drop.max_share).items():
        work = clip_work(frames - removed, plan.num_codebooks, plan.mask)
        dropped += chance * training_flops(plan.model, plan.num_codebooks, work)
    return (1 - drop.p) * whole + drop.p * dropped


def _removed_frames(num_frames: int, least: float, most: float) -> dict[int, float]:
    """Chance of each number of removed frames: a share drawn evenly from least..most, times T, rounded."""
    low, high = least * num_frames, most * num_frames
    if low == high:
        return {min(round(low), num_frames - 1): 1.0}
    chances: dict[int, float] = {}
    for removed in range(round(low), round(high) + 1):
        overlap = min(high, removed + 0.5) - max(low, removed - 0.5)
        kept = min(removed, num_frames - 1)
        chances[kept] = chances.get(kept, 0.0) + max(0.0, overlap) / (high - low)
    return chances


def cost_lines(plan: Plan, stage: int, ranks: int) -> list[str]:
    """Return lines on parameters, on memory of each GPU by ZeRO stage, and on time; `stage` and `ranks` are the run's."""
    rest = plan.num_weights - plan.num_global_weights
    return [
        f"{plan.num_weights / 1e6:.1f}M parameters: {plan.num_global_weights / 1e6:.1f}M in the global encoder, "
        f"{rest / 1e6:.1f}M in the local one",
        *_memory_lines(plan, stage, ranks),
        *_time_lines(plan, ranks),
    ]


def activation_gib(plan: Plan, recompute: bool | None = None) -> float:
    """Return about what one micro-batch keeps for backward, GiB; `recompute` None asks the plan."""
    recompute = plan.recompute if recompute is None else recompute
    one_clip = clip_work(plan.num_frames, plan.num_codebooks, plan.mask)
    work = Work(*(plan.micro_batch * value for value in one_clip))
    size = 2 if plan.precision == "bf16" else 4
    return activation_bytes(plan.model, plan.num_codebooks, work, size, recompute) / 2**30


def training_bytes(plan: Plan, stage: int, ranks: int) -> int:
    """Return about what training takes on each device, resident tokens not included."""
    state = state_bytes(plan.num_weights, stage, plan.precision, ranks, plan.offload and stage > 0, plan.ema)
    return round(state.total + activation_gib(plan) * 2**30)


def _memory_lines(plan: Plan, stage: int, ranks: int) -> list[str]:
    activations, otherwise = activation_gib(plan), activation_gib(plan, not plan.recompute)
    header = ("GPUs", "ZeRO", "weights", "gradients", "optimizer", "buffers", "activations", "sum")
    lines = [f"GiB on each GPU in {plan.precision} (activations are an estimate, see README):", _row(header)]
    for gpus in sorted({ranks, 8}):
        for choice in range(1 if plan.precision == "bf16" else 0, 4):
            state = state_bytes(plan.num_weights, choice, plan.precision, gpus, plan.offload and choice > 0, plan.ema)
            gib = [value / 2**30 for value in state]
            cells = [f"{value:.2f}" for value in (*gib, activations, sum(gib) + activations)]
            mark = "  <- this run" if (gpus, choice) == (ranks, stage) else ""
            lines.append(_row((str(gpus), str(choice), *cells)) + mark)
    other = "without recomputing blocks" if plan.recompute else "if blocks were recomputed"
    lines.append(f"activations of {plan.micro_batch} clips: about {activations:.2f} GiB, {otherwise:.2f} {other}")
    return lines


def _row(cells: tuple[str, ...]) -> str:
    return "".join(cell.rjust(6 if i < 2 else 12) for i, cell in enumerate(cells))


def _time_lines(plan: Plan, ranks: int) -> list[str]:
    each = mean_flops(plan)
    total = each * plan.num_clips
    work = f"{_flop(each)} a clip, {_flop(total)} in all"
    name = device_name()
    peak = plan.peak_tflops or peak_tflops(name or REFERENCE_GPU, plan.precision)
    if peak is None:
        return [f"{work}; no peak is known of {name}: set log.peak_tflops for an estimate of hours"]
    of = "log.peak_tflops" if plan.peak_tflops else name or "one H100 SXM, as no GPU is here"
    seconds = total / (peak * 1e12 * plan.mfu)
    times = ", ".join(f"{_hours(seconds / gpus)} on {gpus}" for gpus in sorted({1, ranks, 8}))
    return [f"{work}; at MFU {plan.mfu:.0%} (log.plan_mfu) of {peak:g} TFLOP/s ({of}): about {times}"]


def _flop(operations: float) -> str:
    power = max(0, min(6, int(math.log10(operations)) // 3))
    return f"{operations / 1000**power:.3g} {' kMGTPE'[power].strip()}FLOP"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 3600 else duration(seconds)
