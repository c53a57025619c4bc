"""Small classifiers as fine-tuning writes them, and `.ecdc` streams for them."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megascale.data.index import CodecFacts
from megascale.model.config import ModelConfig, Pooling
from megascale.model.mega_audioformer import AudioClassifier
from megascale.seeding import torch_generator
from megascale.tokens import SAMPLES_PER_FRAME, model_name, write_ecdc
from megascale.train.checkpoint import write_model

FINGERPRINT = "ab" * 32
NAME = model_name(FINGERPRINT, published=False)
CLASSES = ["high", "low", "none"]
SHAPE = ModelConfig(layers=2, width=64, heads=2, mlp_width=96, local_layers=1, local_width=16, local_heads=1)


def write_classifier(
    folder: Path,
    num_codebooks: int = 2,
    fingerprint: str = FINGERPRINT,
    told: Mapping[str, object] = {},
    pooling: Pooling = "mean",
) -> AudioClassifier:
    """Write the `model/` of a classifier whose weights are ten times first ones, so that its answers differ; return it.

    `told` stands in its config.json in place of what is true.
    """
    model = AudioClassifier(SHAPE, num_codebooks, len(CLASSES), torch_generator(0, "test classifier"), pooling)
    for name, parameter in model.named_parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 and "table" not in name else 1)
    codec = CodecFacts(
        name=model_name(fingerprint, published=False), fingerprint=fingerprint, origin="test", num_codebooks=16
    )
    facts = {
        "kind": "classifier",
        "model": SHAPE.model_dump(),
        "num_codebooks": num_codebooks,
        "codec": codec.model_dump(),
        "label": "class",
        "classes": CLASSES,
        "pooling": pooling,
    }
    write_model(folder, {k: v.detach().clone() for k, v in model.named_parameters()}, facts | dict(told))
    return model.eval()


def draw_codes(frames: int, num_codebooks: int = 2, seed: int = 0) -> np.ndarray:
    """Random codes_QT, int16."""
    return np.random.default_rng(seed).integers(0, 1024, (num_codebooks, frames), dtype=np.int16)


def write_stream(path: Path, codes_QT: np.ndarray, name: str = NAME) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_ecdc(codes_QT, codes_QT.shape[1] * SAMPLES_PER_FRAME, name))
    return path


def write_foreign_stream(path: Path, **header: object) -> Path:
    """A stream with another header than ours and some bytes of payload."""
    meta = json.dumps({"m": NAME, "al": 3200, "nc": 2, "lm": False} | header).encode()
    path.write_bytes(struct.pack("!4sBI", b"ECDC", 0, len(meta)) + meta + bytes(25))
    return path
