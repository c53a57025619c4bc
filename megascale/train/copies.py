"""Copies, on this machine's disk, of what lies in a store and many processes read: it is fetched once.

A copy is named by its URL and the hashes of its files, and lies among this user's temporary files. What nobody used for a
week goes when the next copy is made.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megascale.errors import StorageError

_UNUSED_SECONDS = 7 * 86_400.0


def folder_of(url: str, files: Mapping[str, str]) -> Path:
    """Return where the copy of a store's folder lies, or would lie.

    Args:
        url: the folder.
        files: the sha256 of each file that is wanted, by its path there: a folder that was written anew is another one.
    """
    name = hashlib.sha256(json.dumps([url, sorted(files.items())]).encode()).hexdigest()
    return Path(tempfile.gettempdir(), f"megascale-{os.getuid()}", "models", name)


def is_whole(folder: Path, files: Mapping[str, str]) -> bool:
    """Return whether a copy is there and every file has its hash; it then counts as used."""
    try:
        os.utime(folder)  # before it is read, or it could be removed meanwhile
        for name, digest in files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except OSError:  # not there, or a disk that does not give it back
        return False
    return True


def make(folder: Path, files: Mapping[str, str], fetch: Callable[[Path], None]) -> None:
    """Make a copy unless there is a whole one; of several processes one fetches, and the others wait for it.

    Args:
        folder: as `folder_of` returns it.
        files: as there.
        fetch: writes the files into an empty folder, and checks their hashes.

    Raises:
        StorageError: the disk refuses. What `fetch` raises; nothing is left of the copy then.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_unused(folder.parent)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_whole(folder, files):
                return
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
                part = Path(temporary, folder.name)
                part.mkdir()
                fetch(part)
                shutil.rmtree(folder, ignore_errors=True)  # a damaged one
                part.rename(folder)
    except OSError as failure:
        raise StorageError(f"{folder}: cannot keep a copy there: {failure.strerror}") from None


def _remove_unused(parent: Path) -> None:
    newest = time.time() - _UNUSED_SECONDS
    for path in parent.iterdir():
        with contextlib.suppress(OSError):  # another process was faster
            if path.lstat().st_mtime < newest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
