"""Any recording to 24 kHz mono: soundfile decodes, soxr resamples. What cannot be trusted raises AudioError."""

import math
import time
from collections import defaultdict
from typing import IO, Any, Literal

import numpy as np
import soundfile
import soxr

from megascale import storage
from megascale.errors import AudioError, StorageError
from megascale.tokens import SAMPLE_RATE_HZ

# by the first four bytes of a file made of chunks: how it writes numbers, and which chunk is its audio
_CHUNKED: dict[bytes, tuple[Literal["little", "big"], bytes]] = {
    b"RIFF": ("little", b"data"),
    b"RF64": ("little", b"data"),
    b"RIFX": ("big", b"data"),
    b"FORM": ("big", b"SSND"),
}
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # the largest


def probe_seconds(url: str) -> float:
    """Return a recording's length from its header, in seconds. Raises AudioError or StorageError naming the URL."""
    with storage.open_read(url) as file, _open(file, url) as sound:
        return sound.frames / sound.samplerate


def read_clip(
    url: str,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    spent: defaultdict[str, float] | None = None,
) -> np.ndarray:
    """Read a stretch of a recording as 24 kHz mono; only that stretch is decoded.

    Args:
        url: the recording; wav, flac, ogg or mp3, at any rate and channel count.
        start_seconds: where the stretch begins.
        duration_seconds: its length; None reads to the end.
        spent: the seconds that reading, decoding and resampling took are added to its `read`, `decode`, `resample`.

    Returns:
        float32 samples of shape (S,), S = round(24000 x seconds read).

    Raises:
        AudioError: not audio, truncated, empty, not finite, or too short for the stretch; names the URL.
        StorageError: cannot be read at all, or the store failed on the way.
    """
    spent = defaultdict(float) if spent is None else spent
    started = time.perf_counter()
    with storage.open_read(url) as handle:
        file = _Watched(handle)
        try:
            samples_SC, rate = _decode(file, url, start_seconds, duration_seconds)
        except AudioError:
            if isinstance(file.failure, StorageError):  # what looks like a broken file is a broken connection
                raise file.failure from None
            if file.failure is not None:
                raise StorageError(f"{url}: {file.failure}") from None
            raise
    decoded = time.perf_counter()
    mono_S = samples_SC.mean(axis=1)
    if not np.isfinite(mono_S).all():
        raise AudioError(f"{url}: holds samples that are not finite numbers")
    if rate != SAMPLE_RATE_HZ:
        mono_S = soxr.resample(mono_S, rate, SAMPLE_RATE_HZ)
    if not len(mono_S):
        raise AudioError(f"{url}: no samples left at {SAMPLE_RATE_HZ} Hz")
    spent["read"] += file.seconds
    spent["decode"] += decoded - started - file.seconds
    spent["resample"] += time.perf_counter() - decoded
    return np.ascontiguousarray(mono_S, dtype=np.float32)


def _decode(file: "_Watched", url: str, start_seconds: float, duration_seconds: float | None) -> tuple[np.ndarray, int]:
    with _open(file, url) as sound:
        first, wanted = _stretch(sound, url, start_seconds, duration_seconds)
        try:
            sound.seek(first)
            samples_SC = sound.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as failure:
            raise AudioError(f"{url}: cannot be decoded: {failure}") from None
        if len(samples_SC) != wanted:
            raise AudioError(f"{url}: truncated: {len(samples_SC)} samples could be decoded of {wanted}")
        return samples_SC, sound.samplerate


class _Watched:
    """A file that keeps its first read error, and how long its reads took.

    libsndfile swallows what its callbacks raise and takes the file for a shorter one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | StorageError | None = None
        self.seconds = 0.0

    def read(self, size: int = -1) -> bytes:
        started = time.perf_counter()
        try:
            return self._file.read(size)
        except (OSError, StorageError) as failure:
            self.failure = self.failure or failure
            raise
        finally:
            self.seconds += time.perf_counter() - started

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _stretch(
    sound: soundfile.SoundFile, url: str, start_seconds: float, duration_seconds: float | None
) -> tuple[int, int]:
    """Return a stretch's first sample and its number of samples. Raises AudioError unless the file holds it."""
    end = "its end" if duration_seconds is None else f"{duration_seconds:.3f} s later"
    asked = f"from {start_seconds:.3f} s to {end}"
    if not math.isfinite(start_seconds + (duration_seconds or 0.0)):
        raise AudioError(f"{url}: {asked}: not a stretch of time")
    first = round(start_seconds * sound.samplerate)
    wanted = sound.frames - first if duration_seconds is None else round(duration_seconds * sound.samplerate)
    if first + wanted == sound.frames + 1:
        wanted -= 1  # a cut may be planned from a length rounded up by less than a sample
    if first < 0 or wanted < 1 or first + wanted > sound.frames:
        raise AudioError(f"{url}: {sound.frames / sound.samplerate:.3f} s long, and {asked} was asked for")
    return first, wanted


def _open(file: Any, url: str) -> soundfile.SoundFile:
    _check_is_whole(file, url)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as failure:
        reason = str(failure).rpartition(": ")[2]
        raise AudioError(f"{url}: not an audio file: {reason}") from None
    if sound.frames < 1 or sound.samplerate < 1:
        sound.close()
        raise AudioError(f"{url}: its header announces no audio")
    return sound


def _check_is_whole(file: IO[bytes], url: str) -> None:
    """Compare a file's header with its size: libsndfile reads a truncated one, or one that claims 4 GB, as if whole."""
    size = file.seek(0, 2)
    if size == 0:
        raise AudioError(f"{url}: an empty file")
    start, length = _announced_audio(file, size)
    if start + length > size:
        raise AudioError(f"{url}: truncated: {max(0, size - start)} bytes of audio of {length} in its header")
    if not _ogg_has_its_end(file, size):
        raise AudioError(f"{url}: truncated: its last page is missing")
    file.seek(0)


def _announced_audio(file: IO[bytes], size: int) -> tuple[int, int]:
    """Return where the audio of a WAV, RF64, AIFF or AU begins, and how many bytes of it the header announces.

    (0, 0) for the rest: FLAC and mp3 announce samples, which are counted when they are decoded.
    """

    def number(order: Literal["little", "big"], width: int = 4) -> int:
        return int.from_bytes(file.read(width), order)

    file.seek(0)
    magic = file.read(4)
    if magic == b".snd":
        return number("big"), number("big")
    if magic not in _CHUNKED:
        return 0, 0
    order, audio = _CHUNKED[magic]
    position, long_length = 12, 0
    while position + 8 <= size:
        file.seek(position)
        name, length = file.read(4), number(order)
        if name == b"ds64":  # RF64 keeps lengths here that 32 bits cannot hold: of the file, then of the audio
            _, long_length = number(order, 8), number(order, 8)
        if name == audio:
            return position + 8, long_length if long_length and length == 0xFFFFFFFF else length
        position += 8 + length + length % 2
    return 0, 0


def _ogg_has_its_end(file: IO[bytes], size: int) -> bool:
    """Return whether the last page of an Ogg stream is whole and says that it is the last. (RFC 3533, section 6)"""
    file.seek(0)
    if file.read(4) != b"OggS":
        return True
    file.seek(max(0, size - _OGG_PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return bool(segments) and bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(segments)
