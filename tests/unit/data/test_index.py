"""A token folder: readers trust the manifest alone, and whatever does not match it is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import FINGERPRINT, write_token_folder

from megascale.data.index import (
    MANIFEST,
    Manifest,
    ShardFacts,
    index_name,
    read_clips,
    read_codes,
    read_index,
    read_manifest,
)
from megascale.errors import DataError, StorageError, TokenError
from megascale.tokens import write_ecdc


@pytest.fixture
def folder(tmp_path):
    write_token_folder(tmp_path, 10, num_codebooks=4, frames=7, clips_per_shard=4)
    return tmp_path


def change(path: Path, **facts: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_manifest_is_read_back_as_written(folder):
    manifest = read_manifest(str(folder))
    assert isinstance(manifest, Manifest)
    assert (manifest.num_clips, manifest.num_quarantined, manifest.codec.num_codebooks) == (10, 0, 4)
    assert [(s.name, s.clips) for s in manifest.shards] == [
        ("tokens-000000.tar", 4),
        ("tokens-000001.tar", 4),
        ("tokens-000002.tar", 2),
    ]
    assert manifest.codec.fingerprint == FINGERPRINT


def test_every_clip_is_read_back_in_order(tmp_path):
    made = write_token_folder(tmp_path, 10, num_codebooks=4, frames=7, clips_per_shard=4)
    for num_codebooks in (1, 4):
        clips = list(read_clips(str(tmp_path), read_manifest(str(tmp_path)), num_codebooks))
        assert [c.key for c in clips] == [f"clip-{i:04d}" for i in range(10)]
        for i, clip in enumerate(clips):
            assert np.array_equal(clip.codes_QT, made[i][:num_codebooks])
            assert clip.labels == {"class": ("low", "high")[i % 2]}
            assert (clip.source, clip.recording) == (f"{i:04d}.wav", f"recording-{i:04d}")
            assert clip.split == ("train", "train", "train", "train", "valid", "valid", "test", "test")[i % 8]


def test_index_agrees_with_the_shard(tmp_path):
    made = write_token_folder(tmp_path, 10, num_codebooks=4, frames=7, clips_per_shard=4)
    manifest = read_manifest(str(tmp_path))
    seen = []
    for facts in manifest.shards:
        data = (tmp_path / facts.name).read_bytes()
        for member in read_index(str(tmp_path), facts, FINGERPRINT).clips:
            seen.append(read_codes(data[member.offset :][: member.size], member.key, manifest.codec, 4))
    assert all(np.array_equal(a, b) for a, b in zip(seen, made, strict=True))


def test_index_has_its_shards_name():
    assert index_name("tokens-000123.tar") == "tokens-000123.json"


def test_folder_without_a_manifest_is_named(folder):
    (folder / MANIFEST).unlink()
    for url in (str(folder), str(folder / "none")):
        with pytest.raises(
            DataError, match=f"^{url}: no manifest.json; not a token folder, or its tokenization has not"
        ):
            read_manifest(url)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', "\x00\x01"])
def test_broken_manifest_is_named(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=f"^{folder}/manifest.json: broken: "):
        read_manifest(str(folder))


def test_every_cut_of_a_manifest_is_refused(folder):
    whole = (folder / MANIFEST).read_bytes()
    for size in range(0, len(whole), 37):
        (folder / MANIFEST).write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"manifest\.json: broken: "):
            read_manifest(str(folder))


def test_manifest_with_a_key_of_another_version_is_refused(folder):
    change(folder / MANIFEST, compression="zstd")
    with pytest.raises(DataError, match=r"manifest.json: broken: .*compression"):
        read_manifest(str(folder))


@pytest.mark.parametrize("more", [{}, {"compression": "zstd"}])
def test_manifest_of_another_version_is_refused_by_name(folder, more):
    change(folder / MANIFEST, version=2, **more)
    with pytest.raises(DataError, match=f"^{folder}/manifest.json: version 2 of the format; this package reads vers"):
        read_manifest(str(folder))


def test_missing_index_is_named(folder):
    facts = read_manifest(str(folder)).shards[1]
    (folder / "tokens-000001.json").unlink()
    with pytest.raises(StorageError, match=f"^{folder}/tokens-000001.json: no such file$"):
        read_index(str(folder), facts, FINGERPRINT)


@pytest.mark.parametrize("text", ["", '{"shard": "x"', "[]", '{"shard": "tokens-000001.tar"}'])
def test_broken_index_is_named(folder, text):
    facts = read_manifest(str(folder)).shards[1]
    (folder / "tokens-000001.json").write_text(text)
    with pytest.raises(DataError, match=f"^{folder}/tokens-000001.json: broken: "):
        read_index(str(folder), facts, FINGERPRINT)


def test_shard_of_another_codec_is_refused(folder):
    facts = read_manifest(str(folder)).shards[0]
    with pytest.raises(
        TokenError, match=f"^{folder}/tokens-000000.json: made by codec abababab, the manifest says 12121212$"
    ):
        read_index(str(folder), facts, "12" * 32)


def test_index_of_another_shard_is_refused(folder):
    manifest = read_manifest(str(folder))
    (folder / "tokens-000001.json").write_bytes((folder / "tokens-000000.json").read_bytes())
    with pytest.raises(DataError, match=f"^{folder}/tokens-000001.json: not the shard that manifest.json names"):
        read_index(str(folder), manifest.shards[1], FINGERPRINT)
    first = manifest.shards[0]
    fewer = ShardFacts(name=first.name, clips=3, sha256=first.sha256, size=first.size)
    with pytest.raises(DataError, match=r"not the shard that manifest\.json names"):
        read_index(str(folder), fewer, FINGERPRINT)


@pytest.mark.parametrize("how", ["flip", "cut", "swap", "empty"])
def test_changed_tar_is_refused(folder, how):
    path = folder / "tokens-000001.tar"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[600] ^= 1  # inside the first stream
    path.write_bytes(
        {"flip": data, "cut": data[:-1], "swap": (folder / "tokens-000000.tar").read_bytes(), "empty": b""}[how]
    )
    with pytest.raises(DataError, match=f"^{path}: its sha256 is not the one in manifest.json$"):
        list(read_clips(str(folder), read_manifest(str(folder)), 2))


def test_missing_tar_is_named(folder):
    (folder / "tokens-000002.tar").unlink()
    with pytest.raises(StorageError, match=f"^{folder}/tokens-000002.tar: no such file$"):
        list(read_clips(str(folder), read_manifest(str(folder)), 2))


def test_file_that_the_manifest_does_not_name_is_not_read(folder):
    for suffix in ("tar", "json"):
        (folder / f"tokens-000009.{suffix}").write_bytes((folder / f"tokens-000000.{suffix}").read_bytes())
    assert len(list(read_clips(str(folder), read_manifest(str(folder)), 2))) == 10


def test_more_codebooks_than_stored_are_refused(folder):
    with pytest.raises(TokenError, match=r"tokens-000000\.tar:clip-0000\.ecdc: holds 4 codebooks, 8 were asked for"):
        list(read_clips(str(folder), read_manifest(str(folder)), 8))


def test_stream_of_another_codec_is_refused(folder):
    codec = read_manifest(str(folder)).codec
    stream = write_ecdc(np.zeros((2, 3), dtype=int), 960, "encodec_24khz")
    with pytest.raises(
        TokenError, match=r"^here: written by codec 'encodec_24khz', the manifest says 'encodec_24khz\+"
    ):
        read_codes(stream, "here", codec, 2)
    with pytest.raises(TokenError, match=r"^here: truncated"):
        read_codes(write_ecdc(np.zeros((2, 3), dtype=int), 960, codec.name)[:-1], "here", codec, 2)
