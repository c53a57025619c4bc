"""What runs in a worker: a bounded number of attempts, where the time goes, and what it does once."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_tones

from megascale.data.index import Quarantined
from megascale.tokenize import encoder
from megascale.tokenize.clips import Clip
from megascale.tokenize.codec import Codec
from megascale.tokenize.encoder import BatchedEncoder
from megascale.tokenize.job import _from_anywhere
from megascale.tokenize.plan import TokenizeConfig, make_plan
from megascale.tokenize.worker import CodecFitter, ShardWorker, _read_clip


def clip(path: Path) -> Clip:
    return Clip("key", str(path), path.name, "key", 0.0, None, {}, None)


def config(path: Path, bitrate_kbps: float = 12.0, shard_clips: int = 1000) -> TokenizeConfig:
    sections = {"source": {"kind": "files", "url": str(path)}, "output": {"url": str(path / "out")}}
    sections |= {"codec": {"weights": "calibrate", "bitrate_kbps": bitrate_kbps}}
    return TokenizeConfig.model_validate(sections | {"shards": {"clips": shard_clips}})


def test_broken_audio_is_final_and_an_unreachable_file_is_tried_again(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    found, _ = _read_clip(clip(tmp_path / "text.wav"), config(tmp_path), "encodec_24khz")
    assert isinstance(found, Quarantined) and found.attempts == 1
    found, _ = _read_clip(clip(tmp_path / "gone.wav"), config(tmp_path), "encodec_24khz")
    assert isinstance(found, Quarantined) and found.attempts == 3 and "gone.wav: no such file" in found.reason


def test_time_is_told_by_stage(tmp_path):
    (path,) = write_tones(tmp_path, 1)
    samples_S, spent = _read_clip(clip(path), config(tmp_path), "encodec_24khz")
    assert isinstance(samples_S, np.ndarray) and len(samples_S) == 48_000
    assert spent.keys() == {"read", "decode", "resample"} and min(spent.values()) > 0


def test_precision_is_checked_once_by_each_worker(fitted_codec, tmp_path, monkeypatch, one_thread):
    """On a CPU, whose bf16 changes more codes than are allowed."""
    monkeypatch.setattr(encoder, "MOST_CHANGED", 1.0)
    write_tones(tmp_path, 6, seconds=0.1)
    weights = tmp_path / "codec.safetensors"
    weights.write_bytes(Codec(fitted_codec.model, 2, "test", published=False).to_bytes())
    shards = make_plan(config(tmp_path, shard_clips=2)).shards
    for precision, checked in (("bf16", [1, 0, 0]), ("fp32", [0, 0, 0])):
        for number in range(2):
            work = config(tmp_path / f"{precision}-{number}", bitrate_kbps=1.5)
            worker = ShardWorker(work, str(weights))
            worker._gpu = BatchedEncoder(worker._codec.model, "cpu", precision)
            spent = [worker.encode(shard, []) for shard in shards]
            assert [shard.get("checked", 0) for shard in spent] == checked
            assert all(("changed" in shard) == ("checked" in shard) for shard in spent)
            assert [shard["clips"] for shard in spent] == [2, 2, 2]


@pytest.mark.parametrize(("cluster_cpus", "threads"), [(1, 1), (10_000, os.cpu_count())])
def test_codec_is_fitted_on_the_cpus_that_ray_counts_and_the_machine_has(tmp_path, one_thread, cluster_cpus, threads):
    write_tones(tmp_path, 4)
    fitter, asked = CodecFitter(), config(tmp_path, bitrate_kbps=1.5)
    torch.set_num_threads(2)
    assert fitter.fit(asked, make_plan(asked), cluster_cpus)
    assert torch.get_num_threads() == threads
    done, total = fitter.progress()
    assert done == total > 0


def test_two_drivers_begin_at_different_shards_and_each_has_all(tmp_path):
    write_tones(tmp_path, 40, seconds=0.1)
    shards = make_plan(config(tmp_path, shard_clips=2)).shards
    orders = [[shard.number for shard in _from_anywhere(shards)] for _ in range(50)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({order[0] for order in orders}) > 1  # all alike once in 20^49 runs
    assert _from_anywhere(shards[:1]) == shards[:1]
