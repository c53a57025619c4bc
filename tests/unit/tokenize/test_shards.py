"""Shards: the same clips give the same bytes, and other tools read them."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from support import FINGERPRINT, write_tones

from megascale import storage
from megascale.data.index import Quarantined, ShardIndex
from megascale.errors import DataError
from megascale.tokenize.clips import Clip, ClipsConfig, cut
from megascale.tokenize.shards import EncodedClip, ShardPlan, build_shard, plan_shards, publish_shard, read_committed
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokens import num_frames, read_ecdc

NAME = "encodec_24khz+abababab"


def clip(i: int) -> Clip:
    return Clip(
        f"clip-{i:03d}",
        f"/corpus/{i}.wav",
        f"{i}.wav",
        f"recording-{i // 2:03d}",
        0.0,
        1.0,
        {"class": "é" * (i % 3)},
        None,
    )


def encode(clips: list[Clip]) -> list[EncodedClip]:
    rng = np.random.default_rng(3)
    samples = [23_000 + 777 * i for i in range(len(clips))]  # no two of a length
    return [EncodedClip(c, rng.integers(0, 1024, (2, num_frames(s))), s) for c, s in zip(clips, samples, strict=True)]


def build(count: int = 5, bad: list[Quarantined] | None = None) -> tuple[bytes, ShardIndex, list[EncodedClip]]:
    plan = ShardPlan(7, [clip(i) for i in range(count)])
    encoded = encode(plan.clips)
    data, index = build_shard(plan, encoded, bad or [], NAME, FINGERPRINT)
    return data, index, encoded


def test_plan_cuts_the_list_in_order_and_numbers_the_shards():
    clips = [clip(i) for i in range(10)]
    plans = plan_shards(clips, 4)
    assert [p.name for p in plans] == ["tokens-000000.tar", "tokens-000001.tar", "tokens-000002.tar"]
    assert [len(p.clips) for p in plans] == [4, 4, 2]
    assert [c for p in plans for c in p.clips] == clips
    assert plan_shards([], 4) == []


def test_plan_refuses_two_clips_with_one_key():
    with pytest.raises(DataError, match=r"^1\.wav at 0\.0 s: listed twice \(key clip-001\)$"):
        plan_shards([clip(0), clip(1), clip(2), clip(1)], 2)


def test_same_clips_give_the_same_bytes():
    (data, index, _), (again, index_again, _) = build(), build()
    assert data == again
    assert index.model_dump_json() == index_again.model_dump_json()


def test_bytes_change_with_codes_order_and_codec():
    data, _, encoded = build()
    plan = ShardPlan(7, [e.clip for e in encoded])
    other = [EncodedClip(encoded[0].clip, (encoded[0].codes_QT + 1) % 1024, encoded[0].audio_samples), *encoded[1:]]
    variants = {
        data,
        build_shard(plan, other, [], NAME, FINGERPRINT)[0],
        build_shard(plan, encoded[::-1], [], NAME, FINGERPRINT)[0],
        build_shard(plan, encoded, [], "encodec_24khz", FINGERPRINT)[0],
    }
    assert len(variants) == 4


def test_index_slices_out_exactly_each_stream():
    data, index, encoded = build()
    assert (index.shard, index.codec) == ("tokens-000007.tar", FINGERPRINT)
    assert (index.sha256, index.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert [m.key for m in index.clips] == [e.clip.key for e in encoded]
    assert [m.recording for m in index.clips] == [e.clip.recording for e in encoded]
    for member, item in zip(index.clips, encoded, strict=True):
        stream = data[member.offset : member.offset + member.size]
        header, codes_QT = read_ecdc(stream, member.key)
        assert header.audio_samples == item.audio_samples
        assert member.frames == header.num_frames == item.codes_QT.shape[1]
        assert np.array_equal(codes_QT, item.codes_QT)


def test_tar_says_nothing_of_when_or_by_whom():
    data, _, encoded = build()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{e.clip.key}.{end}" for e in encoded for end in ("ecdc", "json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_plain_webdataset_reads_a_shard(tmp_path):
    data, index, encoded = build()
    path = tmp_path / index.shard
    path.write_bytes(data)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [e.clip.key for e in encoded]
    for sample, item in zip(samples, encoded, strict=True):
        assert np.array_equal(read_ecdc(sample["ecdc"], sample["__key__"])[1], item.codes_QT)
        described = json.loads(sample["json"])
        assert described["labels"] == item.clip.labels
        assert set(described) == {"source", "recording", "start_seconds", "duration_seconds", "labels", "split"}


def test_corpus_elsewhere_gives_the_same_bytes(tmp_path):
    shards = []
    for root in (tmp_path / "here", tmp_path / "some" / "where" / "else"):
        write_tones(root, 4, seconds=0.2)
        config = SourceConfig(kind="files", url=str(root), label_from_folder=True)
        clips = [c for r in list_recordings(config)[0] for c in cut(r, 0.2, ClipsConfig())]
        (plan,) = plan_shards(clips, 10)
        data, index = build_shard(plan, encode(plan.clips), [], NAME, FINGERPRINT)
        assert str(root).encode() not in data
        shards.append((data, index.model_dump_json()))
    assert shards[0] == shards[1]


def test_longest_key_fits_its_name():
    long = "x" * 200 + ".wav"
    from megascale.tokenize.clips import Recording

    (item,) = encode(cut(Recording("/" + long, long), 1.0, ClipsConfig()))
    data, index = build_shard(ShardPlan(0, [item.clip]), [item], [], NAME, FINGERPRINT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == [f"{index.clips[0].key}.ecdc", f"{index.clips[0].key}.json"]


def test_shard_whose_clips_are_all_quarantined_is_still_committed(tmp_path):
    bad = [Quarantined(key="clip-000", url="/corpus/0.wav", reason="an empty file", attempts=1)]
    data, index = build_shard(ShardPlan(0, [clip(0)]), [], bad, NAME, FINGERPRINT)
    publish_shard(str(tmp_path), data, index)
    stored = ShardIndex.model_validate_json((tmp_path / "tokens-000000.json").read_bytes())
    assert (stored.clips, stored.quarantined) == ([], bad)
    with tarfile.open(tmp_path / "tokens-000000.tar") as tar:
        assert tar.getnames() == []


def test_publish_writes_the_tar_and_the_index_that_commits_it(tmp_path):
    data, index, _ = build()
    publish_shard(str(tmp_path), data, index)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens-000007.json", "tokens-000007.tar"]
    assert (tmp_path / "tokens-000007.tar").read_bytes() == data
    assert ShardIndex.model_validate_json((tmp_path / "tokens-000007.json").read_bytes()) == index


def test_second_writer_changes_nothing(tmp_path):
    data, index, _ = build()
    publish_shard(str(tmp_path), data, index)
    before = {p.name: (p.read_bytes(), p.stat().st_ino) for p in tmp_path.glob("*.json")}
    publish_shard(str(tmp_path), data, index)
    assert {p.name: (p.read_bytes(), p.stat().st_ino) for p in tmp_path.glob("*.json")} == before
    assert storage.read_bytes(f"{tmp_path}/tokens-000007.tar") == data


def test_quarantined_file_whose_name_is_not_utf8_can_be_told(tmp_path):
    # os.walk gives such a name surrogates; an audio file from an old disk may have one
    bad = [Quarantined(key="k", url="/corpus/caf\udce9.wav", reason="/corpus/caf\udce9.wav: an empty file", attempts=1)]
    data, index, _ = build(1, bad)
    publish_shard(str(tmp_path), data, index)
    stored = ShardIndex.model_validate_json((tmp_path / "tokens-000007.json").read_bytes())
    assert stored.quarantined[0].url.startswith("/corpus/caf")


def test_shard_is_committed_by_an_index_and_a_whole_tar(tmp_path):
    data, index, encoded = build()
    plan = ShardPlan(7, [e.clip for e in encoded])
    assert read_committed(str(tmp_path), plan, FINGERPRINT) is None
    publish_shard(str(tmp_path), data, index)
    assert read_committed(str(tmp_path), plan, FINGERPRINT) == index
    tar = tmp_path / plan.name
    tar.write_bytes(data[:-512])
    assert read_committed(str(tmp_path), plan, FINGERPRINT) is None
    tar.unlink()
    assert read_committed(str(tmp_path), plan, FINGERPRINT) is None
    publish_shard(str(tmp_path), data, index)
    assert read_committed(str(tmp_path), plan, FINGERPRINT) == index


def test_shard_of_another_codec_or_of_other_clips_is_not_committed(tmp_path):
    data, index, encoded = build()
    publish_shard(str(tmp_path), data, index)
    clips = [e.clip for e in encoded]
    assert read_committed(str(tmp_path), ShardPlan(7, clips), "cd" * 32) is None
    assert read_committed(str(tmp_path), ShardPlan(7, clips[:-1]), FINGERPRINT) is None
    assert read_committed(str(tmp_path), ShardPlan(7, [*clips[:-1], clip(9)]), FINGERPRINT) is None


def test_index_that_does_not_fit_the_tar_written_anew_is_replaced(tmp_path):
    bad = [Quarantined(key="clip-004", url="/corpus/4.wav", reason="the store was away", attempts=3)]
    data, index, encoded = build()
    plan = ShardPlan(7, [e.clip for e in encoded])
    publish_shard(str(tmp_path), *build_shard(plan, encoded[:-1], bad, NAME, FINGERPRINT))
    (tmp_path / plan.name).unlink()
    publish_shard(str(tmp_path), data, index)
    assert read_committed(str(tmp_path), plan, FINGERPRINT) == index


def test_every_cut_of_an_index_is_refused_by_name(tmp_path):
    data, index, encoded = build()
    publish_shard(str(tmp_path), data, index)
    where = tmp_path / "tokens-000007.json"
    whole = where.read_bytes()
    for size in range(0, len(whole), 37):
        where.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"^{where}: broken: .*; delete it and run the same command again$"):
            read_committed(str(tmp_path), ShardPlan(7, [e.clip for e in encoded]), FINGERPRINT)
