"""Three hours of audio: read clip by clip, in order, in a process that stays small."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hostile import wav

from megascale.errors import AudioError
from megascale.tokenize.audio import read_clip

RATE_HZ, HOURS = 44_100, 3
MOST_MB = 300

READER = """
import re, sys
from megascale.tokenize.audio import probe_seconds, read_clip

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

url, step = sys.argv[1], int(sys.argv[2])
first, clips = peak_mb(), int(probe_seconds(url) // 10)
for i in range(0, clips, step):
    # webm counts the encoder's delay in its length, so that the last clip is shorter by 6 ms
    assert 0 <= 240_000 - len(read_clip(url, 10.0 * i, 10.0)) <= (200 if i == clips - 1 else 0), i
print(clips, peak_mb() - first)
"""


def minute() -> np.ndarray:
    """A minute of a stereo tone, float32 (S, 2)."""
    time = np.arange(60 * RATE_HZ) / RATE_HZ
    return np.stack([0.3 * np.sin(2 * np.pi * 440 * time), 0.2 * np.sin(2 * np.pi * 550 * time)], 1).astype(np.float32)


def write_hours(path: Path) -> Path:
    """Write three hours, a block at a time."""
    samples_SC, suffix = minute(), path.suffix[1:]
    if suffix in ("m4a", "webm"):
        _write_with_ffmpeg(path, samples_SC)
        return path
    options = {"subtype": "PCM_16"} if suffix == "wav" else {}
    with soundfile.SoundFile(path, "w", RATE_HZ, 2, **options) as file:
        for _ in range(HOURS * 60):
            for first in range(0, len(samples_SC), RATE_HZ):  # libsndfile crashes on larger blocks of Vorbis
                file.write(samples_SC[first : first + RATE_HZ])
    return path


def _write_with_ffmpeg(path: Path, samples_SC: np.ndarray) -> None:
    """Encode a minute, and mux its packets again and again."""
    encoder, rate_hz = ("aac", RATE_HZ) if path.suffix == ".m4a" else ("libopus", 48_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=rate_hz, layout="stereo")
        stream.codec_context.open()
        size = stream.codec_context.frame_size
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples_SC.T), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = RATE_HZ, 0
        resampler = av.AudioResampler(stream.codec_context.format, "stereo", rate_hz, frame_size=size)
        packets = [packet for piece in resampler.resample(frame) for packet in stream.encode(piece)]
        count = HOURS * 3600 * rate_hz // size
        for n in range(count):
            source = packets[n % len(packets)]
            packet = av.Packet(bytes(source))
            packet.pts = packet.dts = n * size
            packet.duration, packet.time_base, packet.stream = size, stream.codec_context.time_base, stream
            container.mux(packet)


def peak_of_reading(path: Path, step: int) -> int:
    """Return by how many MB a process grows that reads each `step`th clip of a file."""
    line = [sys.executable, "-c", READER, str(path), str(step)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=3000)
    path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    clips, grown = map(int, done.stdout.split())
    print(f"\n  {path.suffix}: {clips} clips of 10 s, {grown} MB more than before the first")
    assert clips >= 1079
    return grown


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "m4a", "webm"])
def test_three_hours_are_never_read_whole(tmp_path, suffix):
    assert peak_of_reading(write_hours(tmp_path / f"x.{suffix}"), 1) < MOST_MB


def test_three_hours_of_silence_are_never_read_whole(tmp_path):
    path, size = tmp_path / "x.wav", HOURS * 3600 * RATE_HZ * 4
    with path.open("wb") as file:
        file.write(wav(b"", RATE_HZ, channels=2, claimed=size))
        file.truncate(file.tell() + size)  # takes no place on the disk
    assert peak_of_reading(path, 4) < MOST_MB


def test_a_clip_of_three_hours_is_refused_before_it_is_decoded(tmp_path):
    path, size = tmp_path / "x.wav", HOURS * 3600 * RATE_HZ * 4
    with path.open("wb") as file:
        file.write(wav(b"", RATE_HZ, channels=2, claimed=size))
        file.truncate(file.tell() + size)
    with pytest.raises(AudioError, match=rf"^{path}: 10800 s in one clip, clips\.max_seconds=120; clips\.seconds cuts"):
        read_clip(str(path), most_seconds=120)
