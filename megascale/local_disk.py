"""Files of a local or shared disk: written whole under a hidden name first, then shown by a link or a rename."""

import errno
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from megascale.errors import StorageError

_PART = ".part"  # of the hidden file that a local one is written as
_STALE_SECONDS = 3600.0  # no write takes so long, clocks of two machines that share a disk included
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def publish(path: Path, data: bytes, create_only: bool) -> bool:
    """Write a whole file; with `create_only`, leave one that is there alone, where the disk has hard links.

    Returns whether this call wrote it. Raises StorageError if it cannot be written; nothing is left then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide outputs from a team sharing the folder
            if create_only and _has_links(temporary):
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


def _has_links(temporary: str) -> bool:
    """Return whether a file's disk has hard links, which it tells only of a name that is free."""
    other = temporary + _PART
    try:
        os.link(temporary, other)
    except OSError as failure:
        if failure.errno in _NO_LINKS:
            return False
        raise
    os.unlink(other)
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files that killed writers left in a folder.

    Only what is older than an hour: another process may be writing there. What cannot be removed stays, and harms nobody.
    """
    newest = time.time() - _STALE_SECONDS
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(_PART):
            with suppress(OSError):
                if path.lstat().st_mtime < newest:
                    path.unlink()
