"""Recordings in every container that the package reads, written from samples by FFmpeg or libsndfile."""

from pathlib import Path

import av
import numpy as np
import soundfile

# suffix -> FFmpeg's container and encoder; the rest is libsndfile's
OF_FFMPEG = {
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "libopus"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "flac"),
    "aac": ("adts", "aac"),
    "wma": ("asf", "wmav2"),
}


def write(path: Path, samples_SC: np.ndarray, rate_hz: int) -> Path:
    """Write float samples of shape (S,) or (S, C), C = 1 or 2, in the format that the path's suffix names."""
    suffix = path.suffix[1:]
    if suffix not in OF_FFMPEG:
        options = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
        soundfile.write(path, samples_SC, rate_hz, **options)
        return path
    container_format, encoder = OF_FFMPEG[suffix]
    samples_CS = np.ascontiguousarray(np.atleast_2d(samples_SC.T), dtype=np.float32)
    layout = ("mono", "stereo")[len(samples_CS) - 1]
    # without: bands of noise, which a decoder draws anew each time
    options = {"aac_pns": "0"} if encoder == "aac" else {}
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(encoder, rate=rate_hz, layout=layout, bit_rate=128_000, options=options)
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 4096
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate_hz, frame_size=size)
        for frame in [*_frames(samples_CS, rate_hz, layout), None]:
            for piece in resampler.resample(frame):
                container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def _frames(samples_CS: np.ndarray, rate_hz: int, layout: str) -> list[av.AudioFrame]:
    frames = []
    for first in range(0, samples_CS.shape[1], rate_hz):
        piece_CS = np.ascontiguousarray(samples_CS[:, first : first + rate_hz])
        frame = av.AudioFrame.from_ndarray(piece_CS, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate_hz, first
        frames.append(frame)
    return frames
