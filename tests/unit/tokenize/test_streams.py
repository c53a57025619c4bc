"""`.ecdc` inputs: the job's own codec's codes are kept as they are, and every other stream is refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
from test_worker import config

from megascale import storage
from megascale.data.index import Quarantined
from megascale.errors import ConfigError, DataError, TokenError
from megascale.tokenize.clips import Clip, ClipsConfig, Recording, cut
from megascale.tokenize.plan import make_plan
from megascale.tokenize.shards import EncodedClip
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokenize.streams import probe_seconds, read_stream
from megascale.tokenize.worker import _read_clip
from megascale.tokens import PUBLISHED_NAME, write_ecdc

NAME = f"{PUBLISHED_NAME}+0123abcd"


def write(path: Path, num_codebooks: int = 16, samples: int = 24_001, name: str = NAME) -> np.ndarray:
    codes_QT = np.random.default_rng(0).integers(0, 1024, (num_codebooks, (samples + 319) // 320))
    path.write_bytes(write_ecdc(codes_QT, samples, name))
    return codes_QT


def refused(path: Path, num_codebooks: int = 16, most_seconds: float = 120.0) -> str:
    with pytest.raises(TokenError) as failure:
        read_stream(str(path), NAME, num_codebooks, most_seconds)
    assert str(failure.value).startswith(f"{path}: ")
    return str(failure.value)


def test_codes_are_those_of_the_stream_and_write_the_same_bytes(tmp_path):
    sent_QT = write(tmp_path / "x.ecdc")
    codes_QT, samples = read_stream(str(tmp_path / "x.ecdc"), NAME, 16, 120)
    assert np.array_equal(codes_QT, sent_QT)
    assert write_ecdc(codes_QT, samples, NAME) == (tmp_path / "x.ecdc").read_bytes()


def test_of_more_codebooks_the_first_are_kept(tmp_path):
    sent_QT = write(tmp_path / "x.ecdc", num_codebooks=32)
    assert np.array_equal(read_stream(str(tmp_path / "x.ecdc"), NAME, 16, 120)[0], sent_QT[:16])


def test_fewer_codebooks_are_refused(tmp_path):
    write(tmp_path / "x.ecdc", num_codebooks=8)
    assert "holds 8 codebooks, 16 were asked for" in refused(tmp_path / "x.ecdc")


@pytest.mark.parametrize("name", [PUBLISHED_NAME, f"{PUBLISHED_NAME}+ffffffff"])
def test_codes_of_another_codec_are_refused(tmp_path, name):
    write(tmp_path / "x.ecdc", name=name)
    assert f"codes of {name}, and this job's codec is {NAME}" in refused(tmp_path / "x.ecdc")


def test_stream_longer_than_a_clip_may_be_is_refused(tmp_path):
    write(tmp_path / "x.ecdc", samples=24_000 * 3)
    assert "3 s in one stream, clips.max_seconds=2" in refused(tmp_path / "x.ecdc", most_seconds=2)


@pytest.mark.parametrize("keep", [0, 5, 30, 300, -1])
def test_truncated_stream_is_refused(tmp_path, keep):
    write(tmp_path / "x.ecdc")
    (tmp_path / "x.ecdc").write_bytes((tmp_path / "x.ecdc").read_bytes()[:keep])
    refused(tmp_path / "x.ecdc")


def test_header_that_announces_gigabytes_is_refused(tmp_path):
    path = tmp_path / "x.ecdc"
    path.write_bytes(struct.pack("!4sBI", b"ECDC", 0, 2**32 - 1) + b" " * 5000)
    assert f"broken .ecdc header: {2**32 - 1} bytes long" in refused(path)


def test_length_comes_from_the_header_alone(tmp_path):
    """The codes are not even there."""
    write(tmp_path / "x.ecdc")
    head = (tmp_path / "x.ecdc").read_bytes()[:100]
    (tmp_path / "head.ecdc").write_bytes(head)
    assert probe_seconds(str(tmp_path / "head.ecdc")) == 24_001 / 24_000
    storage.publish_bytes(f"memory:/{tmp_path}/head.ecdc", head)
    assert probe_seconds(f"memory:/{tmp_path}/head.ecdc") == 24_001 / 24_000


@pytest.mark.parametrize("seconds", [0.25, 10.0, None])
def test_stream_is_one_clip_whatever_the_cut(seconds):
    (clip,) = cut(Recording("/a/x.ecdc", "x.ecdc"), 1.5, ClipsConfig(seconds=seconds))
    assert (clip.start_seconds, clip.duration_seconds) == (0.0, 1.5)


@pytest.mark.parametrize("row", ["x.ecdc,0,1.5", "x.ecdc,0.5,", "x.ecdc,1,1"])
def test_stretch_of_a_stream_in_a_list_is_refused(tmp_path, row):
    table = tmp_path / "list.csv"
    table.write_text(f"url,start,duration\nx.ecdc,0,\n{row}\n")
    with pytest.raises(DataError, match=rf"^{table}: line 3: x\.ecdc: an .ecdc stream is taken whole"):
        list_recordings(SourceConfig(kind="list", url=str(table)))


def test_folder_of_streams_alone_needs_the_codec_that_wrote_them(tmp_path):
    write(tmp_path / "x.ecdc")
    with pytest.raises(ConfigError, match=r"codec\.weights=calibrate: .* no audio to fit a codec to"):
        make_plan(config(tmp_path))


def test_broken_stream_is_unreadable_at_planning(tmp_path):
    write(tmp_path / "x.ecdc")
    (tmp_path / "x.ecdc").write_bytes(b"ECDC")
    (tmp_path / "y.ecdc").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 2 recordings can be read: .*x\.ecdc: 4 bytes, too short"):
        make_plan(config(tmp_path))


def test_worker_takes_the_codes_and_quarantines_what_is_not_its_codecs(tmp_path):
    sent_QT = write(tmp_path / "x.ecdc")
    clip = Clip("key", str(tmp_path / "x.ecdc"), "x.ecdc", "key", 0.0, None, {}, None)
    found, _ = _read_clip(clip, config(tmp_path), NAME)
    assert isinstance(found, EncodedClip)
    assert np.array_equal(found.codes_QT, sent_QT) and found.audio_samples == 24_001
    found, _ = _read_clip(clip, config(tmp_path), f"{PUBLISHED_NAME}+ffffffff")
    assert isinstance(found, Quarantined) and found.attempts == 1 and "this job's codec" in found.reason
