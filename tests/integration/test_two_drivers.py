"""The same command twice at once, on one output folder: one result, whoever writes what first."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT
from fault_proxy import FaultProxy
from s3_servers import keys_in_environment, rclone
from support import tone, write_tones
from test_tokenize import tokenize

from megascale.data.index import ShardIndex, index_name, read_clips, read_manifest
from megascale.tokenize.calibration import calibrate
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


AGREE = """
import sys, time
from pathlib import Path
from megascale import storage
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import load_codec
from megascale.tokenize.job import _agree
from megascale.tokenize.plan import Plan, TokenizeConfig, codec_url

config = TokenizeConfig.model_validate({
    "source": {"kind": "files", "url": "audio"}, "codec": {"weights": "calibrate", "bitrate_kbps": 1.5},
    "output": {"url": "s3://bucket/agreed"}, "storage": {"endpoint_url": sys.argv[1]},
})
storage.configure(config.storage)
storage.exists("s3://bucket/agreed")
while not Path(sys.argv[3]).exists():
    time.sleep(0.02)
_agree(config, Plan([], []), Path(sys.argv[2]).read_bytes())
print(load_codec(codec_url(config)).fingerprint)
"""


@pytest.mark.slow
def test_drivers_whose_fits_differ_encode_with_one_codec_where_create_only_is_ignored(tmp_path):
    """Each looks for a codec before the other has published its own, and then publishes over it, or is published over."""
    tones = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]
    (tmp_path / "served").mkdir()
    for seed in (0, 1):
        (tmp_path / f"{seed}.safetensors").write_bytes(calibrate(tones, num_codebooks=2, seed=seed).to_bytes())

    def agree(endpoint: str, seed: int, begin: Path) -> subprocess.Popen:
        line = [sys.executable, "-c", AGREE, endpoint, str(tmp_path / f"{seed}.safetensors"), str(begin)]
        return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)

    with keys_in_environment(), rclone(tmp_path / "served") as server:
        with FaultProxy(server.endpoint, share=0.0, kinds=("slow",)) as proxy:
            fast, slow = agree(server.endpoint, 1, tmp_path / "now"), agree(proxy.url, 0, tmp_path / "first")
            while not proxy.done:
                time.sleep(0.02)
            proxy.share = 1.0
            (tmp_path / "first").touch()
            while proxy.done["slow"] < 5:  # its plan was looked for, in two requests, and put; its codec looked for
                assert slow.poll() is None
                time.sleep(0.02)
            (tmp_path / "now").touch()
            found = {fast.communicate(timeout=200)[0], slow.communicate(timeout=200)[0]}
        assert (fast.returncode, slow.returncode) == (0, 0)
    assert len(found) == 1
    assert found < {load_codec(str(tmp_path / f"{seed}.safetensors")).fingerprint + "\n" for seed in (0, 1)}
