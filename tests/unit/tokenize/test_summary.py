"""The numbers of a finished tokenization, against cases worked out by hand."""

import json

import numpy as np
import pytest
from support import write_token_folder

from megascale.data.index import Quarantined, read_manifest
from megascale.errors import DataError
from megascale.tokenize.summary import count_reasons, measure_codebooks, summarise


def test_usage_and_perplexity_of_each_codebook(tmp_path):
    """Codebook 0 says nothing but 5; codebook 1 says 0 twice, and 1 and 2 once: 1.5 bits."""
    codes_NQT = np.array([[[5, 5], [0, 0]], [[5, 5], [1, 2]]])
    write_token_folder(tmp_path, 2, frames=2, clips_per_shard=1, codes=codes_NQT)
    found = measure_codebooks(str(tmp_path), read_manifest(str(tmp_path)))
    assert (found["shards"], found["clips"]) == (2, 2)
    assert found["usage"] == [1 / 1024, 3 / 1024]
    assert found["perplexity"] == pytest.approx([1, 2**1.5], rel=1e-12)  # float64 rounding


def test_large_folder_is_sampled_evenly_and_always_in_the_same_shards(tmp_path):
    codes_NQT = np.repeat(np.arange(46), 2 * 75).reshape(46, 2, 75)  # shard i says i and nothing else
    write_token_folder(tmp_path, 46, clips_per_shard=1, codes=codes_NQT)
    manifest = read_manifest(str(tmp_path))
    found = measure_codebooks(str(tmp_path), manifest)
    assert (found["shards"], found["clips"], found["usage"][0]) == (16, 16, 16 / 1024)
    left_out = [i for i in range(46) if i % 3 != 0]  # 16 of 46, evenly spaced, are 0, 3, ... 45
    for i in left_out:
        (tmp_path / manifest.shards[i].name).unlink()
    assert measure_codebooks(str(tmp_path), manifest) == found


def test_changed_shard_is_refused_by_name(tmp_path):
    write_token_folder(tmp_path, 4)
    tar = tmp_path / "tokens-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"ECDC", b"ECDX"))
    with pytest.raises(DataError, match=r"tokens-000000\.tar"):
        measure_codebooks(str(tmp_path), read_manifest(str(tmp_path)))


def quarantined(url: str, reason: str) -> Quarantined:
    return Quarantined(key="key", url=url, reason=f"{url}: {reason}", attempts=1)


def test_reasons_are_counted_without_what_differs_by_clip():
    bad = [
        quarantined(f"/audio/{i}\n.wav", f"truncated: {i} bytes of audio of {7.5 * i} in its header") for i in range(3)
    ]
    assert count_reasons([quarantined("a.wav", "an empty file"), *bad]) == {
        "truncated: … bytes of audio of … in its header": 3,
        "an empty file": 1,
    }


def test_kinds_of_reasons_are_bounded_and_every_clip_is_counted():
    bad = [quarantined("a.wav", "x" * (i + 1)) for i in range(30)]
    counted = count_reasons([*bad, bad[0]])
    assert len(counted) == 21
    assert counted["other reasons"] == 10
    assert sum(counted.values()) == 31


def test_speed_is_of_what_this_start_encoded(tmp_path):
    """Of 8 s in the folder, an earlier start has encoded 5."""
    write_token_folder(tmp_path, 8)
    manifest = read_manifest(str(tmp_path))
    report = summarise(
        str(tmp_path), manifest, [], {"audio": 3.0, "encode": 1.5, "idle": 0.5, "read": 0.0, "clips": 3}, 6.0
    )
    assert report["hours"] == 8 / 3600
    assert report["encoded_hours"] == 3 / 3600
    assert report["hours_of_audio_per_hour"] == 0.5
    assert report["real_time_factor"] == {"encode": 2.0}
    assert report["encoder_idle"] == 0.25
    nothing = summarise(str(tmp_path), manifest, [], {}, 6.0)
    assert (nothing["hours_of_audio_per_hour"], nothing["real_time_factor"]) == (0.0, {})
    json.dumps([report, nothing], allow_nan=False)
