"""A checkpoint's manifest, and what follows from manifests alone, at any URL: which checkpoints there are, whether their
files are whole, which is the best, and which are kept. Needs no torch.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from pydantic import Field, ValidationError, field_validator

from megascale import storage
from megascale.config import Section
from megascale.errors import CheckpointError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
CHANGED = f"its sha256 is not the one in {MANIFEST}; the file was changed or damaged"
MISSING = "missing from a committed checkpoint"
UNNAMED = f"not named in {MANIFEST}, and DeepSpeed, which takes its files by pattern, could load it; delete it"
INCOMPLETE, BROKEN = "incomplete", "broken manifest"
THREADS = 8  # files read side by side

_SEALED = re.compile(rb'(.*),\n "seal": "([0-9a-f]{64})"\n}', re.DOTALL)
_STEP_FILE = re.compile(rf"((?:{CHECKPOINTS}/)?step-(\d+))/(.+)", re.DOTALL)


def is_step(name: str) -> bool:
    """Return whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"step-\d+", name) is not None


class CheckpointManifest(Section):
    """What a committed checkpoint holds."""

    step: int = Field(description="updates done")
    consumed_samples: int = Field(description="clips taken from the order: the loader's whole state")
    world_size: int = Field(description="ranks that wrote it")
    valid_loss: float | None = Field(description="at this step, if it was validated")
    committed_at: datetime | None = Field(None, description="when this was written, UTC")
    files: dict[str, str] = Field(description="sha256 of every other file, by path in the folder")
    seal: str | None = Field(None, description="sha256 of the manifest's own bytes before this key, its last")

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            plain = str(path) == name and name.isprintable() and "\\" not in name and name not in (".", MANIFEST)
            if path.is_absolute() or ".." in path.parts or not plain:
                raise ValueError(f"{name!r} is no path of a file in the folder")
        return files


def read_manifest(url: str) -> CheckpointManifest:
    """Read the manifest of the checkpoint at a URL. Raises CheckpointError: there is none, or it is broken."""
    place = storage.join(url, MANIFEST)
    if not storage.exists(place):
        raise CheckpointError(f"{url}: no manifest; not a checkpoint, or its save was not completed")
    data = storage.read_bytes(place)
    try:
        manifest = CheckpointManifest.model_validate_json(data)
    except ValidationError as failure:
        reason = failure.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{place}: broken: {reason}") from None
    sealed = _SEALED.fullmatch(data)
    if manifest.seal is not None and (sealed is None or hashlib.sha256(sealed[1]).hexdigest() != manifest.seal):
        raise CheckpointError(f"{place}: broken: its seal is not the sha256 of what stands before it")
    return manifest


def to_bytes(manifest: CheckpointManifest) -> bytes:
    """Return the text of `manifest.json`, sealed: a changed step or loss is found out like a changed file."""
    body = manifest.model_dump_json(indent=1, exclude={"seal"}).removesuffix("\n}")
    return f'{body},\n "seal": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}'.encode()


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder that is there.

    url: where; step: by its name; num_bytes: of all its files; names: their paths in it.
    manifest: None for one that nothing loads; `state` then says why.
    """

    url: str
    step: int
    num_bytes: int
    names: tuple[str, ...]
    manifest: CheckpointManifest | None
    state: str


def list_checkpoints(url: str) -> list[Listed]:
    """List the checkpoint folders of a run, or of its `checkpoints` folder, oldest first; one listing, and the manifests."""
    folders: dict[tuple[int, str], dict[str, int]] = {}
    for path, num_bytes in storage.sizes(url).items():
        if found := _STEP_FILE.fullmatch(path):
            folders.setdefault((int(found[2]), found[1]), {})[found[3]] = num_bytes
    listed = []
    for (step, name), files in sorted(folders.items()):
        place, manifest, state = storage.join(url, name), None, INCOMPLETE
        if MANIFEST in files:
            try:
                manifest, state = read_manifest(place), "committed"
            except CheckpointError:
                state = BROKEN
        listed.append(Listed(place, step, sum(files.values()), tuple(sorted(files)), manifest, state))
    return listed


def check_files(url: str, files: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Hash files of the checkpoint at a URL, several at a time.

    Yields:
        Each file's own URL, and what is wrong with it; None if nothing is.
    """

    def fault(name: str) -> str | None:
        place = storage.join(url, name)
        if not storage.exists(place):
            return MISSING
        return CHANGED if sha256(place) != files[name] else None

    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(files, pool.map(fault, files), strict=True):
            yield storage.join(url, name), found


def sha256(url: str) -> str:
    """Return a file's sha256 in hex; the file is never in memory as a whole."""
    if storage.is_local(url):
        with storage.open_read(url) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for block in storage.read_blocks(url):
        digest.update(block)
    return digest.hexdigest()


def best_step(losses: Mapping[int, float | None]) -> int | None:
    """Return the step with the lowest validation loss; the newest if none was validated, None if there is none."""
    validated = {step: loss for step, loss in losses.items() if loss is not None}
    return min(sorted(validated), key=validated.__getitem__) if validated else max(losses, default=None)


def retained(losses: Mapping[int, float | None], keep_last: int, keep_every: int | None) -> set[int]:
    """Return which of these steps to keep: the newest `keep_last`, every multiple of `keep_every`, and the best."""
    kept = set(sorted(losses)[-keep_last:])
    kept |= {step for step in losses if keep_every is not None and step % keep_every == 0}
    return kept | {step for step in [best_step(losses)] if step is not None}


def losses_of(listed: Sequence[Listed]) -> dict[int, float | None]:
    """Return the validation loss of each committed one, by step."""
    return {each.step: each.manifest.valid_loss for each in listed if each.manifest is not None}


def to_prune(listed: Sequence[Listed], keep_last: int, keep_every: int | None) -> list[Listed]:
    """Return which to delete: those not retained, and what older saves, uploads or deletions left half done.

    Nothing from the newest committed one on, and none whose manifest is damaged: its files may be whole.
    """
    losses = losses_of(listed)
    kept = retained(losses, keep_last, keep_every)
    return [
        each for each in listed if losses and each.step < max(losses) and each.step not in kept and each.state != BROKEN
    ]


def prune(url: str, keep_last: int, keep_every: int | None) -> None:
    """Delete what `to_prune` says of the checkpoints at a URL; called only after a newer one was committed there."""
    for each in to_prune(list_checkpoints(url), keep_last, keep_every):
        delete_checkpoint(each.url)


def delete_checkpoint(url: str) -> None:
    """Delete a checkpoint; the manifest goes first: a deletion cut short must not look like a checkpoint."""
    storage.delete(storage.join(url, MANIFEST))
    storage.delete(url)
