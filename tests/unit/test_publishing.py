"""Half-written files: those of writers that were killed are removed, those in the making are not."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megascale.publishing import publish_local, remove_partial

KILLED_WHILE_WRITING = """
import os, signal
from pathlib import Path
from megascale.publishing import publish_local

def blocks():
    yield b"first"
    os.kill(os.getpid(), signal.SIGKILL)

publish_local(Path({path!r}), blocks())
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
        writing = pool.submit(publish_local, tmp_path / "x", blocks())
        assert begun.wait(30)
        remove_partial(tmp_path, "*")
        go_on.set()
        assert writing.result(30) is True
    assert (tmp_path / "x").read_bytes() == b"first second"
