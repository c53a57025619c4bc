"""Checkpoints: a folder counts only when its manifest, written last, names every file with its hash.

checkpoints/step-00001000/ holds DeepSpeed's files, rank-00000.safetensors (RNG, samples consumed) for each rank, model/
(safetensors and config.json, loadable without DeepSpeed), model_ema/ where averages are kept, and manifest.json.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from megascale import storage
from megascale.config import Section
from megascale.errors import CheckpointError

_MANIFEST = "manifest.json"
EMA = "model_ema"  # beside model/, of the same form


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: int = Field(1000, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_last: int = Field(2, ge=1, description="newest to keep; the best by validation loss stays too")


class CheckpointManifest(Section):
    """What a committed checkpoint holds."""

    step: int = Field(description="updates done")
    consumed_samples: int = Field(description="clips taken from the order: the loader's whole state")
    world_size: int = Field(description="ranks that wrote it")
    valid_loss: float | None = Field(description="at this step, if it was validated")
    files: dict[str, str] = Field(description="sha256 of every other file, by path in the folder")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where a step's checkpoint lies."""
    return checkpoints / f"step-{step:08d}"


def begin(folder: Path) -> None:
    """Clear what an interrupted save left behind; rank 0 alone, before any rank writes."""
    _delete(folder)
    folder.mkdir(parents=True)


def save_rank_state(folder: Path, rank: int, consumed_samples: int) -> None:
    """Write one rank's random state and how many samples it knows to be consumed."""
    state = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng_cuda"] = torch.cuda.get_rng_state()
    path = folder / f"rank-{rank:05d}.safetensors"
    safetensors.torch.save_file(state, path, {"consumed_samples": str(consumed_samples)})


def load_rank_state(folder: Path, rank: int) -> None:
    """Restore one rank's random state. Raises CheckpointError if the rank knows another number of consumed samples."""
    path = folder / f"rank-{rank:05d}.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        consumed_samples = int(file.metadata()["consumed_samples"])
    expected = read_manifest(folder).consumed_samples
    if consumed_samples != expected:
        raise CheckpointError(f"{path}: saved after {consumed_samples} samples, {_MANIFEST} says {expected}")
    state = safetensors.torch.load_file(path)
    torch.set_rng_state(state["rng_cpu"])
    if torch.cuda.is_available() and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"])


def commit(folder: Path, step: int, consumed_samples: int, world_size: int, valid_loss: float | None) -> None:
    """Hash every file and write the manifest; rank 0 alone, after a barrier."""
    files = {p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    if valid_loss is not None and not math.isfinite(valid_loss):
        valid_loss = None  # a run that diverged is still saved, and never the best
    manifest = CheckpointManifest(
        step=step, consumed_samples=consumed_samples, world_size=world_size, valid_loss=valid_loss, files=files
    )
    storage.publish_bytes(str(folder / _MANIFEST), manifest.model_dump_json(indent=1).encode())


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a committed checkpoint's manifest. Raises CheckpointError: there is none, or it is broken."""
    path = folder / _MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no manifest; not a checkpoint, or its save was not completed")
    try:
        return CheckpointManifest.model_validate_json(path.read_bytes())
    except ValidationError as failure:
        raise CheckpointError(f"{path}: broken: {failure.errors()[0]['msg']}") from None


def verify(folder: Path) -> CheckpointManifest:
    """Check every file of a checkpoint against its hash; nothing is unpickled before this.

    Raises:
        CheckpointError: not committed, or a file is missing or changed; names it.
    """
    manifest = read_manifest(folder)
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from a committed checkpoint")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: its sha256 is not the one in {_MANIFEST}; the file was changed or damaged")
    return manifest


def committed(checkpoints: Path) -> list[Path]:
    """Return the committed checkpoints of a run, oldest first; folders without a manifest don't exist."""
    return sorted(p for p in checkpoints.glob("step-*") if (p / _MANIFEST).is_file())


def best(checkpoints: Path) -> Path | None:
    """Return the committed checkpoint with the lowest validation loss; the newest, if none was validated."""
    found = committed(checkpoints)
    losses = {path: read_manifest(path).valid_loss for path in found}
    validated = [path for path in found if losses[path] is not None]
    return min(validated, key=lambda path: losses[path] or 0.0) if validated else (found[-1] if found else None)


def prune(checkpoints: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` and the best, and what older saves or deletions left half done.

    Called only after a newer one was committed.
    """
    found = committed(checkpoints)
    keep = {*found[-keep_last:], best(checkpoints)}
    for path in checkpoints.glob("step-*"):
        if path not in keep and path < found[-1]:
            _delete(path)


def _delete(folder: Path) -> None:
    if folder.is_dir():
        # the manifest goes first: a deletion cut short must not look like a checkpoint
        (folder / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def write_model(folder: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write weights (safetensors) and what is needed to rebuild and use the model (config.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    storage.publish_bytes(str(folder / "config.json"), json.dumps(facts, indent=1).encode())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a `model/` folder, on the CPU."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a `model/` folder. Raises ValueError: no JSON mapping."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError("config.json holds no mapping")
    return facts


def read_model(url: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint folder (`step-…`, verified first), a run folder (its best one), or a bare `model/` folder.

    Raises:
        CheckpointError: none of these, or damaged.
    """
    folder = storage.local_path(url)
    if (folder / "checkpoints").is_dir():
        chosen = best(folder / "checkpoints")
        if chosen is None:
            raise CheckpointError(f"{folder}: a run without a committed checkpoint")
        folder = chosen
    if folder.name.startswith("step-") or (folder / _MANIFEST).exists():
        verify(folder)
        folder = folder / "model"
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{url}: no checkpoint here: {folder / name} is missing")
    try:
        return read_weights(folder), read_facts(folder)
    except (OSError, ValueError, safetensors.SafetensorError) as failure:
        raise CheckpointError(f"{url}: cannot be read: {failure}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
