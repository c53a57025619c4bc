"""Pretraining: masked tokens, DeepSpeed, kept checkpoints. (paper, section 3)"""

import json
import os
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale import run_folder, seeding, storage
from megascale.data.folder import TokenFolder, split_held_out
from megascale.data.loader import PretrainBatches, prefetch
from megascale.data.order import Order, default_streams
from megascale.data.resident import ResidentTokens, check_room, resident_bytes
from megascale.errors import ConfigError, DataError
from megascale.log import MetricLog, duration, rank, read_metrics, say, world_size
from megascale.model.language_model import load_language_model
from megascale.model.mega_audioformer import MegaAudioFormer, count_parameters, prepare_training
from megascale.tasks.masked import DivergenceReport, Validator, masked_loss
from megascale.tasks.plan import Plan, activation_gib, cost_lines, largest_micro_batch, make_plan, training_bytes
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tasks.signals import Signals, note
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for
from megascale.train import checkpoint
from megascale.train.device import device_name, peak_memory_gib, peak_tflops
from megascale.train.engine import Engine, barrier, check_settings, init_distributed, make_deterministic, on_first_rank
from megascale.train.loop import Hooks, fit
from megascale.train.manifest import CHECKPOINTS
from megascale.train.profiling import StepProfiler
from megascale.train.saver import Saver, Start, find_start, resume
from megascale.train.uploads import Uploads, fetch_newest, upload_missing, uploading
from megascale.train.zero import deepspeed_settings

_MAY_CHANGE = (
    *("checkpoint.", "log.", "storage.", "train.micro_batch", "train.activation_checkpointing", "train.compile"),
    *("data.cache", "data.cache_gb", "data.resident"),
    *("data.url", "output.url"),  # they may have been moved; `_check_corpus` looks whether the tokens are the same
)


def describe_plan(config: PretrainConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    storage.configure(config.storage)
    path = _check_folders(config)
    data, model = _open_data(config), _build_model(config)
    if not checkpoint.committed(path / CHECKPOINTS):
        _load_first_weights(config, model)
    manifest = data.folder.manifest
    hours = config.train.steps * config.train.global_batch * config.data.clip_seconds / 3600
    return "\n".join(
        [
            f"{len(data.train)} clips to train on, {data.num_held_out} held out, of which {len(data.valid)} are validated, "
            f"in {len(manifest.shards)} shards, "
            f"Q={data.folder.num_codebooks} ({manifest.codec.name})",
            f"{config.train.steps} updates of {config.train.global_batch} clips: "
            f"{config.train.steps / data.order.batches_per_epoch:.1f} epochs, up to {hours:.1f} hours of audio",
            *_resident_lines(config, data),
            *cost_lines(make_plan(config, model, world_size()), config.zero.stage, world_size()),
            f"-> {config.output.url}",
        ]
    )


def run(config: PretrainConfig) -> dict[str, Any]:
    """Pretrain; resumes from the last committed checkpoint of the same config.

    Returns:
        The run's `result.json`.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, or another process is at work in the folder.
        StorageError: trained, but the last checkpoint could not be uploaded.
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
    """
    storage.configure(config.storage)
    path = _check_folders(config)
    finished = run_folder.read_result(path)
    if finished is not None and not finished.keys() >= {"steps", "checkpoint"}:
        raise DataError(f"{path}/result.json: broken; delete it to run again")
    if finished is not None:
        say(f"{path}: already done: {finished['steps']} steps, best checkpoint {finished['checkpoint']}")
        if config.checkpoint.upload_url is not None:
            init_distributed()
            on_first_rank(lambda: _upload_rest(config, path))
        return finished
    data, model = _open_data(config), _build_model(config)
    plan = make_plan(config, model, world_size())
    if config.data.resident is not None:
        besides = training_bytes(plan, config.zero.stage, world_size())
        check_room(resident_bytes(data.folder, data.train, config.data.resident), config.data.resident, besides)
    locked = run_folder.lock(path) if rank() == 0 else nullcontext()
    with locked, uploading(path / CHECKPOINTS, config.checkpoint, rank()) as uploads:
        return _train(config, path, data, model, uploads)


def _upload_rest(config: PretrainConfig, path: Path) -> None:
    if config.checkpoint.upload_url is not None:
        run_folder.write_config_at(config.checkpoint.upload_url, config)
        with run_folder.lock(path):
            upload_missing(path / CHECKPOINTS, config.checkpoint)


def _check_folders(config: PretrainConfig) -> Path:
    """Return the run's folder. Raises ConfigError if it, or the URL of its copies, is another run's."""
    path, url = storage.local_path(config.output.url), config.checkpoint.upload_url
    run_folder.check_config(path, config, "pretrain", _MAY_CHANGE)
    if url is not None:
        key = "checkpoint.upload_url"
        if storage.is_local(url) and Path(os.path.realpath(storage.local_path(url))).is_relative_to(
            os.path.realpath(path)
        ):
            raise ConfigError(f"pretrain.{key}={url}: in the run's own folder; copies belong elsewhere")
        run_folder.check_config_at(url, config, "pretrain", _MAY_CHANGE, key)
    return path


def _train(
    config: PretrainConfig, path: Path, data: "_Data", model: MegaAudioFormer, uploads: Uploads | None
) -> dict[str, Any]:
    if config.train.deterministic:
        make_deterministic()
    rank, ranks = init_distributed()
    seeding.seed_torch(config.seed, "pretraining", rank)
    micro_batch, checkpoints = largest_micro_batch(config, ranks), path / CHECKPOINTS
    if config.checkpoint.upload_url is not None:
        on_first_rank(partial(fetch_newest, config.checkpoint.upload_url, checkpoints))
    found = find_start(checkpoints)
    if found is not None:
        _check_corpus(found, data.folder)
    else:
        _load_first_weights(config, model)
    on_first_rank(lambda: _write_config(config, path))
    plan = make_plan(config, model, ranks)  # before ZeRO-3 takes the weights apart
    prepare_training(model, config.train.activation_checkpointing, config.train.compile)
    engine = Engine(
        model,
        config.optim,
        config.zero,
        micro_batch,
        config.train.global_batch // ranks // micro_batch,
        config.train.steps,
        config.train.ema_decay,
        universal=found is not None and found.universal,
    )
    if rank == 0:
        storage.publish_bytes(str(path / "deepspeed.json"), json.dumps(engine.settings, indent=1).encode())
    start = _go_on(engine, found, config) if found is not None else 0
    log = MetricLog(path / "metrics.jsonl", start, config.log.tensorboard, config.log.wandb_project, path.name)
    resident = _hold(config, data, engine.device)
    batches = PretrainBatches(
        data.folder, config.data, config.mask, config.drop, data.order, data.train, micro_batch, rank, ranks, resident
    )
    validator = Validator(
        engine, data.folder, config.data, config.mask, data.train, data.valid, micro_batch, config.seed
    )
    facts = model_facts(config, data.folder)
    saver = Saver(engine, checkpoints, config.checkpoint, facts, config.train.global_batch, uploads)
    _announce(config, plan, len(data.train), ranks)
    signals = _signals(config, path, validator, ranks, start)
    started = time.monotonic()
    with closing(log):
        fit(
            engine,
            prefetch(batches.micro_batches, start, config.train.steps),
            masked_loss,
            Hooks(signals.summarise, validator, saver, note, DivergenceReport(batches.keys, path / "diverged")),
            log,
            title=f"pretraining {config.data.bitrate_kbps:g} kbps",
            start=start,
            num_steps=config.train.steps,
            log_every=config.log.every,
            validate_every=config.train.validate_every,
            save_every=config.checkpoint.every,
            profiler=StepProfiler(config.log.profile_steps, path / "profile"),
        )
    if start == config.train.steps:  # an earlier start ended between its last save and its result
        validator(start)
    result = _result(config, path, data.folder, validator.newest, time.monotonic() - started)
    if rank == 0:
        run_folder.write_result(path, result)
    barrier()
    _tell_end(result)
    return result


def _tell_end(result: dict[str, Any]) -> None:
    say(
        f"{result['steps']} steps in {duration(result['wall_seconds'])}, at most {peak_memory_gib():.3g} GiB of memory; "
        f"best checkpoint {result['checkpoint']}; "
        f"next: python launch/finetune.py CONFIG checkpoint={result['checkpoint']}"
    )


def _load_first_weights(config: PretrainConfig, model: MegaAudioFormer) -> None:
    """Overwrite drawn weights with a language model's, if one is named; a run that goes on has its own."""
    if config.model.init_from is not None:
        load_language_model(model.global_encoder, config.model.init_from)


def _announce(config: PretrainConfig, plan: Plan, num_clips: int, ranks: int) -> None:
    say(
        f"{plan.num_weights / 1e6:.2f}M parameters, {num_clips} clips; {ranks} ranks x "
        f"{config.train.global_batch // ranks // plan.micro_batch} micro-batches of {plan.micro_batch}, "
        f"about {activation_gib(plan):.2g} GiB of activations"
    )
    if config.train.compile:
        say("Transformer blocks are compiled (train.compile)")
    elif device_name() is None:
        say(
            "Transformer blocks are not compiled: on a CPU, train.compile=true gained 2 to 5% after a minute of compiling"
        )
    else:
        say("Transformer blocks are not compiled; `make bench-gpu` measures what train.compile=true gains here")
    if config.checkpoint.every % config.train.validate_every:
        say(
            f"checkpoint.every={config.checkpoint.every} is no multiple of train.validate_every="
            f"{config.train.validate_every}: checkpoints between validations have no loss, and are never the best"
        )


def _write_config(config: PretrainConfig, path: Path) -> None:
    run_folder.write_config(path, config)
    if config.checkpoint.upload_url is not None:
        run_folder.write_config_at(config.checkpoint.upload_url, config)


def _check_corpus(found: Start, folder: TokenFolder) -> None:
    if checkpoint.read_facts(found.folder / "model")["corpus"] != folder.manifest.fingerprint:
        raise DataError(f"{folder.url}: not the tokens that {found.folder} was trained on; choose another output.url")


def _go_on(engine: Engine, found: Start, config: PretrainConfig) -> int:
    """Load a checkpoint; return the updates it has behind it."""
    resume(engine, found)
    start = found.manifest.consumed_samples // config.train.global_batch
    by = f", saved by {found.manifest.world_size} ranks" if found.universal else ""
    say(f"going on from {found.folder} (step {start} of {config.train.steps}{by})")
    return start


@dataclass(frozen=True)
class _Data:
    """An opened token folder; `train` and `valid` are numbers of its clips, (N,)."""

    folder: TokenFolder
    train: np.ndarray
    valid: np.ndarray
    num_held_out: int  # of which `valid` are some
    order: Order


def _open_data(config: PretrainConfig) -> _Data:
    folder = TokenFolder(config.data.url, config.data.bitrate_kbps, config.data.cache, config.data.cache_gb)
    train, valid, sizes = split_held_out(folder, config.data.valid_share)
    streams = config.data.streams or default_streams(config.train.global_batch)
    order = Order(sizes, config.seed, streams, config.train.global_batch)
    spread = np.linspace(0, len(valid) - 1, min(len(valid), config.train.valid_clips)).round().astype(np.int64)
    return _Data(folder, train, valid[spread], len(valid), order)


def _resident_lines(config: PretrainConfig, data: _Data) -> list[str]:
    if config.data.resident is None:
        return []
    size = resident_bytes(data.folder, data.train, config.data.resident)
    return [
        f"data.resident={config.data.resident}: each rank holds {len(data.train)} clips, {size / 1e9:.3g} GB of codes"
    ]


def _hold(config: PretrainConfig, data: _Data, device: torch.device) -> ResidentTokens | None:
    if config.data.resident is None:
        return None
    say(*_resident_lines(config, data))
    where = device if config.data.resident == "gpu" else torch.device("cpu")
    return ResidentTokens(data.folder, data.train, where, title="holding tokens")


def _build_model(config: PretrainConfig) -> MegaAudioFormer:
    generator = seeding.torch_generator(config.seed, "model weights")
    try:
        model = MegaAudioFormer(config.model, codebooks_for(config.data.bitrate_kbps), generator)
    except ValueError as failure:
        raise ConfigError(f"pretrain.{failure}") from None
    # a DeepSpeed JSON that does not fit is told before anything is written
    check_settings(deepspeed_settings(config.optim, config.zero, config.train.micro_batch, 1, count_parameters(model)))
    return model


def model_facts(config: PretrainConfig, folder: TokenFolder) -> dict[str, Any]:
    """Return what `model/config.json` says: enough to rebuild the model and to refuse tokens it was not made for."""
    return {
        "kind": "pretrained",
        "model": config.model.shape(),
        "init_from": config.model.init_from,
        "num_codebooks": folder.num_codebooks,
        "codec": folder.manifest.codec.model_dump(mode="json"),
        "corpus": folder.manifest.fingerprint,
        "clip_frames": round(config.data.clip_seconds * FRAMES_PER_SECOND),
    }


def _signals(config: PretrainConfig, run_path: Path, validator: Validator, ranks: int, start: int) -> Signals:
    name = device_name()
    peak = config.log.peak_tflops or (peak_tflops(name, config.zero.precision) if name else None)
    past = [row for row in read_metrics(run_path / "metrics.jsonl") if row["step"] <= start and "train/loss" in row]
    losses = [row["train/loss"] for row in past]
    return Signals(config.model, validator.unigram_loss_Q, ranks, peak, config.log.spike_stds, start, losses)


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
