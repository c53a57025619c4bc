"""Where the loader reads shards from: a local token folder in place, or a bounded local copy of a remote one.

Both give the same bytes, and both check each shard's sha256 once in a process.
"""

import atexit
import contextlib
import hashlib
import mmap
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megascale import storage
from megascale.data.index import ShardFacts
from megascale.errors import DataError, StorageError
from megascale.local_disk import remove_partial

# a mapping holds a file descriptor, and a process may have no more than 1024 of them, or 256
_MAX_MAPPED = 128
_THREADS = 4
_PATIENCE_SECONDS = 1.0  # for downloads that have to end with the process

Purpose = Literal["sweep", "steps"]
# How much of the bound is fetched ahead and kept for each purpose, the more urgent first: training waits while a sweep
# (of the held-out clips, say) is on. What is left over goes to the shards that were read last.
_AHEAD: dict[Purpose, float] = {"sweep": 0.25, "steps": 0.5}


class LocalShards:
    """The shards of a local token folder, mapped where they lie."""

    def __init__(self, url: str, shards: Sequence[ShardFacts]) -> None:
        """Raises DataError: a shard is missing or cut."""
        self._paths = [storage.local_path(url) / facts.name for facts in shards]
        self._shards = shards
        for number in range(len(shards)):
            self._check_size(number)
        self._checked: set[int] = set()
        self._map = lru_cache(maxsize=_MAX_MAPPED)(self._map_shard)

    def read_many(
        self, numbers: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
    ) -> Sequence[bytes | memoryview]:
        """Return stretches of shards, in place where that can be. Raises DataError if one is not what was committed."""
        needed = set(numbers)
        if len(needed) <= _MAX_MAPPED:
            maps = {number: self._map(number) for number in needed}
            return [maps[n][at : at + size] for n, at, size in zip(numbers, offsets, sizes, strict=True)]
        pieces = [b""] * len(numbers)
        for i in sorted(range(len(numbers)), key=lambda i: numbers[i]):  # copied, as a view keeps its shard's file open
            pieces[i] = bytes(self._map(numbers[i])[offsets[i] : offsets[i] + sizes[i]])
        return pieces

    def want(self, numbers: Iterable[int], purpose: Purpose = "steps") -> None:
        """Do nothing: the shards are here."""

    def close(self) -> None:
        """Close the mappings; a shard that is read again is mapped again."""
        self._map.cache_clear()

    def _map_shard(self, number: int) -> memoryview:
        self._check_size(number)
        path = self._paths[number]
        data = memoryview(_map(path))
        if number not in self._checked:
            if hashlib.sha256(data).hexdigest() != self._shards[number].sha256:
                raise DataError(f"{path}: its sha256 is not the one in the manifest; the shard was changed or damaged")
            self._checked.add(number)
        return data

    def _check_size(self, number: int) -> None:
        path = self._paths[number]
        if not path.is_file() or path.stat().st_size != self._shards[number].size:
            raise DataError(f"{path}: missing, or not the size that the manifest says")


class ShardCache:
    """Copies of a remote token folder's shards in a local folder, fetched ahead of need, least recently used ones removed.

    Shards on disk, half-written ones included, take no more than `max_bytes`, unless one alone is larger. The bound is
    this process's: it counts what it fetched, what it read, and what it found at its start. Ranks may share the folder,
    and then share what they fetched: a shard that another process removes stays readable where it is mapped, and is
    fetched again where it is not. Safe to use from several threads.
    """

    def __init__(self, url: str, shards: Sequence[ShardFacts], folder: str | None, max_bytes: int) -> None:
        """Does nothing yet: the folder is made, and threads are started, when a shard is first wanted.

        Args:
            url: the token folder.
            shards: what its manifest says of them.
            folder: on a local disk; None is one of this user's for temporary files, emptied when the process ends.
            max_bytes: the bound.
        """
        self._url, self._shards, self._max_bytes = url, shards, max_bytes
        self._temporary = folder is None
        self._folder = Path(folder or os.path.join(tempfile.gettempdir(), f"megascale-{os.getuid()}"))
        self._held: OrderedDict[int, bool] = OrderedDict()  # on disk, least recently used first; True = hash checked
        self._mapped: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._fetching: set[int] = set()
        self._failed: dict[int, Exception] = {}
        self._wanted: dict[Purpose, list[int]] = {purpose: [] for purpose in _AHEAD}
        self._used_bytes = 0  # of what is held and what is being fetched
        self._threads: list[threading.Thread] = []
        self._started = self._closed = False
        self._changed = threading.Condition()  # guards all of the above; downloads and hashing go on without it

    def read_many(self, numbers: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Return stretches of shards; one that is not here is fetched first. No more than one has to be here at a time.

        Raises:
            DataError: the store's shard is not what was committed.
            StorageError: it cannot be fetched.
        """
        places: dict[int, list[int]] = {}
        for i, number in enumerate(numbers):
            places.setdefault(number, []).append(i)
        pieces = [b""] * len(numbers)
        for number, here in places.items():
            with self._changed:
                data = self._await(number)
                for i in here:  # copied, so that the mapping can be closed
                    pieces[i] = data[offsets[i] : offsets[i] + sizes[i]]
        return pieces

    def want(self, numbers: Iterable[int], purpose: Purpose = "steps") -> None:
        """Say which shards are needed next, in order of need; replaces what was said before for this purpose.

        As many of them as fit into a share of the bound are fetched ahead and kept. What cannot be fetched is an error
        only where it is read.
        """
        room = _AHEAD[purpose] * self._max_bytes
        head: list[int] = []
        for number in numbers:
            room -= self._shards[number].size
            if room < 0:
                break
            head.append(number)
        with self._changed:
            if head == self._wanted[purpose] or self._closed:
                return
            self._start()
            self._wanted[purpose] = head
            while len(self._threads) < _THREADS:  # daemons: a download that hangs must not keep the process alive
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def close(self) -> None:
        """End downloads, close mappings, and empty a temporary folder of what this process counts; done at exit, too."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            for number in list(self._held):
                self._forget(number, remove=self._temporary)
        if self._temporary:
            with contextlib.suppress(OSError):  # another process has shards there, or nothing was ever fetched
                self._folder.rmdir()
        atexit.unregister(self.close)

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"{self._url}: its cache was closed")

    # What follows is called with the lock held.

    def _await(self, number: int) -> mmap.mmap:
        self._start()
        self._failed.pop(number, None)  # of a fetch ahead, some time ago: the store may be well again
        while True:
            self._check_open()
            data = self._map(number)
            if data is not None:
                return data
            if number in self._failed:
                raise self._failed.pop(number)
            if number in self._fetching:
                self._changed.wait()
            elif self._make_room(number, needed=True):
                self._fetch(number)
            else:
                self._changed.wait()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        atexit.register(self.close)
        numbers = {self._path(number).name: number for number in range(len(self._shards))}
        found: list[tuple[int, int, int]] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_partial(self._folder, "?" * 64 + ".tar")
            for path in self._folder.glob("*.tar"):
                if path.name in numbers:
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        facts = path.stat()
                        found.append((facts.st_mtime_ns, numbers[path.name], facts.st_size))
        except OSError as failure:
            raise StorageError(f"{self._folder}: cannot keep shards there: {failure.strerror}") from None
        for _, number, size in sorted(found):
            self._held[number] = False
            self._used_bytes += self._shards[number].size
            if size != self._shards[number].size:
                self._forget(number, remove=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._shards[number].sha256}.tar"

    def _map(self, number: int) -> mmap.mmap | None:
        """Return a shard that is here and checked, as the one used last."""
        data = self._mapped.get(number)
        if data is None:
            if not self._held.get(number, False):
                return None
            try:
                data = _map(self._path(number))
            except FileNotFoundError:  # another process that shares the folder made room
                self._forget(number, remove=False)
                return None
            except OSError as failure:
                raise StorageError(f"{self._path(number)}: {failure.strerror}") from None
            self._mapped[number] = data
            if len(self._mapped) > _MAX_MAPPED:
                self._mapped.popitem(last=False)[1].close()
        self._mapped.move_to_end(number)
        self._held.move_to_end(number)
        return data

    def _forget(self, number: int, remove: bool) -> None:
        del self._held[number]
        self._used_bytes -= self._shards[number].size
        if number in self._mapped:
            self._mapped.pop(number).close()  # the disk is not free before
        if remove:
            with contextlib.suppress(OSError):  # gone, or replaced by another user's
                self._path(number).unlink()

    def _in_order_of_need(self) -> list[int]:
        return [number for numbers in self._wanted.values() for number in numbers]

    def _make_room(self, number: int, needed: bool) -> bool:
        """Remove shards until one more fits; those that are wanted only for one that is needed at once."""
        more = 0 if number in self._held else self._shards[number].size
        kept = {number, *self._in_order_of_need()}
        while self._used_bytes + more > self._max_bytes:
            victim = next((n for n in self._held if n not in kept), None)
            if victim is None and needed:
                victim = next((n for n in self._held if n != number), None)
                # not at once again, or the two would take turns
                self._wanted = {purpose: [n for n in head if n != victim] for purpose, head in self._wanted.items()}
            if victim is None:
                return needed and not self._fetching  # then it has the disk to itself
            self._forget(victim, remove=True)
        return True

    def _work(self) -> None:
        with self._changed:
            while not self._closed:
                number = self._next()
                if number is None:
                    self._changed.wait()
                else:
                    self._fetch(number)

    def _next(self) -> int | None:
        for number in self._in_order_of_need():
            if not (self._held.get(number, False) or number in self._fetching or number in self._failed):
                return number if self._make_room(number, needed=False) else None
        return None

    def _fetch(self, number: int) -> None:
        """Fetch and check a shard that there is room for. The lock is given up meanwhile; errors go to `_failed`."""
        if number in self._held:  # found at the start, not checked yet
            del self._held[number]
        else:
            self._used_bytes += self._shards[number].size
        self._fetching.add(number)
        self._changed.release()
        failure: Exception | None = None
        done = False
        try:
            self._obtain(number)
            done = True
        except Exception as raised:
            failure = raised
        finally:
            self._changed.acquire()
            self._fetching.discard(number)
            if done:
                self._held[number] = True
            else:
                self._used_bytes -= self._shards[number].size
            if failure is not None:
                self._failed[number] = failure
            self._changed.notify_all()

    # What follows is called without it.

    def _obtain(self, number: int) -> None:
        facts, path, url = self._shards[number], self._path(number), storage.join(self._url, self._shards[number].name)
        if _has_hash(path, facts.sha256):
            return
        with contextlib.suppress(OSError):
            path.unlink()  # damaged: it must not take room beside its successor
        if not storage.download(url, path, facts.size, facts.sha256, self._check_open):
            raise DataError(f"{url}: its sha256 is not the one in the manifest; the shard was changed or damaged")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:  # not there, or a disk that does not give it back
        return False
