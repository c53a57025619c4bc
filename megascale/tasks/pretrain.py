"""Pretraining: masked tokens, DeepSpeed, kept checkpoints. (paper, section 3)"""

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from megascale import run_folder, seeding, storage
from megascale.config import Section
from megascale.data.loader import DataConfig, PretrainBatches, TokenFolder, prefetch, split_held_out
from megascale.data.order import Order, default_streams
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import ConfigError, DataError
from megascale.log import MetricLog, duration, rank, read_metrics, say, world_size
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters
from megascale.storage import StorageConfig
from megascale.tasks.masked import Validator, masked_loss
from megascale.tasks.plan import Plan, cost_lines
from megascale.tasks.signals import Signals, note
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for
from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.device import device_name, peak_tflops
from megascale.train.engine import Engine, ZeroConfig, barrier, init_distributed
from megascale.train.loop import Hooks, fit
from megascale.train.saver import Saver, resume
from megascale.train.schedule import OptimConfig

_MAY_CHANGE = ("checkpoint.", "log.", "storage.", "train.micro_batch", "data.cache")


class TrainConfig(Section):
    """Length and batches."""

    steps: int = Field(ge=1, description="updates")
    global_batch: int = Field(ge=1, description="clips per update, over all ranks")
    micro_batch: int = Field(ge=1, description="clips per rank and forward pass")
    validate_every: int = Field(1000, ge=1, description="updates between validations; the last is always validated")
    valid_clips: int = Field(1024, ge=1, description="at most so many held-out clips are validated")


class LogConfig(Section):
    """What is reported where."""

    every: int = Field(10, ge=1, description="updates between lines of metrics.jsonl")
    tensorboard: bool = Field(True, description="also log to RUN/tensorboard")
    wandb_project: str | None = Field(None, description="also log to this wandb project (extra megascale[wandb])")
    spike_stds: float = Field(
        6.0, gt=0, description="a loss so many standard deviations above its recent mean is called a spike"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device, for MFU; null: by the GPU's name, and no MFU on a CPU"
    )
    plan_mfu: float = Field(0.4, gt=0, le=1, description="what --dry-run takes for MFU when it estimates hours")


class RunOutputConfig(Section):
    """Where the run lies."""

    url: str = Field(description="run folder, on a local or shared disk")


class PretrainConfig(Section):
    """Everything `launch/pretrain.py` needs."""

    data: DataConfig = Field(description="which tokens")
    output: RunOutputConfig = Field(description="where the run lies")
    model: ModelConfig = Field(ModelConfig(), description="the model's shape")
    mask: MaskConfig = Field(MaskConfig(), description="which tokens are hidden")
    drop: DropConfig = Field(DropConfig(), description="token-chunk drop")
    optim: OptimConfig = Field(OptimConfig(), description="optimizer and schedule")
    train: TrainConfig = Field(description="length and batches")
    zero: ZeroConfig = Field(ZeroConfig(), description="DeepSpeed ZeRO")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when to save, what to keep")
    log: LogConfig = Field(LogConfig(), description="what is reported where")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")
    seed: int = Field(0, description="fixes weights, order, crops, drops and masks")


def describe_plan(config: PretrainConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    storage.configure(config.storage)
    run_folder.check_config(storage.local_path(config.output.url), config, "pretrain", _MAY_CHANGE)
    data, model = _open_data(config), _build_model(config)
    _accumulation(config, world_size(), data.order)
    manifest = data.folder.manifest
    hours = config.train.steps * config.train.global_batch * config.data.clip_seconds / 3600
    plan = Plan(
        model=config.model,
        num_codebooks=data.folder.num_codebooks,
        num_frames=round(config.data.clip_seconds * FRAMES_PER_SECOND),
        mask=config.mask,
        drop=config.drop,
        num_weights=count_parameters(model),
        num_global_weights=count_parameters(model.global_encoder),
        precision=config.zero.precision,
        micro_batch=config.train.micro_batch,
        num_clips=config.train.steps * config.train.global_batch,
        mfu=config.log.plan_mfu,
        peak_tflops=config.log.peak_tflops,
    )
    return "\n".join(
        [
            f"{len(data.train)} clips to train on, {len(data.valid)} held out, in {len(manifest.shards)} shards, "
            f"Q={data.folder.num_codebooks} ({manifest.codec.name})",
            f"{config.train.steps} updates of {config.train.global_batch} clips: "
            f"{config.train.steps / data.order.batches_per_epoch:.1f} epochs, up to {hours:.1f} hours of audio",
            *cost_lines(plan, config.zero.stage, world_size()),
            f"-> {config.output.url}",
        ]
    )


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain; resumes from the last committed checkpoint of the same config.

    Returns:
        The run's `result.json`.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, or another process is at work in the folder.
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
    """
    storage.configure(config.storage)
    path = storage.local_path(config.output.url)
    run_folder.check_config(path, config, "pretrain", _MAY_CHANGE)
    finished = run_folder.read_result(path)
    if finished is not None:
        say(f"{path}: already done: {finished['steps']} steps, best checkpoint {finished['checkpoint']}")
        return finished
    data, model = _open_data(config), _build_model(config)
    _accumulation(config, world_size(), data.order)
    with run_folder.lock(path) if rank() == 0 else nullcontext():
        return _train(config, path, data, model)


def _train(config: PretrainConfig, path: Path, data: "_Data", model: MegaAudioFormer) -> dict[str, Any]:
    rank, ranks = init_distributed()
    accumulation = _accumulation(config, ranks, data.order)
    if rank == 0:
        run_folder.write_config(path, config)
    engine = Engine(model, config.optim, config.zero, config.train.micro_batch, accumulation, config.train.steps)
    start = _resume(engine, path, config)
    log = MetricLog(path / "metrics.jsonl", start, config.log.tensorboard, config.log.wandb_project, path.name)
    micro = config.train.micro_batch
    batches = PretrainBatches(
        data.folder, config.data, config.mask, config.drop, data.order, data.train, micro, rank, ranks
    )
    validator = Validator(
        engine, data.folder, config.data, config.mask, data.train, data.valid, config.train.micro_batch, config.seed
    )
    saver = Saver(
        engine,
        path / "checkpoints",
        config.checkpoint,
        model_facts(config, data.folder),
        config.train.global_batch,
    )
    say(f"{count_parameters(engine.module) / 1e6:.2f}M parameters, {len(data.train)} clips, {ranks} ranks")
    signals = _signals(config, path, validator, ranks, start)
    started = time.monotonic()
    with closing(log):
        fit(
            engine,
            prefetch(batches.micro_batches, start, config.train.steps),
            masked_loss,
            Hooks(signals.summarise, validator, saver, note),
            log,
            title=f"pretraining {config.data.bitrate_kbps:g} kbps",
            start=start,
            num_steps=config.train.steps,
            log_every=config.log.every,
            validate_every=config.train.validate_every,
            save_every=config.checkpoint.every,
        )
    if start == config.train.steps:  # an earlier start ended between its last save and its result
        validator(start)
    result = _result(config, path, data.folder, validator.newest, time.monotonic() - started)
    if rank == 0:
        run_folder.write_result(path, result)
    barrier()
    say(
        f"{config.train.steps} steps in {duration(result['wall_seconds'])}, best checkpoint {result['checkpoint']}; "
        f"next: python launch/finetune.py CONFIG checkpoint={result['checkpoint']}"
    )
    return result


@dataclass(frozen=True)
class _Data:
    """An opened token folder; `train` and `valid` are numbers of its clips, (N,)."""

    folder: TokenFolder
    train: np.ndarray
    valid: np.ndarray
    order: Order


def _open_data(config: PretrainConfig) -> _Data:
    folder = TokenFolder(config.data.url, config.data.bitrate_kbps, config.data.cache)
    train, valid, sizes = split_held_out(folder, config.data.valid_share)
    streams = config.data.streams or default_streams(config.train.global_batch)
    order = Order(sizes, config.seed, streams, config.train.global_batch)
    spread = valid[:: max(1, len(valid) // config.train.valid_clips)]
    return _Data(folder, train, spread[: config.train.valid_clips], order)


def _build_model(config: PretrainConfig) -> MegaAudioFormer:
    generator = seeding.torch_generator(config.seed, "model weights")
    try:
        return MegaAudioFormer(config.model, codebooks_for(config.data.bitrate_kbps), generator)
    except ValueError as failure:
        raise ConfigError(f"pretrain.{failure}") from None


def _accumulation(config: PretrainConfig, ranks: int, order: Order) -> int:
    each, rest = divmod(config.train.global_batch, ranks * config.train.micro_batch)
    if rest:
        raise ConfigError(
            f"pretrain.train.global_batch={config.train.global_batch}: must be a multiple of "
            f"{ranks} ranks x micro_batch={config.train.micro_batch}"
        )
    if order.streams % ranks:
        raise ConfigError(f"pretrain.data.streams={order.streams}: must be a multiple of the {ranks} ranks")
    return each


def model_facts(config: PretrainConfig, folder: TokenFolder) -> dict[str, Any]:
    """Return what `model/config.json` says: enough to rebuild the model and to refuse tokens it was not made for."""
    return {
        "kind": "pretrained",
        "model": config.model.model_dump(mode="json"),
        "num_codebooks": folder.num_codebooks,
        "codec": folder.manifest.codec.model_dump(mode="json"),
        "clip_frames": round(config.data.clip_seconds * FRAMES_PER_SECOND),
    }


def _signals(config: PretrainConfig, run_path: Path, validator: Validator, ranks: int, start: int) -> Signals:
    name = device_name()
    peak = config.log.peak_tflops or (peak_tflops(name, config.zero.precision) if name else None)
    past = [row for row in read_metrics(run_path / "metrics.jsonl") if row["step"] <= start and "train/loss" in row]
    losses = [row["train/loss"] for row in past]
    return Signals(config.model, validator.unigram_loss_Q, ranks, peak, config.log.spike_stds, start, losses)


def _resume(engine: Engine, run_path: Path, config: PretrainConfig) -> int:
    consumed = resume(engine, run_path / "checkpoints")
    start = consumed // config.train.global_batch
    if consumed:
        newest = checkpoint.step_folder(run_path / "checkpoints", start)
        say(f"going on from {newest} (step {start} of {config.train.steps})")
    return start


def _result(
    config: PretrainConfig, run_path: Path, folder: TokenFolder, validated: dict[str, float], wall_seconds: float
) -> dict[str, Any]:
    best = checkpoint.best(run_path / "checkpoints")
    if best is None:
        raise DataError(f"{run_path}: finished without a checkpoint")
    return {
        "steps": config.train.steps,
        "bitrate_kbps": config.data.bitrate_kbps,
        "checkpoint": str(best),
        "codec": folder.manifest.codec.fingerprint,
        "validation": validated,
        "wall_seconds": wall_seconds,
        "seed": config.seed,
    }
