"""The same command twice at once, on one output folder: one result, whoever writes what first."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT
from s3_servers import keys_in_environment, rclone
from support import write_tones
from test_tokenize import tokenize

from megascale.data.index import ShardIndex, index_name, read_clips, read_manifest
from megascale.tokenize.codec import load_codec


def run_both(line: list[str]) -> None:
    """Run two at once. Both fit a codec, and fits on several threads need not be equal bit for bit."""
    both = [
        subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for driver in both:
        printed = driver.communicate(timeout=400)[1]
        assert driver.returncode == 0, printed[-3000:]
        assert "24 clips" in printed


def check(folder: Path) -> None:
    manifest = read_manifest(str(folder))
    clips = list(read_clips(str(folder), manifest, 2))  # checks every shard's sha256
    assert len(clips) == len({clip.key for clip in clips}) == manifest.num_clips == 24
    assert load_codec(str(folder / "codec.safetensors")).fingerprint == manifest.codec.fingerprint
    for shard in manifest.shards:
        index = ShardIndex.model_validate_json((folder / index_name(shard.name)).read_bytes())
        assert index.codec == manifest.codec.fingerprint
        assert index.sha256 == shard.sha256 == hashlib.sha256((folder / shard.name).read_bytes()).hexdigest()


@pytest.mark.slow
def test_two_drivers_on_a_local_folder_end_with_one_result(tmp_path):
    write_tones(tmp_path / "audio", 24)
    run_both(tokenize(tmp_path / "audio", tmp_path / "out", "shards.clips=2", "workers.count=1"))
    check(tmp_path / "out")


@pytest.mark.slow
def test_two_drivers_on_a_store_that_ignores_create_only_end_with_one_result(tmp_path):
    write_tones(tmp_path / "audio", 24)
    (tmp_path / "served").mkdir()
    with keys_in_environment(), rclone(tmp_path / "served") as server:
        store = f"storage.endpoint_url={server.endpoint}"
        run_both(tokenize(tmp_path / "audio", "s3://bucket/out", "shards.clips=2", "workers.count=1", store))
        check(tmp_path / "served" / "bucket" / "out")
