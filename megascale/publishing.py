"""All or nothing on a local disk: a file is written beside its place and appears there by rename."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from megascale.errors import StorageError


def publish_local(
    path: Path, blocks: Iterable[bytes], create_only: bool = False, accept: Callable[[], bool] = lambda: True
) -> bool:
    """Write a whole file: it appears when all its blocks are on the disk. Folders appear as needed.

    Args:
        path: where.
        blocks: what, piece by piece.
        create_only: leave an existing file alone.
        accept: asked when all blocks are written whether the file is to appear.

    Returns:
        Whether this call wrote it.

    Raises:
        StorageError: the disk refuses; what was there before is there still.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary_beside(path)
        try:
            with os.fdopen(handle, "wb") as file:
                for block in blocks:
                    file.write(block)
                if not accept():
                    return False
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide outputs from a team sharing the folder
                if create_only:
                    os.link(temporary, path)
                else:
                    os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except FileExistsError as failure:
        if create_only and path.is_file():
            return False
        raise StorageError(f"{path}: cannot write: {failure.strerror}") from None
    except OSError as failure:
        raise StorageError(f"{path}: cannot write: {failure.strerror}") from None
    return True


def _temporary_beside(path: Path) -> tuple[int, str]:
    """Open a new file that is locked for as long as its writer lives: see `remove_partial`."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with contextlib.suppress(OSError):  # some network disks know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else removed before it was locked
            return handle, name
        os.close(handle)


def remove_partial(folder: Path, name: str) -> None:
    """Remove what killed writers have left half-written of files that `name`, a glob, matches; what a living one is at
    work on is left alone."""
    for path in folder.glob(f".{name}.*.part"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def settle(folder: Path) -> None:
    """Return once everything in a folder is on the disk, where a power cut leaves it. Raises StorageError."""
    for path in [*folder.rglob("*"), folder.parent, folder]:
        if path.is_file() or path.is_dir():
            settle_one(path)


def settle_one(path: Path) -> None:
    """Return once a file's bytes, or the names in a folder, are on the disk. Raises StorageError."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as failure:
        if failure.errno != errno.EINVAL:  # as some network disks answer for a folder
            raise StorageError(f"{path}: cannot be written to the disk: {failure.strerror}") from None
