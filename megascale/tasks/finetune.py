"""Fine-tuning: the global encoder, pooling over frames, one linear layer; from a checkpoint or from scratch.

Arms: `scratch` draws new weights; `probe` trains a linear layer on a checkpoint's frozen encoder; `ft` trains both; `ft_aug`
is `ft` with token-chunk drop. (paper, Table 1)
"""

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from megascale import run_folder, seeding, storage
from megascale.data.index import Manifest
from megascale.downstream.split_lists import match_lists
from megascale.errors import CheckpointError, ConfigError
from megascale.log import say, world_size
from megascale.model.config import ModelConfig
from megascale.model.language_model import load_language_model
from megascale.model.mega_audioformer import AudioClassifier, count_parameters
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.finetune_data import LabelledClips, open_clips, open_manifest
from megascale.tasks.finetune_trainer import Trainer
from megascale.tokens import codebooks_for
from megascale.train.checkpoint import FoundModel, find_model, read_model, write_model
from megascale.train.engine import init_distributed


def check(config: FinetuneConfig) -> None:
    """Check tokens, checkpoint and lists against the config without reading a clip. Raises what `run` would."""
    storage.configure(config.storage)
    if config.task.protocol == "lists":
        match_lists(config.task.lists, [])
    _build_model(config, open_manifest(config), ["?", "??"])


def describe_plan(config: FinetuneConfig) -> str:
    """Return what the job would do (`--dry-run`); writes nothing."""
    check(config)
    data = open_clips(config)
    sizes = ", ".join(f"{len(members)} {name}" for name, members in data.splits.items())
    model, _ = _build_model(config, data.manifest, data.classes)
    plan = f"{len(data.clips)} clips, {len(data.classes)} classes: {sizes}; {config.arm}, {config.train.epochs} epochs"
    plan += f", {count_parameters(model) / 1e6:.1f}M parameters -> {config.output.url}"
    return f"{plan}\n{_split_line(data)}"


def run(config: FinetuneConfig, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune and score one classifier; a finished run is not repeated.

    Args:
        config: the job.
        quiet: no progress, for many runs side by side.

    Returns:
        The run's `result.json`.

    Raises:
        ConfigError, DataError, TokenError, CheckpointError, StorageError: bad input, such as tokens of another codec.
    """
    storage.configure(config.storage)
    path = storage.local_path(config.output.url)
    run_folder.check_config(path, config, "finetune", ("storage.",))
    finished = run_folder.read_result(path)
    if finished is not None:
        if not quiet:
            say(f"{path}: already done: {_headline(finished)}")
        return finished
    if world_size() != 1:
        raise ConfigError(
            f"finetune: runs on one process, was started on {world_size()}; fan runs out instead (table1)"
        )
    data = open_clips(config)
    found = find_model(config.checkpoint) if config.checkpoint is not None else None
    # a run that goes on may have another best one a moment later
    pinned = config.model_copy(update={"checkpoint": found.url}) if found else config
    model, facts = _build_model(pinned, data.manifest, data.classes)
    if not quiet:
        say(_split_line(data))
    with run_folder.lock(path):
        return _train(config, path, quiet, data, model, facts, found if config.arm != "scratch" else None)


def _train(
    config: FinetuneConfig,
    path: Path,
    quiet: bool,
    data: LabelledClips,
    model: AudioClassifier,
    facts: dict[str, Any],
    first: FoundModel | None,
) -> dict[str, Any]:
    started = time.monotonic()
    init_distributed()
    run_folder.write_config(path, config)
    trainer = Trainer(config, model, data, path)
    trainer.fit(quiet)
    result, predictions = trainer.test()
    result |= {
        "arm": config.arm,
        "bitrate_kbps": config.data.bitrate_kbps,
        "protocol": config.task.protocol,
        "fold": config.task.fold if config.task.protocol == "folds" else None,
        "label": config.task.label,
        "task_kind": config.task.kind,
        "seed": config.seed,
        "lr": config.optim.lr,
        "checkpoint": config.checkpoint if first else None,
        "checkpoint_step": first.step if first else None,
        "checkpoint_sha256": first.sha256 if first else None,
        "codec": data.manifest.codec.fingerprint,
        "split_sizes": {name: len(members) for name, members in data.splits.items()},
        "split_check": data.split_check,
        "wall_seconds": time.monotonic() - started,
    }
    storage.publish_bytes(str(path / "predictions.csv"), predictions.encode())
    if config.output.save_model:
        write_model(path / "model", {k: v.float().cpu().contiguous() for k, v in trainer.best_weights.items()}, facts)
    run_folder.write_result(path, result)
    if not quiet:
        say(f"{_headline(result)} on {result['count']} recordings -> {path}")
    return result


def _headline(result: dict[str, Any]) -> str:
    if result["task_kind"] == "single":
        return f"accuracy {result['accuracy']:.3f}, macro-F1 {result['macro_f1']:.3f}"
    distance = "no d'" if result["d_prime"] is None else f"d' {result['d_prime']:.3f}"
    return f"mAP {result['map']:.3f}, {distance}"


def _split_line(data: LabelledClips) -> str:
    return f"split: {data.split_check['summary']}"


def _build_model(
    config: FinetuneConfig, manifest: Manifest, classes: list[str]
) -> tuple[AudioClassifier, dict[str, Any]]:
    """Return the classifier with the arm's first weights, and what its saved model tells of it."""
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    weights: dict[str, Tensor] = {}
    shape, clip_frames = config.model, None
    if config.checkpoint is not None:
        weights, facts = read_model(config.checkpoint, keep=True)
        _check_fits(config, facts, manifest, num_codebooks)
        shape, clip_frames = ModelConfig(**facts["model"]), facts.get("clip_frames")  # None: checkpoints of old lack it
    generator = seeding.torch_generator(config.seed, "classifier weights")
    try:
        model = AudioClassifier(shape, num_codebooks, len(classes), generator, config.head.pooling)
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
        "task_kind": config.task.kind,
        "classes": classes,
        "pooling": config.head.pooling,
    }
    if clip_frames is not None:
        described["clip_frames"] = clip_frames
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
