"""Whatever a folder holds: each file is tokenised or quarantined once with the right reason, in bounded memory."""

import json
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import run
from hostile import LEFT_OUT, TOKENISED, make_all
from test_tokenize import tokenize

from megascale.data.index import read_clips, read_manifest
from megascale.tokenize.codec import Codec

_WORKER_BYTES = 1_500_000_000  # torch, the codec and two batches of short clips take half of it


@pytest.fixture(scope="module")
def job(tmp_path_factory, fitted_codec) -> tuple[list[str], Path, dict[str, str]]:
    """The command over every kind of file, its folder, and what is expected of each file in `in`."""
    folder = tmp_path_factory.mktemp("hostile")
    two = Codec(fitted_codec.model, 2, "test", published=False)
    (folder / "codec.safetensors").write_bytes(two.to_bytes())
    expected = make_all(folder / "in", two.name)
    options = ["clips.seconds=10", "clips.min_seconds=0", "codec.bitrate_kbps=1.5", "shards.clips=40"]
    options += [f"codec.weights={folder / 'codec.safetensors'}", "workers.count=2"]
    return tokenize(folder / "in", folder / "out", *options), folder, expected


def largest_worker(driver: subprocess.Popen) -> int:
    """Follow a job to its end; return the most bytes that one of its workers held."""
    most = 0
    while driver.poll() is None:
        for child in psutil.Process(driver.pid).children(recursive=True):
            try:
                if any("ShardWorker" in part for part in child.cmdline()):
                    most = max(most, child.memory_info().rss)
            except psutil.Error:
                continue
        time.sleep(0.1)
    return most


def fits(expected: str, found: list[str]) -> bool:
    """Whether what became of a file is what was expected: nothing, or one thing that matches."""
    return not found if expected == LEFT_OUT else len(found) == 1 and bool(re.search(expected, found[0]))


def test_every_kind_is_tokenised_or_quarantined_once_with_its_reason(job, start):
    line, folder, expected = job
    driver = start([*line, "quarantine.max_share=1.0"])
    peak = largest_worker(driver)
    assert driver.returncode == 0, driver.stderr.read()[-3000:]
    print(f"\n  {len(expected)} kinds; the largest worker held {peak / 1e6:.0f} MB")
    assert 0 < peak < _WORKER_BYTES
    found: dict[str, list[str]] = {}
    for clip in read_clips(str(folder / "out"), read_manifest(str(folder / "out")), 2):
        found.setdefault(clip.source, []).append(TOKENISED)
    names = {f"{folder / 'in'}/{name}".encode("utf-8", "backslashreplace").decode(): name for name in expected}
    for bad in map(json.loads, (folder / "out" / "quarantine.jsonl").read_text().splitlines()):
        assert bad["reason"].startswith(bad["url"]), "a reason names its file"
        found.setdefault(names[bad["url"]], []).append(bad["reason"].removeprefix(bad["url"]))
    wrong = {name: (e, found.get(name, [])) for name, e in expected.items() if not fits(e, found.get(name, []))}
    assert not wrong, "\n".join(f"{name!r}: expected {e}, found {f}" for name, (e, f) in wrong.items())
    assert found.keys() <= expected.keys()
    assert len(expected) >= 60


def test_the_same_folder_ends_with_3_where_few_may_be_quarantined(job):
    line, folder, _ = job
    printed = run([*line, "quarantine.max_share=0.1"], exit_code=3)
    assert f"{folder / 'out' / 'quarantine.jsonl'}: " in printed and "Traceback" not in printed
