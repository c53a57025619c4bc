"""Good files cut short, with bytes flipped, put in and taken out: each is read or refused, never more."""

import subprocess
import sys
from pathlib import Path

import containers
import numpy as np
import pytest
from support import tone

from megascale.tokens import write_ecdc

FORMATS = ("wav", "flac", "ogg", "mp3", "aiff", "m4a", "opus", "webm", "ecdc")
MUTATIONS = 200
NAME = "encodec_24khz+0123abcd"

# Read in a process of its own, which a library may crash or hang. The first bytes are those that steer a reader, so half
# of the changes fall there.
READER = f"""
import re, sys
from collections import Counter
import numpy as np
from megascale.errors import AudioError, StorageError, TokenError
from megascale.tokenize import audio, streams

whole, path = open(sys.argv[1], "rb").read(), sys.argv[2]
rng = np.random.default_rng([len(sys.argv[1].rpartition(".")[2]), *sys.argv[1].rpartition(".")[2].encode()])

def mutated():
    data = bytearray(whole)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(min(len(data), 400) if rng.random() < 0.5 else len(data)))
        size = int(rng.integers(1, 40))
        kind = rng.integers(5)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + size] = rng.bytes(min(size, len(data) - at))
        elif kind == 2:
            data[at:at] = rng.bytes(size)
        elif kind == 3:
            del data[at : at + size]
        elif rng.random() < 0.2:
            del data[max(at, 1):]
        if not data:
            data = bytearray(b"x")
    return bytes(data)

def read(call):
    try:
        call()
        return "read"
    except (AudioError, StorageError, TokenError) as failure:
        assert str(failure).startswith(path + ": "), failure
        return "refused"

def peak_mb():  # ru_maxrss would begin with that of the process which started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

outcomes, first = Counter(), 0
for n in range(-1, {MUTATIONS}):
    with open(path, "wb") as file:
        file.write(whole if n < 0 else mutated())
    print(n, flush=True)
    if streams.is_stream(path):
        calls = [lambda: streams.probe_seconds(path), lambda: streams.read_stream(path, {NAME!r}, 2, 120.0)]
    else:
        calls = [lambda: audio.probe_seconds(path), lambda: audio.read_clip(path, most_seconds=120.0)]
        calls += [lambda: audio.read_clip(path, 1.5, 1.0, most_seconds=120.0)]
    outcomes.update(read(call) for call in calls)
    if n < 0:
        assert not outcomes["refused"], "the file that is changed is a good one"
        first = peak_mb()
grown = peak_mb() - first
print(dict(outcomes), grown, "MB more")
assert outcomes["refused"] and outcomes["read"]
assert grown < 300, grown
"""


def write(path: Path) -> None:
    """Write three seconds in the format that the path's suffix names."""
    if path.suffix == ".ecdc":
        codes_QT = np.random.default_rng(0).integers(0, 1024, (2, 225))
        path.write_bytes(write_ecdc(codes_QT, 72_000, NAME))
    else:
        containers.write(path, tone(3.0, 48_000, 440), 48_000)


@pytest.mark.parametrize("suffix", FORMATS)
def test_changed_file_is_read_or_refused(tmp_path, suffix):
    write(tmp_path / f"whole.{suffix}")
    line = [sys.executable, "-c", READER, str(tmp_path / f"whole.{suffix}"), str(tmp_path / f"x.{suffix}")]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stdout[-100:]}\n{done.stderr[-2000:]}"
    print(suffix, done.stdout.splitlines()[-1])
