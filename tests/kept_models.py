"""Runs as pretraining and fine-tuning leave them, without the training."""

import json
from pathlib import Path
from typing import Any

import yaml
from support import FINGERPRINT
from torch import Tensor, nn

from megascale.data.index import CodecFacts
from megascale.model.config import ModelConfig, Pooling
from megascale.model.mega_audioformer import AudioClassifier, MegaAudioFormer
from megascale.seeding import torch_generator
from megascale.tokens import model_name
from megascale.train import checkpoint

SHAPE = ModelConfig(layers=2, width=32, heads=2, mlp_width=48, local_layers=1, local_width=16, local_heads=1)
CORPUS = "cd" * 32
CODEC = CodecFacts(
    name=model_name(FINGERPRINT, published=False),
    fingerprint=FINGERPRINT,
    origin="calibrated on 30 s, seed 0",
    num_codebooks=16,
)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def pretrained(seed: int = 0, num_codebooks: int = 2) -> MegaAudioFormer:
    """A model whose weights are larger than first ones, so that its outputs differ from clip to clip."""
    model = MegaAudioFormer(SHAPE, num_codebooks, torch_generator(seed, "test"))
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model


def facts_of(codec: CodecFacts = CODEC, num_codebooks: int = 2) -> dict[str, Any]:
    """What pretraining writes as config.json."""
    return {
        "kind": "pretrained",
        "model": SHAPE.shape(),
        "init_from": None,
        "num_codebooks": num_codebooks,
        "codec": codec.model_dump(mode="json"),
        "corpus": CORPUS,
        "clip_frames": 75,
    }


def write_run(folder: Path, codec: CodecFacts = CODEC, tokens: Path | str = "/nowhere/tokens") -> Path:
    """A run with checkpoints of steps 10, the best, and 20; weights are seeded by the step, averages by one more."""
    for step, loss in ((10, 2.5), (20, 2.75)):
        kept = checkpoint.step_folder(folder / "checkpoints", step)
        checkpoint.begin(kept)
        checkpoint.write_model(kept / "model", weights_of(pretrained(step)), facts_of(codec))
        checkpoint.write_model(kept / checkpoint.EMA, weights_of(pretrained(step + 1)), facts_of(codec))
        checkpoint.commit(kept, step, 16 * step, 1, loss)
    config = {
        "data": {"url": str(tokens), "bitrate_kbps": 1.5, "clip_seconds": 1.0},
        "output": {"url": str(folder)},
        "train": {"steps": 20, "global_batch": 16},
        "optim": {"lr": 0.00321},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": step, "valid/loss": loss, "valid/acc_q0": accuracy, "train/loss": 9.0}
        for step, loss, accuracy in ((10, 2.5, 0.4), (20, 2.75, 0.3))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_finetuned(
    folder: Path, codec: CodecFacts = CODEC, num_codebooks: int = 2, pooling: Pooling = "mean"
) -> AudioClassifier:
    """A fine-tuning run of three classes."""
    model = AudioClassifier(SHAPE, num_codebooks, 3, torch_generator(5, "test"), pooling)
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    facts = facts_of(codec, num_codebooks) | {
        "kind": "classifier",
        "label": "genre",
        "classes": ["blues", "jazz", "rock"],
        "pooling": pooling,
    }
    for key in ("corpus", "init_from", "clip_frames"):
        del facts[key]
    checkpoint.write_model(folder / "model", weights_of(model), facts)
    (folder / "config.yaml").write_text(yaml.safe_dump({"arm": "ft", "optim": {"lr": 0.00321}}))
    result = {
        "accuracy": 0.625,
        "macro_f1": 0.5,
        "count": 8,
        "arm": "ft",
        "classes": ["blues"],
        "checkpoint": "/secret",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return model
