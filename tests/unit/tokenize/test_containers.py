"""m4a, mp4, webm, mka, aac, wma and opus: their length and alignment, stretches to the sample, and broken ones refused."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from containers import write
from support import tone

from megascale import storage
from megascale.errors import AudioError
from megascale.tokenize.audio import probe_seconds, read_clip

RATE_HZ = 48_000
SECONDS = 12.3071
# samples of 24 kHz by which a container may be off: m4a, mp4 and mka keep lengths in milliseconds; an .aac is bare frames
# of 1,024 with the encoder's delay in front; wma has frames of 2,048, of which FFmpeg's encoder and decoder lose some
OFF = {"m4a": 24, "mp4": 24, "webm": 0, "mka": 24, "aac": 1024, "wma": 2048, "opus": 0}
DELAY = {"aac": 512}


def sweep() -> np.ndarray:
    """A tone that is never twice the same, so that every shift shows."""
    time = np.arange(round(SECONDS * RATE_HZ)) / RATE_HZ
    return (0.4 * np.sin(2 * np.pi * (200 + 60 * time) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("containers")
    for suffix in OFF:
        write(folder / f"x.{suffix}", sweep(), RATE_HZ)
    return folder


@pytest.mark.parametrize("suffix", OFF)
def test_length_and_alignment_are_those_of_what_went_in(folder, suffix):
    url = str(folder / f"x.{suffix}")
    audio_S, sent_S = read_clip(url), sweep()[::2]
    assert abs(len(audio_S) - len(sent_S)) <= OFF[suffix]
    # the header may count the padding and milliseconds
    assert abs(probe_seconds(url) - len(audio_S) / 24_000) < 0.05
    if suffix != "wma":
        delay = DELAY.get(suffix, 0)
        errors = [np.abs(audio_S[100_000 + d : 124_000 + d] - sent_S[100_000:124_000]).max() for d in range(-1, 1024)]
        assert int(np.argmin(errors)) - 1 == delay, "not a sample too early or too late"
        assert min(errors) < 0.01  # lossy coding


@pytest.mark.parametrize("suffix", OFF)
def test_stretch_equals_the_slice_of_a_whole_decode(tmp_path, suffix):
    """At 24 kHz, where nothing is resampled."""
    rate_hz = 24_000 if suffix in ("m4a", "aac", "wma", "mka") else 48_000
    url = str(write(tmp_path / f"x.{suffix}", sweep()[:: 48_000 // rate_hz], rate_hz))
    whole_S = read_clip(url)
    for start, seconds in [(0.0, 1.0), (0.5, 2.0), (5.0, 5.0), (10.0, 2.0), (7.00005, 1.0)]:
        stretch_S = read_clip(url, start, seconds)
        first, count = round(start * 24_000), round(seconds * 24_000)
        assert len(stretch_S) == count
        # Opus is resampled from 48 kHz, whose filter reaches past the stretch; 0.1 s inside only float32 is left
        inside, limit = (slice(0, count), 0.0) if rate_hz == 24_000 else (slice(2400, count - 2400), 1e-5)
        assert np.abs(stretch_S[inside] - whole_S[first : first + count][inside]).max() <= limit


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "webm"])
def test_stretch_is_found_by_seeking(folder, suffix):
    """A decoder that came from the start would have read all of the file before its last second."""
    read: list[int] = []
    path = folder / f"x.{suffix}"

    class Counted:
        def __init__(self, file) -> None:
            self.file = file

        def read(self, size: int = -1) -> bytes:
            data = self.file.read(size)
            read.append(len(data))
            return data

        def seek(self, *where: int) -> int:
            return self.file.seek(*where)

        def tell(self) -> int:
            return self.file.tell()

    from megascale.tokenize.containers import Container, format_of

    with path.open("rb") as file, Container(Counted(file), str(path), format_of(path.read_bytes()[:12])) as container:
        opened = sum(read)
        (*_, last_SC) = container.blocks(container.frames - 1000, 1000)
    assert len(last_SC)
    assert sum(read) - opened < 0.8 * path.stat().st_size


@pytest.mark.parametrize("suffix", ["m4a", "webm", "opus"])
def test_stereo_is_mixed_down(tmp_path, suffix):
    left_S, right_S = tone(2.0, 48_000, 440), tone(2.0, 48_000, 660, seed=1)
    both_S = read_clip(str(write(tmp_path / f"x.{suffix}", np.stack([left_S, right_S], axis=1), 48_000)))
    # lossy; a channel alone would be 0.2 off
    assert np.abs(both_S - (left_S + right_S)[::2][: len(both_S)] / 2).mean() < 0.02


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.98])
@pytest.mark.parametrize("suffix", ["m4a", "mp4", "webm", "mka", "opus"])
def test_cut_short_is_refused(folder, tmp_path, suffix, share):
    data = (folder / f"x.{suffix}").read_bytes()
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data[: round(share * len(data))])
    for call in (read_clip, probe_seconds):
        with pytest.raises(AudioError, match=f"^{path}: "):
            call(str(path))


def test_cut_short_inside_a_bare_frame_is_refused(folder, tmp_path):
    data = (folder / "x.aac").read_bytes()
    path = tmp_path / "x.aac"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=f"^{path}: cannot be decoded"):
        read_clip(str(path))


def test_playlist_with_a_recordings_name_opens_nothing(folder, tmp_path):
    path = tmp_path / "x.m4a"
    (tmp_path / "other.aac").write_bytes((folder / "x.aac").read_bytes())
    path.write_text("ffconcat version 1.0\nfile other.aac\n")
    assert av.open(str(path)).format.name == "concat", "FFmpeg's own guess, which the package must not follow"
    with pytest.raises(AudioError, match="not an audio file"):
        read_clip(str(path))


def test_container_without_audio_is_refused(tmp_path):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="holds no audio"):
        read_clip(str(tmp_path / "x.mp4"))


def test_container_of_an_unknown_codec_is_refused(folder, tmp_path):
    data = (folder / "x.webm").read_bytes()
    assert data.count(b"A_OPUS") == 1
    (tmp_path / "x.webm").write_bytes(data.replace(b"A_OPUS", b"A_NONE"))
    with pytest.raises(AudioError, match="no decoder"):
        read_clip(str(tmp_path / "x.webm"))


def test_webm_that_announces_no_length_is_counted(folder, tmp_path):
    """As a browser records it: with no place to go back to, FFmpeg writes neither length nor sizes."""

    class Pipe:
        def __init__(self, file) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            return self.file.write(data)

    with (
        (tmp_path / "x.webm").open("wb") as file,
        av.open(str(folder / "x.webm")) as source,
        av.open(Pipe(file), "w", format="webm") as live,
    ):
        stream = live.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.pts is not None:
                packet.stream = stream
                live.mux(packet)
    with av.open(str(tmp_path / "x.webm")) as found:
        assert found.duration is None, "the case that this test is about"
    assert probe_seconds(str(tmp_path / "x.webm")) == pytest.approx(SECONDS, abs=0.03)
    assert np.array_equal(read_clip(str(tmp_path / "x.webm"), 6.0, 1.0), read_clip(str(folder / "x.webm"), 6.0, 1.0))


def test_other_filesystem_gives_the_same_samples(folder):
    for suffix in ("m4a", "webm"):
        storage.publish_bytes(f"memory:/{folder}/x.{suffix}", (folder / f"x.{suffix}").read_bytes())
        remote_S = read_clip(f"memory:/{folder}/x.{suffix}", 6.25, 0.5)
        assert np.array_equal(remote_S, read_clip(str(folder / f"x.{suffix}"), 6.25, 0.5))


WITHOUT_PYAV = """
import sys
sys.modules["av"] = None  # what Python itself does for a module that is not to be found
from megascale.config import load_config
from megascale.tokenize.audio import read_clip
from megascale.tokenize.plan import TokenizeConfig, make_plan
"""


@pytest.mark.parametrize(
    ("work", "error"),
    [
        ("read_clip(folder + '/x.m4a')", "ConfigError: {folder}/x.m4a: "),
        (
            "make_plan(load_config(TokenizeConfig, 'tokenize', None, ['source.kind=files', 'source.url=' + folder, "
            "'codec.weights=calibrate', 'codec.bitrate_kbps=1.5', 'output.url=' + folder + '/out']))",
            "ConfigError: {folder}/x.",
        ),
    ],
    ids=["a clip", "a plan, which would quarantine them for good"],
)
def test_without_the_extra_the_reason_names_it(folder, work, error):
    code = f"{WITHOUT_PYAV}folder = {str(folder)!r}\n{work}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert error.format(folder=folder) in done.stderr and "megascale[av]" in done.stderr
