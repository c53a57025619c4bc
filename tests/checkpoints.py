"""Checkpoints as pretraining saves them, without the training."""

from pathlib import Path

import torch

from megascale.train import checkpoint

WEIGHTS = {"norm.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor([1.5])}
FACTS = {"kind": "pretrained", "codec": {"fingerprint": "ab" * 32}}


def save(checkpoints: Path, step: int, valid_loss: float | None = None, weights: float = 1.0) -> Path:
    """A checkpoint as pretraining saves it, on two ranks; DeepSpeed's files are some bytes in a folder of their own."""
    folder = checkpoint.step_folder(checkpoints, step)
    checkpoint.begin(folder)
    (folder / "zero").mkdir()
    (folder / "zero" / "optim_states.pt").write_bytes(bytes(range(64)))
    for rank in range(2):
        checkpoint.save_rank_state(folder, rank, 16 * step)
    checkpoint.write_model(folder / "model", {k: v * weights for k, v in WEIGHTS.items()}, FACTS)
    checkpoint.commit(folder, step, 16 * step, 2, valid_loss)
    return folder


def steps(folders: list[Path]) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in folders]


FILES = [
    "model/config.json",
    "model/model.safetensors",
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    "zero/optim_states.pt",
]
