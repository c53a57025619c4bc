"""Local disks that have no hard links, and what a killed writer leaves on one."""

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import largest_file, touch

from megascale import storage
from megascale.errors import StorageError
from megascale.local_disk import publish, remove_partial


@pytest.mark.parametrize("name", ["EPERM", "ENOTSUP", "ENOSYS", "EOPNOTSUPP"])
def test_disk_without_hard_links_ignores_create_only_and_shows_nothing_half_written(tmp_path, monkeypatch, name):
    """As Linux does: a name that is taken is refused before the disk is asked whether it has links."""

    def link(source, target):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists")
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "link", link)
    url = str(tmp_path / "x")
    with largest_file(4096), pytest.raises(StorageError, match=f"^{url}: cannot write: File too large$"):
        storage.publish_bytes(url, bytes(1_000_000), create_only=True)
    assert list(tmp_path.iterdir()) == []
    for content in (b"first", b"second"):  # both are told that they wrote, by which callers know such a store
        assert storage.publish_bytes(url, content, create_only=True) is True
        assert storage.read_bytes(url) == content
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_link_that_fails_for_another_reason_is_told(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match=r"x: cannot write: Disk quota exceeded$"):
        storage.publish_bytes(str(tmp_path / "x"), b"1", create_only=True)
    assert list(tmp_path.iterdir()) == []


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
from megascale import storage
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
storage.publish_bytes(sys.argv[1], b"half of it")
"""


def test_what_a_killed_writer_left_is_removed_an_hour_later_and_nothing_else(tmp_path):
    line = [sys.executable, "-c", KILLED_WHILE_IT_WRITES, str(tmp_path / "x.tar")]
    for _ in range(2):
        assert subprocess.run(line, check=False).returncode == -9
    fresh, left = tmp_path.iterdir()
    touch(tmp_path, "x.tar", "notes.part", ".hidden", "below/.y.tar.abcdefgh.part")
    (tmp_path / ".folder.part").mkdir()
    before = time.time() - 7200
    kept = sorted(path for path in tmp_path.rglob("*") if path != left)
    for path in tmp_path.rglob("*"):
        if path != fresh:
            os.utime(path, (before, before))
    for _ in range(2):
        storage.remove_leftovers(str(tmp_path))
        assert sorted(tmp_path.rglob("*")) == kept and fresh in kept
    for nothing in (str(tmp_path / "none"), str(tmp_path / "x.tar"), f"memory:/{tmp_path}"):
        storage.remove_leftovers(nothing)


KILLED_WHILE_WRITING = """
import os, signal
from pathlib import Path
from megascale.local_disk import publish

def blocks():
    yield b"first"
    os.kill(os.getpid(), signal.SIGKILL)

publish(Path({path!r}), blocks())
"""


def test_what_a_killed_writer_left_is_removed_by_name(tmp_path):
    for name in ("x.tar", "x.json"):
        subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING.format(path=str(tmp_path / name))], cwd=Path.cwd())
    (tmp_path / "kept.part").write_bytes(b"no hidden file")
    assert len(list(tmp_path.iterdir())) == 3
    remove_partial(tmp_path, "?.tar")
    assert sorted(path.name.split(".")[:3] for path in tmp_path.iterdir()) == [["", "x", "json"], ["kept", "part"]]


def test_what_is_being_written_is_left_alone(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def blocks():
        yield b"first"
        begun.set()
        assert go_on.wait(30)
        yield b" second"

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(publish, tmp_path / "x", blocks())
        assert begun.wait(30)
        remove_partial(tmp_path, "*")
        go_on.set()
        assert writing.result(30) is True
    assert (tmp_path / "x").read_bytes() == b"first second"
