"""Files of a local or shared disk: written whole under a hidden name first, then shown by a link or a rename."""

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from megascale.errors import StorageError

T = TypeVar("T")

_PART = ".part"  # of the hidden file that a local one is written as
_STALE_SECONDS = 3600.0  # no write takes so long, clocks of two machines that share a disk included
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def publish(
    path: Path, blocks: Iterable[bytes], create_only: bool = False, accept: Callable[[], bool] = lambda: True
) -> bool:
    """Write a whole file: it appears when all its blocks are on the disk. Folders appear as needed.

    Args:
        path: where.
        blocks: what, piece by piece.
        create_only: leave an existing file alone, where the disk has hard links.
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


def check_writable(path: Path) -> None:
    """Raise the StorageError that `publish` would, by trying; nothing is left behind."""
    made: list[Path] = []
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary_beside(path)
        os.close(handle)
        os.unlink(temporary)
    except OSError as failure:
        raise StorageError(f"{path}: cannot write: {failure.strerror}") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()


def check_room_and_locks(folder: Path) -> None:
    """Raise StorageError if a folder's disk has no locks, or no room for a byte, by trying; nothing is left behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        with tempfile.TemporaryFile(dir=there, buffering=0) as file:
            file.write(b"0")
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        raise StorageError(f"{folder}: cannot write, or lock what is written: {failure.strerror}") from None


def _temporary_beside(path: Path) -> tuple[int, str]:
    """Open a new file that is locked for as long as its writer lives: see `remove_partial`."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        with contextlib.suppress(OSError):  # some network disks know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else removed before it was locked
            return handle, name
        os.close(handle)


def remove_partial(folder: Path, name: str) -> None:
    """Remove what killed writers have left half-written of files that `name`, a glob, matches; what a living one is at
    work on is left alone."""
    for path in folder.glob(f".{name}.*{_PART}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


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
            with contextlib.suppress(OSError):
                if path.lstat().st_mtime < newest:
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


def walk(top: Path) -> Iterator[str]:
    """Yield the files under a folder. Links to folders are followed, and no real folder is entered twice: one that is
    reached with and without a link has its name without."""
    entered: set[str] = set()
    waiting = deque([top])
    while waiting:
        for parent, folders, names in os.walk(waiting.popleft()):  # which passes links by
            real = os.path.realpath(parent)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            waiting += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
            yield from (Path(parent, name).relative_to(top).as_posix() for name in names)


def call_disk(url: str, call: Callable[[], T]) -> T:
    """Call, and name the URL in the StorageError that an OSError becomes."""
    try:
        return call()
    except FileNotFoundError:
        raise StorageError(f"{url}: no such file") from None
    except PermissionError as failure:
        raise StorageError(f"{url}: permission denied: {failure.strerror or failure}") from None
    except (OSError, ValueError) as failure:
        raise StorageError(f"{url}: {getattr(failure, 'strerror', None) or failure}") from None
