"""A store in memory that tests can watch and hold: fsspec's, with a hook before each read."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from megascale import storage


class HookedStore(MemoryFileSystem):
    """`hooked://`: calls `hook` with a file's name before it reads from the file's start."""

    protocol = "hooked"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    hook: Callable[[str], None] = staticmethod(lambda name: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("hooked://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if not start:
            type(self).hook(path.rpartition("/")[2])
        return super().cat_file(path, start, end, **options)


@contextmanager
def hooked_copy(folder: Path) -> Iterator[str]:
    """Put a folder's files into an empty HookedStore; yield its URL. The hook is gone afterwards."""
    fsspec.register_implementation("hooked", HookedStore, clobber=True)
    HookedStore.store.clear()
    for file in folder.rglob("*"):
        if file.is_file():
            storage.publish_bytes(f"hooked://folder/{file.relative_to(folder).as_posix()}", file.read_bytes())
    try:
        yield "hooked://folder"
    finally:
        HookedStore.hook = staticmethod(lambda name: None)
        HookedStore.store.clear()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads bring about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)
