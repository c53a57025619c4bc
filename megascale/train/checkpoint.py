"""Checkpoints: a folder counts only when its manifest, written last, names every file with its hash.

checkpoints/step-00001000/ holds DeepSpeed's files, rank-00000.safetensors (RNG, samples consumed) for each rank, model/
(safetensors and config.json, loadable without DeepSpeed), model_ema/ where averages are kept, and manifest.json.
Training works in local folders; what is only read (`read_model`, `fetch`) may lie at any URL.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from megascale import storage
from megascale.config import Section
from megascale.errors import CheckpointError, StorageError
from megascale.local_disk import settle, settle_one
from megascale.train import copies
from megascale.train import manifest as manifests
from megascale.train.manifest import CHANGED, CHECKPOINTS, MANIFEST, MISSING, THREADS, CheckpointManifest

EMA = "model_ema"  # beside model/, of the same form
_MODEL_FILES = ("config.json", "model.safetensors")


class CheckpointConfig(Section):
    """When to save, what to keep, and where else."""

    every: int = Field(1000, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_last: int = Field(2, ge=1, description="newest to keep; the best by validation loss stays too")
    keep_every: int | None = Field(None, ge=1, description="checkpoints whose step is a multiple of this stay for good")
    upload_url: str | None = Field(
        None, description="run folder on any store; each checkpoint is copied there beside training, and kept likewise"
    )


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where a step's checkpoint lies."""
    return checkpoints / f"step-{step:08d}"


def begin(folder: Path) -> None:
    """Clear what an interrupted save left behind; rank 0 alone, before any rank writes."""
    manifests.delete_checkpoint(str(folder))
    folder.mkdir(parents=True)


def save_rank_state(folder: Path, rank: int, consumed_samples: int) -> None:
    """Write one rank's random state and how many samples it knows to be consumed."""
    state = {"rng_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng_cuda"] = torch.cuda.get_rng_state()
    path = folder / f"rank-{rank:05d}.safetensors"
    _write_tensors(path, state, {"consumed_samples": str(consumed_samples)})


def load_rank_state(folder: Path, rank: int) -> None:
    """Restore one rank's random state. Raises CheckpointError if the rank knows another number of consumed samples."""
    path = folder / f"rank-{rank:05d}.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        consumed_samples = int(file.metadata()["consumed_samples"])
    expected = read_manifest(folder).consumed_samples
    if consumed_samples != expected:
        raise CheckpointError(f"{path}: saved after {consumed_samples} samples, {MANIFEST} says {expected}")
    state = safetensors.torch.load_file(path)
    torch.set_rng_state(state["rng_cpu"])
    if torch.cuda.is_available() and "rng_cuda" in state:
        torch.cuda.set_rng_state(state["rng_cuda"])


def commit(folder: Path, step: int, consumed_samples: int, world_size: int, valid_loss: float | None) -> None:
    """Hash every file and write the manifest; rank 0 alone, after a barrier.

    The files are on the disk before the manifest is, so that a power cut leaves no manifest over empty files.
    """
    settle(folder)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    if valid_loss is not None and not math.isfinite(valid_loss):
        valid_loss = None  # a run that diverged is still saved, and never the best
    manifest = CheckpointManifest(
        step=step,
        consumed_samples=consumed_samples,
        world_size=world_size,
        valid_loss=valid_loss,
        committed_at=datetime.now(UTC).replace(microsecond=0),
        files={name: manifests.sha256(str(path)) for name, path in files.items()},
    )
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    storage.publish_bytes(str(folder / MANIFEST), manifests.to_bytes(manifest))
    settle_one(folder)  # an older checkpoint may be deleted next


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read a committed checkpoint's manifest. Raises CheckpointError: there is none, or it is broken."""
    return manifests.read_manifest(str(folder))


def verify(folder: Path) -> CheckpointManifest:
    """Check every file of a checkpoint against its hash; nothing is unpickled before this.

    Files that the manifest does not name are loaded by nothing, but for `.pt` files: DeepSpeed takes those by pattern, and
    unpickles what it finds. So one of them that is not named is refused.

    Raises:
        CheckpointError: not committed, or a file is missing, changed, or not named; names it.
    """
    manifest = read_manifest(folder)
    for place, fault in manifests.check_files(str(folder), manifest.files):
        if fault is not None:
            raise CheckpointError(f"{place}: {fault}")
    for path in sorted(folder.rglob("*.pt")):
        if path.relative_to(folder).as_posix() not in manifest.files:
            raise CheckpointError(f"{path}: {manifests.UNNAMED}")
    return manifest


def fetch(url: str, folder: Path) -> None:
    """Copy a committed checkpoint from any URL into an empty folder: each file checked by its hash, the manifest last.

    Raises:
        CheckpointError: not committed, or a file is missing or changed.
        StorageError: the store, or the disk.
    """
    manifest = manifests.read_manifest(url)
    _fetch_files(url, manifest.files, folder)
    settle(folder)
    _write_manifest(folder, manifest)


def _fetch_files(url: str, files: Mapping[str, str | None], folder: Path) -> None:
    """Copy files, several at a time; each is checked by its hash, where there is one."""

    def fetch_one(name: str) -> None:
        place, path, digest = storage.join(url, name), folder / name, hashlib.sha256()
        if not storage.exists(place):
            raise CheckpointError(f"{place}: {MISSING}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for block in storage.read_blocks(place):
                    digest.update(block)
                    file.write(block)
        except OSError as failure:
            raise StorageError(f"{path}: cannot write: {failure.strerror}") from None
        if files[name] not in (None, digest.hexdigest()):
            raise CheckpointError(f"{place}: {CHANGED}")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch_one, files))


def committed(checkpoints: Path) -> list[Path]:
    """Return the committed checkpoints of a run, oldest first; folders without a manifest don't exist."""
    return sorted(p for p in checkpoints.glob("step-*") if manifests.is_step(p.name) and (p / MANIFEST).is_file())


def best(checkpoints: Path) -> Path | None:
    """Return the committed checkpoint with the lowest validation loss; the newest, if none was validated."""
    found = [(read_manifest(path), path) for path in committed(checkpoints)]
    step = manifests.best_step({manifest.step: manifest.valid_loss for manifest, _ in found})
    return next((path for manifest, path in found if manifest.step == step), None)


def write_model(folder: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write weights (safetensors) and what is needed to rebuild and use the model (config.json).

    Raises:
        StorageError: the disk refuses.
    """
    _write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    storage.publish_bytes(str(folder / "config.json"), json.dumps(facts, indent=1).encode())


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, path, metadata)
        path.chmod(0o644)  # safetensors' 0600 would hide models from a team sharing the folder
    except (OSError, safetensors.SafetensorError) as failure:
        reason = getattr(failure, "strerror", None) or " ".join(str(failure).split())
        raise StorageError(f"{path}: cannot write: {reason}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a `model/` folder, on the CPU."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a `model/` folder. Raises ValueError: no JSON mapping."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
        raise ValueError("config.json holds no mapping")
    return facts


def read_model(url: str, keep: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint (`step-…`), a run (its best one; a fine-tuned one has a `model/` alone), or a bare `model/` or
    `model_ema/` folder, at any URL.

    What a manifest names is verified first: all of a local checkpoint; of one elsewhere its `model/` files, which alone
    are fetched.

    Args:
        url: where; what is local is read in place.
        keep: leave a copy of what a store's manifest names on this machine (`copies`), because others will read it, too.
            A copy that is there is used in any case.

    Raises:
        CheckpointError: none of these, or damaged.
    """
    if storage.is_local(url):
        return _load_model(url, _verified_model(storage.local_path(url)))
    place, part, files = _needed(url)
    hashes = {name: digest for name, digest in files.items() if digest is not None}
    if hashes:  # a bare folder has none, and could change unseen
        copy = copies.folder_of(place, hashes)
        if keep:
            copies.make(copy, hashes, lambda folder: _fetch_files(place, files, folder))
        if keep or copies.is_whole(copy, hashes):
            return _load_model(url, copy / part)
    with tempfile.TemporaryDirectory(prefix="megascale-model-") as temporary:
        _fetch_files(place, files, Path(temporary))
        return _load_model(url, Path(temporary, part))


def _verified_model(folder: Path) -> Path:
    """Return the `model/` folder that a local path stands for."""
    if (folder / CHECKPOINTS).is_dir():
        chosen = best(folder / CHECKPOINTS)
        if chosen is None:
            raise CheckpointError(f"{folder}: a run without a committed checkpoint")
        folder = chosen
    if folder.name.startswith("step-") or (folder / MANIFEST).exists():
        verify(folder)
        return folder / "model"
    if folder.name in ("model", EMA) and (folder.parent / MANIFEST).exists():
        verify(folder.parent)
    finetuned = folder / "model"
    return finetuned if (finetuned / _MODEL_FILES[0]).is_file() else folder


def checkpoint_of(url: str) -> str | None:
    """Return the checkpoint that a run (its best one), a `step-…` folder, or a `model/` in one stands for, at any URL;
    None for a bare folder. Raises CheckpointError: a run that has none, or a manifest in it is broken.
    """
    url = os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url.rstrip("/")
    listed = manifests.list_checkpoints(storage.join(url, CHECKPOINTS))
    if listed:
        return _best_of(url, listed)
    parent, _, last = url.rpartition("/")
    if last in ("model", EMA) and storage.exists(storage.join(parent, MANIFEST)):
        return parent
    return url if last.startswith("step-") or storage.exists(storage.join(url, MANIFEST)) else None


@dataclass(frozen=True)
class FoundModel:
    """What a URL stands for at this moment: the checkpoint's own URL, its step (None: a bare folder, which tells none),
    and the sha256 of its `model.safetensors`."""

    url: str
    step: int | None
    sha256: str


def find_model(url: str) -> FoundModel:
    """Return which weights `read_model` would read. Raises CheckpointError: there are none, or a manifest is broken."""
    weights, found = _MODEL_FILES[1], checkpoint_of(url)
    if found is None:
        if storage.exists(storage.join(url, CHECKPOINTS)):
            raise CheckpointError(f"{url}: a run without a committed checkpoint")
        finetuned = storage.join(url, "model")
        place = storage.join(finetuned if storage.exists(storage.join(finetuned, _MODEL_FILES[0])) else url, weights)
        if not storage.exists(place):
            raise CheckpointError(f"{url}: no checkpoint here: {place} is missing")
        return FoundModel(url, None, manifests.sha256(place))
    place, part = os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url.rstrip("/"), "model"
    if found.startswith(f"{place}/"):  # a run's best; a relative path stays one
        url = storage.join(url, found.removeprefix(f"{place}/"))
    elif place.startswith(f"{found}/"):
        part = place.removeprefix(f"{found}/")
    manifest = manifests.read_manifest(found)
    if f"{part}/{weights}" not in manifest.files:
        raise CheckpointError(f"{url}: no checkpoint here: {found}/{part}/{weights} is missing")
    return FoundModel(url, manifest.step, manifest.files[f"{part}/{weights}"])


def _needed(url: str) -> tuple[str, str, dict[str, str | None]]:
    """Return what has to be fetched of a store's model: from which folder, which part of that is the model, and the files
    with their hashes (None: no manifest tells)."""
    url = url.rstrip("/")
    parent, _, last = url.rpartition("/")
    found = checkpoint_of(url)
    if found is not None:
        part = last if found == parent else "model"
        named = manifests.read_manifest(found).files
        return found, part, {name: digest for name, digest in named.items() if name.startswith(f"{part}/")}
    if storage.exists(storage.join(url, "model", _MODEL_FILES[0])):  # a fine-tuned run's
        url = storage.join(url, "model")
    return url, "", {name: None for name in _MODEL_FILES if storage.exists(storage.join(url, name))}


def _best_of(url: str, listed: list[manifests.Listed]) -> str:
    for each in listed:
        if each.state == manifests.BROKEN:  # it may be the best
            manifests.read_manifest(each.url)
    step = manifests.best_step(manifests.losses_of(listed))
    if step is None:
        raise CheckpointError(f"{url}: a run without a committed checkpoint")
    return next(each.url for each in listed if each.step == step)


def _load_model(url: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    for name in _MODEL_FILES:
        if not (folder / name).is_file():
            place = folder / name if storage.is_local(url) else name
            raise CheckpointError(f"{url}: no checkpoint here: {place} is missing")
    try:
        return read_weights(folder), read_facts(folder)
    except (OSError, ValueError, safetensors.SafetensorError) as failure:
        raise CheckpointError(f"{url}: cannot be read: {failure}") from None
