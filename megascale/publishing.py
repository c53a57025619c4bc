"""All or nothing on a local disk: a file is written beside its place and appears there by rename."""

import contextlib
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
