"""Any recording to 24 kHz mono: soundfile or FFmpeg decodes, soxr resamples. What cannot be trusted raises AudioError.

S samples, C channels.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

import numpy as np
import soundfile
import soxr

from megascale import storage
from megascale.errors import AudioError, StorageError
from megascale.tokenize.containers import Container, format_of
from megascale.tokens import SAMPLE_RATE_HZ

# by the first four bytes of a file made of chunks: how it writes numbers, and which chunk is its audio
_CHUNKED: dict[bytes, tuple[Literal["little", "big"], bytes]] = {
    b"RIFF": ("little", b"data"),
    b"RF64": ("little", b"data"),
    b"RIFX": ("big", b"data"),
    b"FORM": ("big", b"SSND"),
}
_MOST_CHUNKS = 1000  # of a hostile file that is nothing but chunks
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # the largest
_LOWEST_HZ, _HIGHEST_HZ = 1000, 1_000_000  # of recordings; a header that says otherwise lies
_MOST_SAMPLES_PER_BYTE = (
    8192  # a silent FLAC frame of 65,535 samples takes 8 bytes, a silent Vorbis packet of 8,192 one
)
_BLOCK = 1 << 20  # numbers decoded at once, over all channels


def probe_seconds(url: str) -> float:
    """Return a recording's length from its header, in seconds. Raises AudioError or StorageError naming the URL."""
    with _watched(url) as file, _open(file, url) as sound:
        return sound.frames / sound.samplerate


def read_clip(
    url: str,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    spent: defaultdict[str, float] | None = None,
    most_seconds: float = math.inf,
) -> np.ndarray:
    """Read a stretch of a recording as 24 kHz mono; only that stretch is decoded.

    Args:
        url: the recording, at any rate and channel count; with megascale[av] also m4a, mp4, webm, mka, aac and wma.
        start_seconds: where the stretch begins.
        duration_seconds: its length; None reads to the end.
        spent: the seconds that reading, decoding and resampling took are added to its `read`, `decode`, `resample`.
        most_seconds: a longer stretch is refused before it is decoded (`clips.max_seconds`).

    Returns:
        float32 samples of shape (S,), S = round(24000 x seconds read).

    Raises:
        AudioError: not audio, truncated, empty, not finite, too long, or too short for the stretch; names the URL.
        StorageError: cannot be read at all, or the store failed on the way.
    """
    spent = defaultdict(float) if spent is None else spent
    started = time.perf_counter()
    with _watched(url) as file:
        mono_S, rate = _decode(file, url, start_seconds, duration_seconds, most_seconds)
    decoded = time.perf_counter()
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


def _decode(
    file: "_Watched", url: str, start_seconds: float, duration_seconds: float | None, most_seconds: float
) -> tuple[np.ndarray, int]:
    """Return a stretch's samples, mixed down block by block: many channels of a long clip never lie in memory."""
    with _open(file, url) as sound:
        first, wanted = _stretch(sound, url, start_seconds, duration_seconds)
        if wanted > most_seconds * sound.samplerate:
            raise AudioError(
                f"{url}: {wanted / sound.samplerate:.0f} s in one clip, clips.max_seconds={most_seconds:g}; "
                "clips.seconds cuts recordings"
            )
        container = isinstance(sound, Container)
        blocks = sound.blocks(first, wanted) if container else _blocks(sound, url, first, wanted)
        mono_S = np.concatenate([np.empty(0, np.float32), *(block_SC.mean(axis=1) for block_SC in blocks)])
        if len(mono_S) < wanted - (sound.slack if container else 0):
            raise AudioError(f"{url}: truncated: {len(mono_S)} samples could be decoded of {wanted}")
        return mono_S, sound.samplerate


def _blocks(sound: soundfile.SoundFile, url: str, first: int, wanted: int) -> Iterator[np.ndarray]:
    try:
        if first:  # some encodings, such as GSM 6.10, cannot seek
            sound.seek(first)
        while wanted > 0:
            block_SC = sound.read(min(wanted, max(1, _BLOCK // sound.channels)), dtype="float32", always_2d=True)
            if not len(block_SC):
                return
            yield block_SC
            wanted -= len(block_SC)
    except (soundfile.SoundFileError, RuntimeError) as failure:
        raise AudioError(f"{url}: cannot be decoded: {failure}") from None


class _Watched:
    """A file that keeps its first read error and ends there, and how long its reads took.

    Raising would help nobody: libsndfile swallows what its callbacks raise, and takes the file for a shorter one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | StorageError | None = None
        self.seconds = 0.0

    def read(self, size: int = -1) -> bytes:
        started = time.perf_counter()
        try:
            return b"" if self.failure else self._file.read(size)
        except (OSError, StorageError) as failure:
            self.failure = failure
            return b""
        finally:
            self.seconds += time.perf_counter() - started

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # a place before the file, as broken ones name it
            return -1  # raised, PyAV would print it and go on

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _watched(url: str) -> Iterator[_Watched]:
    """Open a file. A read that failed is a StorageError, whatever the decoder made of it: a broken file, or a shorter
    one, or other samples."""
    with storage.open_read(url) as handle:
        file = _Watched(handle)
        try:
            yield file
        except AudioError:
            _raise_read_error(file, url)
            raise
        _raise_read_error(file, url)


def _raise_read_error(file: _Watched, url: str) -> None:
    if isinstance(file.failure, StorageError):
        raise file.failure from None
    if file.failure is not None:
        raise StorageError(f"{url}: {file.failure}") from None


def _stretch(
    sound: soundfile.SoundFile | Container, url: str, start_seconds: float, duration_seconds: float | None
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


def _open(file: Any, url: str) -> soundfile.SoundFile | Container:
    size = file.seek(0, 2)
    if size == 0:
        raise AudioError(f"{url}: an empty file")
    file.seek(0)
    container_format = format_of(file.read(12))
    if container_format is None:
        _check_is_whole(file, url, size)
    try:
        sound = soundfile.SoundFile(file) if container_format is None else Container(file, url, container_format)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as failure:
        reason = str(failure).rpartition(": ")[2]
        raise AudioError(f"{url}: not an audio file: {reason}") from None
    try:
        _check_header(sound, url, size)
    except AudioError:
        sound.close()
        raise
    return sound


def _check_header(sound: soundfile.SoundFile | Container, url: str, size: int) -> None:
    if sound.frames < 1:
        raise AudioError(f"{url}: its header announces no audio")
    if not _LOWEST_HZ <= sound.samplerate <= _HIGHEST_HZ:
        raise AudioError(f"{url}: a sample rate of {sound.samplerate} Hz in its header")
    if sound.frames > _MOST_SAMPLES_PER_BYTE * size:
        raise AudioError(f"{url}: {sound.frames} samples in its header, more than {size} bytes can hold")


def _check_is_whole(file: IO[bytes], url: str, size: int) -> None:
    """Compare a file's header with its size: libsndfile reads a truncated one, or one that claims 4 GB, as if whole."""
    start, length = _announced_audio(file, url, size)
    if start + length > size:
        raise AudioError(f"{url}: truncated: {max(0, size - start)} bytes of audio of {length} in its header")
    _check_ogg(file, url, size)
    file.seek(0)


def _announced_audio(file: IO[bytes], url: str, size: int) -> tuple[int, int]:
    """Return where the audio of a WAV, RF64, AIFF or AU begins, and how many bytes of it the header announces.

    (0, 0) for the rest: FLAC and mp3 announce samples, which are counted when they are decoded. Raises AudioError if
    the audio is not among the first chunks.
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
    for _ in range(_MOST_CHUNKS):
        if position + 8 > size:
            return 0, 0
        file.seek(position)
        name, length = file.read(4), number(order)
        if name == b"ds64":  # RF64 keeps lengths here that 32 bits cannot hold: of the file, then of the audio
            _, long_length = number(order, 8), number(order, 8)
        if name == audio:
            return position + 8, long_length if long_length and length == 0xFFFFFFFF else length
        position += 8 + length + length % 2
    raise AudioError(f"{url}: no audio in its first {_MOST_CHUNKS} chunks")


def _check_ogg(file: IO[bytes], url: str, size: int) -> None:
    """Refuse an Ogg file whose last page is cut, or is of none of the streams that begin at its start: of streams one
    after the other, libsndfile reads the first as if it were all. (RFC 3533, sections 4 and 6)"""
    file.seek(0)
    head = file.read(_OGG_PAGE_BYTES)
    if head[:4] != b"OggS":
        return
    file.seek(max(0, size - _OGG_PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if not segments or not page[5] & 4 or len(page) < 27 + page[26] + sum(segments):
        raise AudioError(f"{url}: truncated: its last page is missing")
    serials, at = set(), 0
    while len(head) >= at + 27 and head[at : at + 4] == b"OggS" and head[at + 5] & 2:
        serials.add(head[at + 14 : at + 18])
        at += 27 + head[at + 26] + sum(head[at + 27 : at + 27 + head[at + 26]])
    if page[14:18] not in serials:
        raise AudioError(f"{url}: several Ogg streams one after the other, of which only the first could be read")
