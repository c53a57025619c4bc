"""Recordings that libsndfile does not know: m4a and mp4, webm and mka, aac, wma. FFmpeg decodes them, through PyAV.

PyAV is the extra megascale[av]. The container is told from the file's first bytes, and FFmpeg is to try no other: its
own guess takes a playlist that is named like a recording for an order to open other files.

S samples, C channels.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import IO, Any

import numpy as np

from megascale.errors import AudioError, ConfigError

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_MOST_BOXES = 1000  # of a hostile file that is nothing but boxes
_SEGMENT = bytes.fromhex("18538067")
_PREROLL_SECONDS = 2  # an Opus decoder forgets in less than one what it did not hear before a seek
_OPUS_STEP = 120  # samples at 48 kHz: its frames last 2.5 ms, or a multiple


def format_of(head: bytes) -> str | None:
    """Return FFmpeg's name of the container that a file with these first 12 bytes is; None if it is none of ours."""
    if head[4:8] in _ISO_BOXES:
        return "mov"
    if head[:4] == bytes.fromhex("1A45DFA3"):
        return "matroska"
    if head[:4] == bytes.fromhex("3026B275"):
        return "asf"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS; an mp3 has other layer bits
        return "aac"
    return None


class Container:
    """An open recording: `frames` samples at `samplerate`, as soundfile.SoundFile names them.

    `slack` is by how many samples the header may be wrong: most containers count in milliseconds, padding included.
    """

    def __init__(self, file: IO[bytes], url: str, container_format: str) -> None:
        """Raises ConfigError: megascale[av] is missing; AudioError: the file is broken, cut short or without audio."""
        try:
            import av
        except ImportError:
            # no fault of the recording's, which would be quarantined for good
            raise ConfigError(
                f"{url}: m4a, mp4, webm, mka, aac and wma need the extra megascale[av]: pip install 'megascale[av]'"
            ) from None
        self._av, self._file, self._url, self._format = av, file, url, container_format
        size = file.seek(0, 2)
        end = _announced_end(file, container_format, size)
        if end > size:
            raise AudioError(f"{url}: truncated: {size} bytes of {end} in its header")
        self._open()
        rate = self._stream.rate or 0
        self.samplerate, self.slack = rate, rate // 10
        try:
            self.frames = self._announced_samples() or self._count_samples()
        except self._failures as failure:
            raise self._broken(failure) from None

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what FFmpeg holds; the file stays open."""
        self._container.close()

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        # a container that lies about itself ends in the plain ones
        return self._av.FFmpegError, OSError, ValueError, ArithmeticError, RuntimeError

    def _broken(self, failure: Exception) -> AudioError:
        return AudioError(f"{self._url}: cannot be decoded: {getattr(failure, 'strerror', None) or failure}")

    def _open(self) -> None:
        self._file.seek(0)
        try:
            self._container: Any = self._av.open(self._file, format=self._format)
        except self._failures as failure:
            reason = getattr(failure, "strerror", None) or failure
            raise AudioError(f"{self._url}: not an audio file: {reason}") from None
        streams = self._container.streams.audio
        if not streams:
            self.close()
            raise AudioError(f"{self._url}: holds no audio")
        self._stream: Any = streams[0]
        if self._stream.codec_context is None:
            self.close()
            raise AudioError(f"{self._url}: cannot be decoded: FFmpeg knows no decoder for its audio")
        self._stream.codec_context.thread_count = 1  # a worker has one core

    def _announced_samples(self) -> int:
        """Return how many samples the header announces; 0 if it does not say, or only guesses as FFmpeg does for aac."""
        if self._format == "aac":
            return 0
        if self._stream.duration:
            return round(self._stream.duration * self._stream.time_base * self.samplerate)
        return round(Fraction(self._container.duration or 0, self._av.time_base) * self.samplerate)

    def _count_samples(self) -> int:
        """Count what the packets announce; reads the whole file, and decodes nothing."""
        end = Fraction(0)
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        self._reopen()
        return round(end * self.samplerate)

    def _reopen(self) -> None:
        self.close()
        self._open()

    def blocks(self, first: int, wanted: int) -> Iterator[np.ndarray]:
        """Yield float32 samples_SC, in all the stretch of `wanted` samples from `first` on, or what is there of it.

        After a seek the samples are those of a decoder that came from the start, but for the noise that AAC draws anew
        in bands it stores as "noise".
        """
        try:
            for position, samples_SC in self._decoded(first):
                inside_SC = samples_SC[max(0, first - position) : max(0, first + wanted - position)]
                if len(inside_SC):
                    yield inside_SC
                if position + len(samples_SC) >= first + wanted:
                    return
        except self._failures as failure:
            raise self._broken(failure) from None

    def _decoded(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each frame's place and samples_SC, from `first` or before it to the end."""
        frames, position = self._container.decode(self._stream), 0
        start = first - _PREROLL_SECONDS * self.samplerate
        if start > 0 and self._tells_places:
            self._container.seek(int(start / self._rate_of_time), stream=self._stream)
            next(frames, None)  # FFmpeg takes the decoder's delay off it once more, and its place is unsure
            frame = next(frames, None)
            if frame is not None and frame.pts is not None and self._place(frame.pts) <= first:
                position = self._place(frame.pts)
                yield position, self._samples(frame)
                position += frame.samples
            else:  # it cannot seek there
                self._reopen()
                frames = self._container.decode(self._stream)
        for frame in frames:
            yield position, self._samples(frame)
            position += frame.samples

    @property
    def _rate_of_time(self) -> Fraction:
        """Samples in one tick of the container's clock."""
        return Fraction(self._stream.time_base * self.samplerate)

    @property
    def _is_opus(self) -> bool:
        return self._stream.codec_context.name in ("opus", "libopus")

    @property
    def _tells_places(self) -> bool:
        """Whether a frame's time gives its place to the sample. Milliseconds do for Opus alone, whose frames lie on a
        grid; elsewhere a stretch is decoded from the recording's start."""
        # 2: AAC whose upper octave is synthesised (SBR) may count at half the rate
        return self._rate_of_time == 2 or self._rate_of_time.numerator == 1 or self._is_opus

    def _place(self, pts: int) -> int:
        ticks = pts - (self._stream.start_time or 0)
        place = ticks * self._rate_of_time
        if place.denominator == 1 and self._rate_of_time <= 2:
            return int(place)
        skipped = int.from_bytes(
            (self._stream.codec_context.extradata or b"")[10:12], "little"
        )  # RFC 7845, section 5.1
        return round((place + skipped) / _OPUS_STEP) * _OPUS_STEP - skipped

    def _samples(self, frame: Any) -> np.ndarray:
        if frame.is_corrupt:
            raise AudioError(f"{self._url}: cannot be decoded: damaged at {frame.time or 0:.3f} s")
        if frame.sample_rate != self.samplerate:
            raise AudioError(f"{self._url}: changes its sample rate from {self.samplerate} to {frame.sample_rate} Hz")
        raw = frame.to_ndarray()
        samples_SC = raw.T if frame.format.is_planar else raw.reshape(frame.samples, -1)
        if samples_SC.dtype.kind == "f":
            return samples_SC.astype(np.float32)
        middle = 128 if samples_SC.dtype == np.uint8 else 0
        return ((samples_SC.astype(np.float64) - middle) / 2.0 ** (8 * samples_SC.itemsize - 1)).astype(np.float32)


def _announced_end(file: IO[bytes], container_format: str, size: int) -> int:
    """Return up to which byte the boxes of an mp4, or the segment of a Matroska file, say that they reach; 0 if they
    don't say."""
    if container_format == "mov":
        return _end_of_boxes(file, size)
    return _end_of_segment(file) if container_format == "matroska" else 0


def _end_of_boxes(file: IO[bytes], size: int) -> int:
    position = 0
    for _ in range(_MOST_BOXES):
        if position + 8 > size:
            break
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or head[4:8] == b"moof":  # 0: to the file's end; a stream of fragments has no end of its own
            return 0
        position += length
    return position


def _end_of_segment(file: IO[bytes]) -> int:
    """Read the sizes of the two elements on top. (RFC 8794, section 4)"""

    def number() -> int:
        first = file.read(1)
        width = 9 - first[0].bit_length() if first and first[0] else 1
        rest = int.from_bytes(first + file.read(width - 1), "big") & (1 << 7 * width) - 1
        return 0 if rest == (1 << 7 * width) - 1 else rest  # all ones: unknown, as a live recorder writes it

    file.seek(4)
    header = number()
    file.seek(header, 1)
    if file.read(4) != _SEGMENT:
        return 0
    length = number()
    return file.tell() + length if length else 0
