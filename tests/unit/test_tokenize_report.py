"""The page of a token folder that the job's own parts made, from audio whose names are hostile."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support import tone, write_tones
from test_report import Reader

from megascale import storage, tokenize_report
from megascale.config import load_config
from megascale.data.index import read_clips, read_manifest
from megascale.tokenize import job
from megascale.tokenize.codec import load_codec
from megascale.tokenize.plan import TokenizeConfig, make_plan, publish_plan
from megascale.tokenize.shards import read_committed
from megascale.tokenize.worker import ShardWorker

HOSTILE = [b"<script>alert(1)<b>& $x_1$ \xe2\x80\xa8.wav", b"two\nlines.wav", b"caf\xe9.wav"]


def finished(folder: Path, clip_seconds: str = "1") -> TokenizeConfig:
    """Tokenise what lies in `audio/` as the job does, but in this process."""
    values = {
        "source.kind": "files",
        "source.url": folder / "audio",
        "clips.seconds": clip_seconds,
        "codec.weights": folder / "codec.safetensors",
        "codec.bitrate_kbps": 1.5,
        "shards.clips": 3,
        "output.url": folder / "out",
    }
    config = load_config(TokenizeConfig, "tokenize", None, [f"{key}={value}" for key, value in values.items()])
    plan, codec = make_plan(config), load_codec(config.codec.weights)
    publish_plan(config, plan)
    worker = ShardWorker(config, config.codec.weights)
    spent = [worker.encode(shard, []) for shard in plan.shards]
    indexes = [read_committed(config.output.url, shard, codec.fingerprint) for shard in plan.shards]
    job._finish(config, codec, plan, indexes, spent[0], 10.0)
    return config


@pytest.fixture(scope="module")
def made(fitted_codec, tmp_path_factory) -> tuple[Path, TokenizeConfig]:
    folder = tmp_path_factory.mktemp("tokens")
    paths = write_tones(folder / "audio", 5)
    for name in HOSTILE:
        shutil.copy(paths[0], os.fsencode(folder / "audio") + b"/" + name)
    (folder / "audio" / "<img src=x onerror=alert(2)>.wav").write_text("text")
    storage.publish_bytes(str(folder / "codec.safetensors"), fitted_codec.to_bytes())
    return folder, finished(folder)


@pytest.fixture
def config(made, tmp_path) -> TokenizeConfig:
    """A copy of the finished folder, without a page."""
    folder, config = made
    shutil.copytree(folder / "out", tmp_path / "out")
    return config.model_copy(update={"output": config.output.model_copy(update={"url": str(tmp_path / "out")})})


def page_of(config: TokenizeConfig) -> Reader:
    return Reader(storage.join(config.output.url, "report.html"))


def test_page_tells_what_was_made_and_what_was_left_out(config):
    tokenize_report.write_page(config)
    page = page_of(config)
    assert ["clips", "16"] in page.rows
    assert ["quarantined", "1 of 17 clips (5.88%)"] in page.rows
    assert ["not an audio file: Format not recognised.", "1"] in page.rows
    assert "Counted in 16 clips of 6 shards" in page.text
    assert "The bottleneck is the encoder, " in page.text
    assert len(page.images()) == 3


def test_page_is_one_file_and_hostile_names_are_only_text(config):
    tokenize_report.write_page(config)
    page = page_of(config)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert all((attributes["src"] or "").startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_examples_are_of_different_recordings_with_a_frame_of_spectrogram_for_each_frame_of_codes(config):
    manifest = read_manifest(config.output.url)
    stored = {clip.source: clip for clip in read_clips(config.output.url, manifest, 2) if clip.start_seconds == 0}
    examples = list(tokenize_report._examples(config, manifest))
    assert len(examples) == 4 == len({title.rpartition(",")[0] for title, _, _ in examples})
    for title, spectrogram_MF, codes_QT in examples:
        assert spectrogram_MF.shape[1] == codes_QT.shape[1] == 75
        if title.endswith(", at 0 s"):
            name = title.removesuffix(", at 0 s")
            source = next(source for source in stored if source.endswith(name))
            assert np.array_equal(codes_QT, stored[source].codes_QT)


def test_one_recording_is_shown_once(fitted_codec, tmp_path):
    write_tones(tmp_path / "audio", 1, seconds=6)
    storage.publish_bytes(str(tmp_path / "codec.safetensors"), fitted_codec.to_bytes())
    config = finished(tmp_path)
    manifest = read_manifest(config.output.url)
    assert manifest.num_clips == 6
    assert len(list(tokenize_report._examples(config, manifest))) == 1


def test_no_more_of_a_long_clip_is_read_than_is_shown(fitted_codec, tmp_path):
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "long.wav", tone(11, 24_000, 200), 24_000)
    storage.publish_bytes(str(tmp_path / "codec.safetensors"), fitted_codec.to_bytes())
    config = finished(tmp_path, clip_seconds="null")
    ((_, spectrogram_MF, codes_QT),) = tokenize_report._examples(config, read_manifest(config.output.url))
    assert spectrogram_MF.shape[1] == codes_QT.shape[1] == 750


def test_clips_whose_audio_is_gone_are_left_out_of_the_pictures(made, config):
    folder, _ = made
    hidden = (folder / "audio" / "low").rename(folder / "hidden")
    try:
        titles = [title for title, _, _ in tokenize_report._examples(config, read_manifest(config.output.url))]
    finally:
        hidden.rename(folder / "audio" / "low")
    assert titles
    assert not any(title.startswith("low") for title in titles)


def test_page_comes_where_all_of_the_audio_is_gone(made, config):
    folder, _ = made
    hidden = (folder / "audio").rename(folder / "gone")
    try:
        tokenize_report.write_page(config)
    finally:
        hidden.rename(folder / "audio")
    page = page_of(config)
    assert "No recording could be read again" in page.text
    assert len(page.images()) == 2


def test_page_is_written_once_for_each_finish(config):
    out = Path(config.output.url)
    tokenize_report.write_page(config)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    tokenize_report.write_page(config)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    numbers = (out / "tokenize_report.json").read_text().replace('"wall_seconds": 10.0', '"wall_seconds": 77.0')
    (out / "tokenize_report.json").write_text(numbers)
    tokenize_report.write_page(config)
    assert "in 1m17s" in page_of(config).text


def test_page_of_a_start_that_found_every_shard_shows_no_speed(config):
    report = Path(config.output.url) / "tokenize_report.json"
    text = report.read_text()
    start, end = text.index('"real_time_factor"'), text.index('"codebooks"')
    report.write_text(f'{text[:start]}"real_time_factor": {{}},\n{text[end:]}')
    tokenize_report.write_page(config)
    assert "Nothing was left to encode" in page_of(config).text
    assert len(page_of(config).images()) == 2


def test_bottleneck_is_the_encoder_unless_it_waits_for_a_slower_stage():
    factors = {"read": 4.0, "decode": 90.0, "encode": 12.0, "write": 1.0}
    assert tokenize_report.bottleneck(factors, 0.02)[0] == "encode", "four readers work side by side"
    assert tokenize_report.bottleneck(factors, 0.4) == (
        "read",
        "The bottleneck is reading the audio, 4.0 times real time in one worker: its encoder waited for clips 40% of the "
        "time. Workers nearer to the store, or more of them, would help.",
    )
