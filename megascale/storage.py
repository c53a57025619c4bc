"""The one door to files: a local path, `s3://…`, or any other URL that fsspec knows. A URL is always a string.

Publishing is all or nothing: a local file appears by rename, an object by one PUT. (fsspec's `open(url, "wb")` publishes
a partial object when the writer raises, so it is not used here.) Credentials come from the standard chain of the store's
own library and are never read, logged or written by this package.
"""

import errno
import glob as globbing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs
from pydantic import Field

from megascale.config import Section
from megascale.errors import StorageError

T = TypeVar("T")

_ATTEMPTS = 6
_TRANSIENT = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT}


class StorageConfig(Section):
    """How to reach object stores."""

    endpoint_url: str | None = Field(None, description="S3 endpoint, for stores other than AWS; null uses AWS's own")


def configure(config: StorageConfig) -> None:
    """Make every later access in this process use these settings."""
    fsspec.config.conf["s3"] = {
        "endpoint_url": config.endpoint_url,
        # some S3 servers answer ranged reads with the whole object's checksum, which the client would reject
        "config_kwargs": {
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
        },
    }


def is_local(url: str) -> bool:
    """Return whether the URL is a path on this machine (`file://` included)."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Return the path of a local URL. Raises StorageError for any other."""
    if not is_local(url):
        raise StorageError(f"{url}: a local path is needed here")
    return Path(url.removeprefix("file://"))


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or a local path."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Return whether a file (or a local folder) is there."""
    if is_local(url):
        return local_path(url).exists()
    fs, path = _open_filesystem(url)
    return _retry(url, lambda: bool(fs.exists(path)))


def read_bytes(url: str) -> bytes:
    """Read a whole file. Raises StorageError naming the URL if it is missing or refused."""
    if is_local(url):
        return _retry(url, lambda: local_path(url).read_bytes())
    fs, path = _open_filesystem(url)
    return _retry(url, lambda: cast(bytes, fs.cat_file(path)))


def read_text(url: str) -> str:
    """Read a whole UTF-8 file."""
    try:
        return read_bytes(url).decode("utf-8")
    except UnicodeDecodeError:
        raise StorageError(f"{url}: not UTF-8 text") from None


@contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open a file for seekable binary reading; remote files are read in blocks, never whole."""
    if is_local(url):
        handle = _retry(url, lambda: cast(IO[bytes], local_path(url).open("rb")))
    else:
        fs, path = _open_filesystem(url)
        handle = _retry(url, lambda: cast(IO[bytes], fs.open(path, "rb", block_size=1 << 20, cache_type="readahead")))
    with handle:
        yield handle


def list_files(url: str) -> tuple[str, list[str]]:
    """List the files under a folder or prefix, or those that match a glob (`**` crosses folders).

    Returns:
        The root, and each file's path relative to it, sorted: the same corpus gives the same names wherever it lies.

    Raises:
        StorageError: nothing is there.
    """
    root = _glob_root(url)
    if is_local(url):
        return root, _list_local(url, root)
    fs, path = _open_filesystem(url)
    base = str(fs._strip_protocol(root)).rstrip("/")
    found = _retry(url, lambda: fs.glob(path) if root != url else fs.find(path))
    names = sorted(name[len(base) :].lstrip("/") for name in found)
    if not names:
        raise StorageError(f"{url}: no such folder or prefix, or it is empty")
    return root, names


def _list_local(url: str, root: str) -> list[str]:
    folder = local_path(root)
    if not folder.exists():
        raise StorageError(f"{root}: no such folder")
    if root != url:
        found = [Path(name) for name in globbing.glob(str(local_path(url)), recursive=True)]
        return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
    if folder.is_file():
        raise StorageError(f"{root}: a file, not a folder")
    # followlinks stays off: a link that points up would never end
    return sorted(
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    )


def _glob_root(url: str) -> str:
    parts = url.split("/")
    for i, part in enumerate(parts):
        if globbing.has_magic(part):
            return "/".join(parts[:i]) or ("/" if url.startswith("/") else ".")
    return url


def publish_bytes(url: str, data: bytes, create_only: bool = False) -> bool:
    """Write a whole file at once.

    Args:
        url: where.
        data: what.
        create_only: leave an existing file alone, where the store can tell (some ignore it).

    Returns:
        Whether this call wrote it.
    """
    if is_local(url):
        return _publish_local(local_path(url), data, create_only)
    fs, path = _open_filesystem(url)
    try:
        _retry(url, lambda: fs.pipe_file(path, data, mode="create" if create_only else "overwrite"))
    except FileExistsError:
        return False
    return True


def _publish_local(path: Path, data: bytes, create_only: bool) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
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


def _open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(url)
    except ImportError as failure:
        raise StorageError(f"{url}: {failure}; install megascale's extra for this store, such as megascale[s3]") from None
    except ValueError as failure:
        raise StorageError(f"{url}: {failure}") from None
    return fs, str(path)


def _retry(url: str, call: Callable[[], T]) -> T:
    """Call, and call again with growing pauses while the fault may pass; name the URL in what is raised at last."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except FileExistsError:
            raise
        except FileNotFoundError:
            raise StorageError(f"{url}: no such file") from None
        except PermissionError as failure:
            raise StorageError(f"{url}: permission denied: {failure.strerror or failure}") from None
        except (OSError, TimeoutError) as failure:
            may_pass = isinstance(failure, (TimeoutError, ConnectionError)) or failure.errno in _TRANSIENT
            if is_local(url) or not may_pass or attempt == _ATTEMPTS:
                raise StorageError(f"{url}: {failure.strerror or failure}") from None
            # jitter, so that many workers do not come back at the same moment
            time.sleep(0.2 * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("the loop returns or raises")
