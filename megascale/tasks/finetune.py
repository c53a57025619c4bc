"""Fine-tuning: the global encoder, the mean over frames, one linear layer; from a checkpoint or from scratch.

Arms: `scratch` draws new weights, `ft` starts from a checkpoint, `ft_aug` is `ft` with token-chunk drop. (paper, Table 1)
B batch, T frames, Q codebooks, C classes.
"""

import csv
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from megascale import run_folder, seeding, storage
from megascale.config import Section
from megascale.data.index import Manifest, StoredClip, read_clips, read_manifest
from megascale.data.loader import Batch, Row, collate
from megascale.data.transforms import DropConfig, draw_drop_share, draw_kept_frames, draw_starts, removed_frames
from megascale.downstream.protocols import (
    Splits,
    TaskConfig,
    average_windows,
    classes_of,
    score,
    split_clips,
    taking_part,
)
from megascale.errors import CheckpointError, ConfigError, DataError
from megascale.log import MetricLog, say, world_size
from megascale.model.config import ModelConfig
from megascale.model.language_model import load_language_model
from megascale.model.mega_audioformer import AudioClassifier, count_parameters
from megascale.storage import StorageConfig
from megascale.tokens import FRAMES_PER_SECOND, codebooks_for
from megascale.train.checkpoint import read_model, write_model
from megascale.train.engine import Engine, init_distributed
from megascale.train.loop import Hooks, fit
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig


class FinetuneDataConfig(Section):
    """Which tokens."""

    url: str = Field(description="token folder of the labelled corpus")
    bitrate_kbps: float = Field(1.5, description="must be the checkpoint's")


class FinetuneTrainConfig(Section):
    """Length and batches."""

    epochs: int = Field(20, ge=1, description="passes over the training clips")
    batch: int = Field(16, ge=1, description="clips per update")
    crop_seconds: float | None = Field(
        None, gt=0, description="train on random crops of this length; null: whole clips"
    )
    eval_batch: int = Field(16, ge=1, description="clips per forward pass when scoring; whole clips")


class FinetuneOutputConfig(Section):
    """Where the run lies."""

    url: str = Field(description="run folder, on a local or shared disk")
    save_model: bool = Field(True, description="keep the classifier's weights (model/)")


class FinetuneConfig(Section):
    """Everything `launch/finetune.py` needs."""

    data: FinetuneDataConfig = Field(description="which tokens")
    task: TaskConfig = Field(description="what is classified")
    arm: Literal["scratch", "ft", "ft_aug"] = Field(description="first weights and augmentation")
    checkpoint: str | None = Field(
        None, description="pretraining run or checkpoint; for scratch it only gives the shape"
    )
    model: ModelConfig = Field(
        ModelConfig(), description="the model's shape and first weights, for scratch without a checkpoint"
    )
    drop: DropConfig = Field(DropConfig(), description="token-chunk drop, used by ft_aug alone")
    optim: OptimConfig = Field(OptimConfig(lr=1e-4), description="optimizer and schedule")
    train: FinetuneTrainConfig = Field(FinetuneTrainConfig(), description="length and batches")
    zero: ZeroConfig = Field(ZeroConfig(stage=0), description="DeepSpeed ZeRO")
    output: FinetuneOutputConfig = Field(description="where the run lies")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")
    seed: int = Field(0, description="fixes split, new weights, order, crops and drops")

    @model_validator(mode="after")
    def _first_weights_agree(self) -> "FinetuneConfig":
        if self.arm != "scratch" and self.checkpoint is None:
            raise ValueError(f"checkpoint is required for arm={self.arm}")
        if self.checkpoint is not None and self.model.init_from is not None:
            raise ValueError("checkpoint and model.init_from are two first weights; set one")
        return self


def check(config: FinetuneConfig) -> None:
    """Check tokens and checkpoint against the config without reading a clip. Raises what `run` would."""
    storage.configure(config.storage)
    _build_model(config, _open_manifest(config), ["?", "??"])


def describe_plan(config: FinetuneConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    check(config)
    manifest, clips, classes, splits = _open_data(config)
    sizes = ", ".join(f"{len(members)} {name}" for name, members in splits.items())
    model, _ = _build_model(config, manifest, classes)
    plan = f"{len(clips)} clips, {len(classes)} classes: {sizes}; {config.arm}, {config.train.epochs} epochs"
    return f"{plan}, {count_parameters(model) / 1e6:.1f}M parameters -> {config.output.url}"


def run(config: FinetuneConfig, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune and score one classifier; a finished run is not repeated.

    Args:
        config: the job.
        quiet: no progress, for many runs side by side.

    Returns:
        The run's `result.json`.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError: bad input, such as tokens of another codec.
    """
    storage.configure(config.storage)
    path = storage.local_path(config.output.url)
    run_folder.check_config(path, config, "finetune", ("storage.",))
    finished = run_folder.read_result(path)
    if finished is not None:
        if not quiet:
            say(f"{path}: already done: accuracy {finished['accuracy']:.3f}, macro-F1 {finished['macro_f1']:.3f}")
        return finished
    if world_size() != 1:
        raise ConfigError(
            f"finetune: runs on one process, was started on {world_size()}; fan runs out instead (table1)"
        )
    manifest, clips, classes, splits = _open_data(config)
    model, facts = _build_model(config, manifest, classes)
    with run_folder.lock(path):
        return _train(config, path, quiet, manifest, clips, classes, splits, model, facts)


def _train(
    config: FinetuneConfig,
    path: Path,
    quiet: bool,
    manifest: Manifest,
    clips: list[StoredClip],
    classes: list[str],
    splits: Splits,
    model: AudioClassifier,
    facts: dict[str, Any],
) -> dict[str, Any]:
    started = time.monotonic()
    init_distributed()
    run_folder.write_config(path, config)
    trainer = _Trainer(config, model, clips, classes, splits, path)
    trainer.fit(quiet)
    result, predictions = trainer.test()
    result |= {
        "arm": config.arm,
        "bitrate_kbps": config.data.bitrate_kbps,
        "protocol": config.task.protocol,
        "label": config.task.label,
        "seed": config.seed,
        "lr": config.optim.lr,
        "checkpoint": config.checkpoint if config.arm != "scratch" else None,
        "codec": manifest.codec.fingerprint,
        "split_sizes": {name: len(members) for name, members in splits.items()},
        "wall_seconds": time.monotonic() - started,
    }
    storage.publish_bytes(str(path / "predictions.csv"), predictions.encode())
    if config.output.save_model:
        write_model(path / "model", {k: v.float().cpu().contiguous() for k, v in trainer.best_weights.items()}, facts)
    run_folder.write_result(path, result)
    if not quiet:
        say(
            f"accuracy {result['accuracy']:.3f}, macro-F1 {result['macro_f1']:.3f} on {result['count']} recordings -> {path}"
        )
    return result


def _open_manifest(config: FinetuneConfig) -> Manifest:
    manifest = read_manifest(config.data.url)
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    if num_codebooks > manifest.codec.num_codebooks:
        raise DataError(
            f"{config.data.url}: stored with {manifest.codec.num_codebooks} codebooks, "
            f"data.bitrate_kbps={config.data.bitrate_kbps} needs {num_codebooks}"
        )
    return manifest


def _open_data(config: FinetuneConfig) -> tuple[Manifest, list[StoredClip], list[str], Splits]:
    manifest = _open_manifest(config)
    clips = taking_part(read_clips(config.data.url, manifest, codebooks_for(config.data.bitrate_kbps)), config.task)
    classes = classes_of(clips, config.task.label)
    return manifest, clips, classes, split_clips(clips, config.task, config.seed)


def _build_model(
    config: FinetuneConfig, manifest: Manifest, classes: list[str]
) -> tuple[AudioClassifier, dict[str, Any]]:
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    weights: dict[str, Tensor] = {}
    shape = config.model
    if config.checkpoint is not None:
        weights, facts = read_model(config.checkpoint)
        _check_fits(config, facts, manifest, num_codebooks)
        shape = ModelConfig(**facts["model"])
    generator = seeding.torch_generator(config.seed, "classifier weights")
    try:
        model = AudioClassifier(shape, num_codebooks, len(classes), generator)
    except ValueError as failure:
        raise ConfigError(f"finetune.{failure}") from None
    if config.model.init_from is not None:
        load_language_model(model.global_encoder, config.model.init_from)
    if config.arm != "scratch":
        prefix = "global_encoder."
        encoder = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        try:
            model.global_encoder.load_state_dict(encoder)
        except RuntimeError as failure:
            raise CheckpointError(f"{config.checkpoint}: {str(failure).splitlines()[-1].strip()}") from None
    described = {
        "kind": "classifier",
        "model": shape.shape(),
        "num_codebooks": num_codebooks,
        "codec": manifest.codec.model_dump(mode="json"),
        "label": config.task.label,
        "classes": classes,
    }
    return model, described


def _check_fits(config: FinetuneConfig, facts: dict[str, Any], manifest: Manifest, num_codebooks: int) -> None:
    theirs, ours = facts["codec"]["fingerprint"], manifest.codec.fingerprint
    if theirs != ours:
        raise CheckpointError(
            f"{config.checkpoint}: pretrained on tokens of codec {theirs[:8]}; {config.data.url} holds codec {ours[:8]}. "
            "Tokenise this corpus with codec.weights= the pretraining corpus's codec"
        )
    if facts["num_codebooks"] != num_codebooks:
        kbps = facts["num_codebooks"] * 0.75
        raise ConfigError(
            f"finetune.data.bitrate_kbps={config.data.bitrate_kbps}: {config.checkpoint} was pretrained at {kbps:g} kbps"
        )


class _Trainer:
    """One classifier's training, model choice on validation, and test."""

    def __init__(
        self,
        config: FinetuneConfig,
        model: AudioClassifier,
        clips: Sequence[StoredClip],
        classes: list[str],
        splits: Splits,
        path: Path,
    ) -> None:
        self._config, self._clips, self._classes, self._splits, self._path = config, clips, classes, splits, path
        number = {name: i for i, name in enumerate(classes)}
        self._targets = np.array([number[str(clip.labels[config.task.label])] for clip in clips])
        self._hashes = np.array([seeding.hash_int64(clip.key) for clip in clips])
        self._batch = min(config.train.batch, len(splits["train"]))
        self._per_epoch = len(splits["train"]) // self._batch
        self._num_steps = config.train.epochs * self._per_epoch
        self._engine = Engine(model, config.optim, config.zero, self._batch, 1, self._num_steps)
        self._best: tuple[float, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self._best_epoch = 0

    def fit(self, quiet: bool) -> None:
        log = MetricLog(self._path / "metrics.jsonl")
        fit(
            self._engine,
            self._batches(),
            _loss,
            Hooks(_summarise, self._validate, None, _note),
            log,
            title="" if quiet else f"fine-tuning {self._config.arm}",
            start=0,
            num_steps=self._num_steps,
            log_every=self._per_epoch,
            validate_every=self._per_epoch,
            save_every=self._num_steps,
        )
        log.close()

    def test(self) -> tuple[dict[str, Any], str]:
        """Score the chosen weights on the test split. Returns the result and predictions.csv."""
        assert self._best is not None, "training validates at least once"
        self._engine.module.load_state_dict(self.best_weights)
        probabilities_RC, targets_R, names, _ = self._predict(self._splits["test"])
        result = score(targets_R, probabilities_RC.argmax(axis=1), self._classes)
        result |= {"valid_accuracy": self._best[0], "valid_loss": -self._best[1], "best_epoch": self._best_epoch}
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["recording", "label", "predicted", *self._classes])
        for name, target, row in zip(names, targets_R, probabilities_RC, strict=True):
            chosen = self._classes[int(row.argmax())]
            writer.writerow([name, self._classes[int(target)], chosen, *(f"{p:.4f}" for p in row)])
        return result, out.getvalue()

    def _batches(self) -> Iterator[list[Batch]]:
        config, train = self._config, np.array(self._splits["train"])
        crop_frames = round((config.train.crop_seconds or 1e9) * FRAMES_PER_SECOND)
        for epoch in range(config.train.epochs):
            order = seeding.generator(config.seed, "finetune order", epoch).permutation(len(train))
            for i in range(self._per_epoch):
                chosen = train[order[i * self._batch : (i + 1) * self._batch]]
                rng = seeding.generator(config.seed, "finetune batch", epoch, i)
                share = draw_drop_share(config.drop, rng) if config.arm == "ft_aug" else 0.0
                rows = self._rows(chosen, crop_frames, share, epoch)
                yield [collate(rows) | {"targets_B": torch.from_numpy(self._targets[chosen])}]

    def _rows(self, chosen: np.ndarray, crop_frames: int, drop_share: float, epoch: int) -> list[Row]:
        crop_seed_B, drop_seed_B = (
            seeding.clip_seeds(torch.from_numpy(self._hashes[chosen]), self._config.seed, f"finetune {purpose}", epoch)
            for purpose in ("crop", "drop")
        )
        whole_B = np.array([self._clips[clip].codes_QT.shape[1] for clip in chosen])
        crop_B = np.minimum(whole_B, crop_frames)
        removed_B = removed_frames(crop_B, drop_share)
        starts_B = draw_starts(crop_seed_B, whole_B, crop_B).numpy()
        kept_BT = draw_kept_frames(drop_seed_B, crop_B, removed_B).numpy()
        rows = []
        for clip, start, kept_T, left in zip(chosen, starts_B, kept_BT, crop_B - removed_B, strict=True):
            codes_TQ = self._clips[clip].codes_QT.T[start + kept_T[:left]]
            rows.append((codes_TQ, np.arange(left) if self._config.drop.close_gap else kept_T[:left]))
        return rows

    def _validate(self, steps: int) -> dict[str, float]:
        probabilities_RC, targets_R, _, loss = self._predict(self._splits["valid"])
        accuracy = float((probabilities_RC.argmax(axis=1) == targets_R).mean())
        if self._best is None or (accuracy, -loss) > self._best:
            self._best, self._best_epoch = (accuracy, -loss), steps // self._per_epoch
            self.best_weights = {k: v.detach().clone() for k, v in self._engine.module.state_dict().items()}
        return {"valid/loss": loss, "valid/acc": accuracy}

    def _predict(self, members: list[int]) -> tuple[np.ndarray, np.ndarray, list[str], float]:
        # clips of like length together, so that little is padding
        order = sorted(members, key=lambda i: (self._clips[i].codes_QT.shape[1], i))
        parts = []
        for i in range(0, len(order), self._config.train.eval_batch):
            chosen = order[i : i + self._config.train.eval_batch]
            rows = [(self._clips[c].codes_QT.T, np.arange(self._clips[c].codes_QT.shape[1])) for c in chosen]
            parts.append(self._engine.evaluate(collate(rows)).float().softmax(dim=-1).cpu().numpy())
        probabilities, targets = np.concatenate(parts), self._targets[order]
        averaged = average_windows(probabilities, targets, [self._clips[i].recording for i in order])
        loss = -np.log(np.maximum(averaged[0][np.arange(len(averaged[1])), averaged[1]], 1e-12)).mean()
        return *averaged, float(loss)


def _loss(logits_BC: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    targets_B = batch["targets_B"]
    loss = F.cross_entropy(logits_BC.float(), targets_B)
    correct = (logits_BC.argmax(dim=-1) == targets_B).sum()
    return loss, {"loss": loss, "correct": correct, "clips": torch.tensor(float(len(targets_B)), device=loss.device)}


def _summarise(sums: dict[str, Tensor], seconds: float) -> dict[str, float]:
    return {
        "train/loss": float(sums["loss"] / sums["updates"]),
        "train/acc": float(sums["correct"] / sums["clips"]),
        "train/lr": float(sums["lr"] / sums["updates"]),
        "train/clips_per_second": float(sums["clips"]) / max(seconds, 1e-9),
    }


def _note(metrics: dict[str, float]) -> str:
    return f"loss {metrics['train/loss']:.3f}  accuracy {metrics['train/acc']:.3f}"
