"""The one door to files: a local path, `s3://…`, or any other URL that fsspec knows. A URL is always a string.

Publishing is all or nothing: a local file appears by rename or link, an object by one PUT. (fsspec's `open(url, "wb")`
publishes a partial object when the writer raises, so it is not used here.) Credentials come from the standard chain of
the store's own library and are never logged or written by this package.
"""

import contextlib
import glob as globbing
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate
from pydantic import Field

from megascale import local_disk
from megascale.config import Section
from megascale.errors import StorageError
from megascale.local_disk import call_disk
from megascale.retry import REQUEST, call_store

T = TypeVar("T")

_BLOCK_BYTES = 8 << 20  # few enough requests, and a block that was cut is soon read again


class StorageConfig(Section):
    """How to reach object stores."""

    endpoint_url: str | None = Field(None, description="S3 endpoint, for stores other than AWS; null uses AWS's own")


def configure(config: StorageConfig) -> None:
    """Make every later access in this process use these settings."""
    fsspec.config.conf["s3"] = {
        "endpoint_url": config.endpoint_url,
        "use_listings_cache": False,  # another process may have written since
        # some S3 servers answer ranged reads with the whole object's checksum, which the client would reject
        "config_kwargs": {
            "response_checksum_validation": "when_required",
            "request_checksum_calculation": "when_required",
            **REQUEST,
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


def endpoint(url: str) -> str | None:
    """Return the URL of the server that answers for an S3 URL, as the store's library finds it; None for other URLs."""
    if not url.startswith("s3://"):
        return None
    return _remote(url, lambda fs, path: str(cast(Any, fs).s3.meta.endpoint_url))


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or a local path."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Return whether a file (or a local folder) is there."""
    if is_local(url):
        return call_disk(url, lambda: local_path(url).exists())
    return _remote(url, lambda fs, path: bool(fs.exists(path)))


def size(url: str) -> int | None:
    """Return a file's size in bytes; None if there is no such file."""
    if not exists(url):
        return None
    if is_local(url):
        return call_disk(url, lambda: local_path(url).stat().st_size)
    return _remote(url, lambda fs, path: int(fs.size(path)))


def read_bytes(url: str) -> bytes:
    """Read a whole file. Raises StorageError naming the URL if it is missing or refused."""
    if is_local(url):
        return call_disk(url, lambda: local_path(url).read_bytes())
    return _remote(url, lambda fs, path: cast(bytes, fs.cat_file(path)))


def read_blocks(url: str, num_bytes: int | None = None) -> Iterator[bytes]:
    """Yield a file in order, some megabytes at a time; from a store each block is asked for, and tried again, alone.

    Args:
        url: what.
        num_bytes: so many from the start; None asks how many there are.

    Raises:
        StorageError: missing, refused, or too short.
    """
    end = num_bytes if num_bytes is not None else size(url)
    if end is None:
        raise StorageError(f"{url}: no such file")
    for start in range(0, end, _BLOCK_BYTES):
        length = min(_BLOCK_BYTES, end - start)
        block = _read_range(url, start, length)
        if len(block) < length:
            raise StorageError(f"{url}: ends after {start + len(block)} bytes, {end} were expected")
        yield block


def _read_range(url: str, start: int, length: int) -> bytes:
    if is_local(url):
        with open_read(url) as file:
            file.seek(start)
            return file.read(length)
    return _remote(url, lambda fs, path: cast(bytes, fs.cat_file(path, start=start, end=start + length)))


def read_start(url: str, length: int) -> bytes:
    """Read a file's first bytes, and from a store no more than those."""
    if is_local(url):
        with open_read(url) as file:
            return file.read(length)
    # of an empty object, S3 refuses every range
    return _remote(url, lambda fs, path: cast(bytes, fs.cat_file(path, start=0, end=length)) if fs.size(path) else b"")


def read_text(url: str) -> str:
    """Read a whole UTF-8 file; a byte order mark, as spreadsheets write it, is left out."""
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise StorageError(f"{url}: not UTF-8 text") from None


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open a file for seekable binary reading; remote files are read in blocks, never whole."""
    if is_local(url):
        path = local_path(url)
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise StorageError(f"{url}: not a regular file")
        handle = call_disk(url, lambda: cast(IO[bytes], path.open("rb")))
    else:
        handle = cast(IO[bytes], _RemoteFile(url))
    with handle:
        yield handle


class _RemoteFile(io.RawIOBase):
    """A remote file whose every read is tried again: a store may fail, or keys expire, long after it was opened."""

    def __init__(self, url: str) -> None:
        self._url = url
        options = {"block_size": 1 << 20, "cache_type": "readahead"}
        self._file = _remote(url, lambda fs, path: cast(IO[bytes], fs.open(path, "rb", **options)))

    def read(self, size: int = -1) -> bytes:
        start = self._file.tell()

        def read() -> bytes:
            self._file.seek(start)
            return self._file.read(size)

        return _remote(self._url, lambda fs, path: read())

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def list_files(url: str) -> tuple[str, list[str]]:
    """List the files under a folder or prefix, or those that match a glob (`**` crosses folders).

    Returns:
        The root, and each file's path relative to it, sorted: the same corpus gives the same names wherever it lies.

    Raises:
        StorageError: nothing is there.
    """
    root, pattern = _split_glob(url)
    # `**.flac` is meant to cross folders too, and globs alone take it for `*.flac`
    pattern = re.sub(r"(^|/)\*\*(?=[^/*])", r"\1**/*", pattern)
    names = _list_local(root, pattern) if is_local(url) else _list_remote(root, pattern)
    if not names:
        reason = "nothing matches" if pattern else "no such folder or prefix, or it is empty"
        raise StorageError(f"{url}: {reason}")
    if names == [""]:
        raise StorageError(f"{url}: a file, not a folder")
    return root, sorted(names)


def sizes(url: str) -> dict[str, int]:
    """Return every file under a folder or prefix, by its path there, with its size in bytes; empty if there is none."""
    if is_local(url):
        top = local_path(url)
        return call_disk(
            url, lambda: {name: (top / name).stat().st_size for name in local_disk.walk(top) if (top / name).is_file()}
        )
    base = _open_filesystem(url)[1].rstrip("/")
    found = _remote(url, lambda fs, path: cast(dict[str, dict[str, Any]], fs.find(path, detail=True)))
    # a key that ends in a slash is how some tools mark a folder
    return {
        name[len(base) :].lstrip("/"): int(facts["size"])
        for name, facts in found.items()
        if name.rstrip("/") != base and not name.endswith("/")
    }


def _list_local(root: str, pattern: str) -> list[str]:
    folder = local_path(root)
    if not exists(root):
        raise StorageError(f"{root}: no such folder")
    if folder.is_file():
        return [""]
    if not pattern:
        return list(local_disk.walk(folder))
    if "**" not in pattern.split("/"):
        return [name for name in globbing.glob(pattern, root_dir=folder) if (folder / name).is_file()]
    # glob's own `**` goes round a link that points up until the path is too long
    return [name for name in _matching(pattern, local_disk.walk(folder)) if (folder / name).is_file()]


def _matching(pattern: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the names that a pattern matches; hidden ones only where it names them."""
    matches = re.compile(glob_translate(pattern)).match
    hidden = "/." in f"/{pattern}"
    return (name for name in names if matches(name) and (hidden or "/." not in f"/{name}"))


def _list_remote(root: str, pattern: str) -> list[str]:
    base = _open_filesystem(root)[1].rstrip("/")
    names = [name[len(base) :].lstrip("/") for name in _remote(root, lambda fs, path: fs.find(path))]
    # matched here, because fsspec's own glob leaves out, without a word, a folder whose listing fails
    return list(_matching(pattern, names)) if pattern else names


def _split_glob(url: str) -> tuple[str, str]:
    """Split a URL before its first part that is a pattern; a folder that is really there is none, whatever its name."""
    parts = url.split("/")
    for i, part in enumerate(parts):
        if globbing.has_magic(part) and not _is_folder("/".join(parts[: i + 1])):
            return "/".join(parts[:i]) or ("/" if url.startswith("/") else "."), "/".join(parts[i:])
    return url, ""


def _is_folder(url: str) -> bool:
    if is_local(url):
        return call_disk(url, lambda: local_path(url).is_dir())
    return _remote(url, lambda fs, path: bool(fs.isdir(path)))


def publish_bytes(url: str, data: bytes, create_only: bool = False) -> bool:
    """Write a whole file at once.

    Args:
        url: where.
        data: what.
        create_only: leave an existing file alone, where the store can tell (some ignore it, and so does a disk that has
            no hard links: exFAT, some network shares).

    Returns:
        Whether this call wrote it.
    """
    if is_local(url):
        return local_disk.publish(local_path(url), [data], create_only)
    try:
        _remote(url, lambda fs, path: fs.pipe_file(path, data, mode="create" if create_only else "overwrite"))
    except FileExistsError:
        return False
    return True


def check_writable(url: str) -> None:
    """Find out, by trying, whether a file could be written at a URL; what is there is left alone. Raises StorageError."""
    if is_local(url):
        local_disk.check_writable(local_path(url))
        return
    probe = f"{url}.probe"
    publish_bytes(probe, b"")
    with contextlib.suppress(StorageError):  # one may be allowed to write and not to delete
        delete(probe)


def download(
    url: str,
    path: Path,
    num_bytes: int | None = None,
    sha256: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> bool:
    """Copy a file to a local path, which appears whole or not at all; only a block of it is in memory at a time.

    Args:
        url: what.
        path: where; what is there is replaced.
        num_bytes: read so many from the start; None asks the store how many there are.
        sha256: of the bytes that are wanted, hexadecimal; None takes whatever comes.
        check: called after each block; what it raises ends the download.

    Returns:
        False, and nothing is written, if the bytes have another sha256.

    Raises:
        StorageError: missing, refused or too short (names the URL), or the disk is full (names the path).
    """
    digest = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in read_blocks(url, num_bytes):
            check()
            digest.update(block)
            yield block

    return local_disk.publish(path, blocks(), False, lambda: sha256 in (None, digest.hexdigest()))


def upload(path: Path, url: str) -> None:
    """Copy a local file of any size, all or nothing; a store gets a big one in parts, read from the disk as they go.

    Raises:
        StorageError: names the URL, or the file if it cannot be read.
    """
    if not is_local(url):
        call_disk(str(path), path.stat)  # else a file that is gone would be told as missing at the URL
        _remote(url, lambda fs, place: fs.put_file(str(path), place))
        return
    local_disk.publish(local_path(url), read_blocks(str(path)))


def delete(url: str) -> None:
    """Delete a file, or a folder or prefix with all it holds; that there is none is no error.

    Raises StorageError where one of them may not be deleted; others may be gone by then.
    """
    if not is_local(url):
        _remote(url, _remove)
        return
    path = local_path(url)
    call_disk(url, lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True))


def _remove(fs: fsspec.AbstractFileSystem, path: str) -> None:
    if fs.exists(path):
        fs.rm(path, recursive=True)
        for left in fs.find(path):  # S3 answers for each of many objects, and s3fs drops what it refused
            fs.rm_file(left)


def delete_file(url: str) -> None:
    """Delete one file with one request, which needs no leave to look for it. Raises StorageError where it is refused."""
    if is_local(url):
        call_disk(url, local_path(url).unlink)
    else:
        _remote(url, lambda fs, path: fs.rm_file(path))


def remove_leftovers(url: str) -> None:
    """Remove what killed writers left half-written in a folder for an hour; a store shows none of it."""
    if is_local(url) and _is_folder(url):
        call_disk(url, lambda: local_disk.remove_leftovers(local_path(url)))


def _open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, path = url_to_fs(url)
    except ImportError as failure:
        hint = "install megascale's extra for this store, such as megascale[s3]"
        raise StorageError(f"{url}: {failure}; {hint}") from None
    except ValueError as failure:
        raise StorageError(f"{url}: {failure}") from None
    return fs, str(path)


def _remote(url: str, call: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """Call a store with the URL's filesystem and path; what may pass is tried again."""
    fs, path = _open_filesystem(url)
    return call_store(url, fs, path, lambda: call(fs, path))
