"""Pretraining: masked tokens, DeepSpeed, kept checkpoints. (paper, section 3)"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from megascale import run_folder, seeding, storage
from megascale.config import Section
from megascale.data.loader import (
    Batch,
    DataConfig,
    PretrainBatches,
    TokenFolder,
    prefetch,
    split_held_out,
    unigram_counts,
    validation_batches,
)
from megascale.data.order import Order, default_streams
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import CheckpointError, ConfigError, DataError
from megascale.log import MetricLog, duration, rank, say, world_size
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MaskedTokenOutput, MegaAudioFormer, count_parameters
from megascale.storage import StorageConfig
from megascale.tokens import CODEBOOK_SIZE, FRAMES_PER_SECOND, codebooks_for
from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.engine import Engine, ZeroConfig, barrier, init_distributed
from megascale.train.loop import Hooks, fit
from megascale.train.schedule import OptimConfig

_MAY_CHANGE = ("checkpoint.", "log.", "storage.", "train.micro_batch", "data.cache", "data.cache_gb")


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
    wandb_project: str | None = Field(None, description="also log to this wandb project (extra megascale[wandb])")


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
    weights, manifest = count_parameters(model), data.folder.manifest
    hours = config.train.steps * config.train.global_batch * config.data.clip_seconds / 3600
    return "\n".join(
        [
            f"{len(data.train)} clips to train on, {len(data.valid)} held out, in {len(manifest.shards)} shards, "
            f"Q={data.folder.num_codebooks} ({manifest.codec.name})",
            f"{weights / 1e6:.1f}M parameters ({count_parameters(model.global_encoder) / 1e6:.1f}M in the global encoder); "
            f"weights, gradients and AdamW take {weights * 16 / 2**30:.2f} GiB over all ranks",
            f"{config.train.steps} updates of {config.train.global_batch} clips: "
            f"{config.train.steps / data.order.batches_per_epoch:.1f} epochs, up to {hours:.1f} hours of audio",
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
    start = _resume(engine, path, rank, ranks, config)
    log = MetricLog(path / "metrics.jsonl", start, config.log.wandb_project, path.name)
    micro = config.train.micro_batch
    batches = PretrainBatches(
        data.folder, config.data, config.mask, config.drop, data.order, data.train, micro, rank, ranks
    )
    validator = _Validator(engine, data.folder, config, data.train, data.valid)
    say(f"{count_parameters(engine.module) / 1e6:.2f}M parameters, {len(data.train)} clips, {ranks} ranks")
    started = time.monotonic()
    fit(
        engine,
        prefetch(batches.micro_batches, start, config.train.steps),
        _loss,
        Hooks(_summarise, validator, _Saver(engine, path, data.folder, config, rank, ranks), _note),
        log,
        title=f"pretraining {config.data.bitrate_kbps:g} kbps",
        start=start,
        num_steps=config.train.steps,
        log_every=config.log.every,
        validate_every=config.train.validate_every,
        save_every=config.checkpoint.every,
    )
    log.close()
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
    folder = TokenFolder(config.data.url, config.data.bitrate_kbps, config.data.cache, config.data.cache_gb)
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


# ------------------------------------------------------------------------------------------------- loss and metrics


def _loss(output: MaskedTokenOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    report = {
        "loss_Q": output.loss_Q,
        "correct_Q": output.correct_Q,
        "count_Q": output.count_Q,
        "micro_batches": torch.ones((), device=output.loss_Q.device),
        "clips": torch.tensor(float(len(batch["codes_BTQ"])), device=output.loss_Q.device),
    }
    return output.loss_Q.mean(), report


def _summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    loss_Q = sums["loss_Q"] / sums["micro_batches"]
    acc_Q = sums["correct_Q"] / sums["count_Q"]
    metrics = {
        "train/loss": float(loss_Q.mean()),
        "train/acc": float(acc_Q.mean()),
        "train/clips": float(sums["clips"]),
    }
    metrics["train/lr"] = float(sums["lr"] / sums["updates"])
    metrics |= {f"train/loss_q{q}": float(v) for q, v in enumerate(loss_Q)}
    return metrics | {f"train/acc_q{q}": float(v) for q, v in enumerate(acc_Q)}


def _note(metrics: dict[str, float]) -> str:
    rate = metrics["train/clips"] / max(metrics["train/seconds"], 1e-9)
    accuracy = f"q0 {metrics['train/acc_q0']:.3f}"
    return f"loss {metrics['train/loss']:.3f}  accuracy {accuracy}  {rate:.1f} clips/s"


class _Validator:
    """Loss and accuracy on held-out clips, beside a baseline that knows only how often each code occurs."""

    def __init__(
        self, engine: Engine, folder: TokenFolder, config: PretrainConfig, train: np.ndarray, valid: np.ndarray
    ) -> None:
        self._engine, self._folder, self._config, self._clips = engine, folder, config, valid
        counts_QV = unigram_counts(folder, train)
        self._mode_Q = torch.from_numpy(counts_QV.argmax(axis=1))
        # add-one smoothing: a code that training clips never use must cost much, not infinitely much
        smoothed_QV = (counts_QV + 1) / (counts_QV.sum(axis=1, keepdims=True) + CODEBOOK_SIZE)
        self._unigram_nats_QV = torch.from_numpy(-np.log(smoothed_QV))
        self.newest: dict[str, float] = {}

    def __call__(self, steps: int) -> dict[str, float]:
        if not len(self._clips):
            return {}
        total: dict[str, Tensor] = {}
        for batch in self._batches():
            output = self._engine.evaluate(batch)
            clips = len(batch["codes_BTQ"])
            values = {"loss": output.loss_Q * clips, "acc": output.correct_Q, "count": output.count_Q}
            values |= self._unigram(batch)
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value.double().cpu()
        means = {"loss": total["loss"] / len(self._clips), "acc": total["acc"] / total["count"]}
        means |= {name: total[name] / total["count"] for name in ("unigram_loss", "unigram_acc")}
        self.newest = {f"valid/{name}": float(value.mean()) for name, value in means.items()}
        for name, value in means.items():
            self.newest |= {f"valid/{name}_q{q}": float(v) for q, v in enumerate(value)}
        return self.newest

    def _batches(self) -> Iterator[Batch]:
        config = self._config
        return validation_batches(
            self._folder, config.data, config.mask, self._clips, config.train.micro_batch, config.seed
        )

    def _unigram(self, batch: Batch) -> dict[str, Tensor]:
        codes, masked = batch["codes_BTQ"], batch["masked_BTQ"]
        nats = torch.stack([self._unigram_nats_QV[q][codes[..., q]] for q in range(codes.shape[-1])], dim=-1)
        return {
            "unigram_loss": (nats * masked).sum(dim=(0, 1)),
            "unigram_acc": ((codes == self._mode_Q) & masked).sum(dim=(0, 1)),
        }


# ------------------------------------------------------------------------------------------------------ checkpoints


class _Saver:
    """Saves a checkpoint by the contract: everything, a barrier, then the manifest, and only then is an old one pruned."""

    def __init__(
        self, engine: Engine, run_path: Path, folder: TokenFolder, config: PretrainConfig, rank: int, world_size: int
    ) -> None:
        self._engine, self._folder, self._config = engine, folder, config
        self._checkpoints, self._rank, self._world_size = run_path / "checkpoints", rank, world_size

    def __call__(self, steps: int, validated: dict[str, float]) -> None:
        path = checkpoint.step_folder(self._checkpoints, steps)
        consumed = steps * self._config.train.global_batch
        if self._rank == 0:
            checkpoint.begin(path)
        barrier()
        self._engine.save(path)
        checkpoint.save_rank_state(path, self._rank, consumed)
        weights = self._engine.full_weights()
        if self._rank == 0:
            checkpoint.write_model(path / "model", weights, model_facts(self._config, self._folder))
        barrier()
        if self._rank == 0:
            checkpoint.commit(path, steps, consumed, self._world_size, validated.get("valid/loss"))
            checkpoint.prune(self._checkpoints, self._config.checkpoint.keep_last)
        barrier()


def model_facts(config: PretrainConfig, folder: TokenFolder) -> dict[str, Any]:
    """Return what `model/config.json` says: enough to rebuild the model and to refuse tokens it was not made for."""
    return {
        "kind": "pretrained",
        "model": config.model.model_dump(mode="json"),
        "num_codebooks": folder.num_codebooks,
        "codec": folder.manifest.codec.model_dump(mode="json"),
        "clip_frames": round(config.data.clip_seconds * FRAMES_PER_SECOND),
    }


def _resume(engine: Engine, run_path: Path, rank: int, world_size: int, config: PretrainConfig) -> int:
    found = checkpoint.committed(run_path / "checkpoints")
    if not found:
        return 0
    manifest = checkpoint.verify(found[-1])
    if manifest.world_size != world_size:
        raise CheckpointError(
            f"{found[-1]}: saved by {manifest.world_size} ranks; go on with as many, not {world_size}"
        )
    engine.load(found[-1])
    checkpoint.load_rank_state(found[-1], rank)
    start = manifest.consumed_samples // config.train.global_batch
    say(f"going on from {found[-1]} (step {start} of {config.train.steps})")
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
