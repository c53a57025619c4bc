"""Any recording to 24 kHz mono: soundfile decodes, soxr resamples. What cannot be trusted raises AudioError."""

import struct
from typing import IO

import numpy as np
import soundfile
import soxr

from megascale import storage
from megascale.errors import AudioError
from megascale.tokens import SAMPLE_RATE_HZ


def probe_seconds(url: str) -> float:
    """Return a recording's length from its header, in seconds. Raises AudioError or StorageError naming the URL."""
    with storage.open_read(url) as file, _open(file, url) as sound:
        return sound.frames / sound.samplerate


def read_clip(url: str, start_seconds: float = 0.0, duration_seconds: float | None = None) -> np.ndarray:
    """Read a stretch of a recording as 24 kHz mono; only that stretch is decoded.

    Args:
        url: the recording; wav, flac, ogg or mp3, at any rate and channel count.
        start_seconds: where the stretch begins.
        duration_seconds: its length; None reads to the end.

    Returns:
        float32 samples of shape (S,), S = round(24000 x seconds read).

    Raises:
        AudioError: not audio, truncated, empty, not finite, or too short for the stretch; names the URL.
        StorageError: cannot be read at all.
    """
    with storage.open_read(url) as file, _open(file, url) as sound:
        rate = sound.samplerate
        first = round(start_seconds * rate)
        wanted = sound.frames - first if duration_seconds is None else round(duration_seconds * rate)
        # a cut may be planned from a length rounded up by less than a sample
        wanted = min(wanted, sound.frames - first) if first + wanted - sound.frames <= 1 else wanted
        if first + wanted > sound.frames or wanted < 1:
            raise AudioError(f"{url}: {sound.frames / rate:.3f} s long, no samples at {start_seconds:.3f} s or too few")
        try:
            sound.seek(first)
            samples_SC = sound.read(wanted, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as failure:
            raise AudioError(f"{url}: cannot be decoded: {failure}") from None
    if len(samples_SC) != wanted:
        raise AudioError(f"{url}: truncated: {len(samples_SC)} samples could be decoded of {wanted}")
    mono_S = samples_SC.mean(axis=1)
    if not np.isfinite(mono_S).all():
        raise AudioError(f"{url}: holds samples that are not finite numbers")
    if rate != SAMPLE_RATE_HZ:
        mono_S = soxr.resample(mono_S, rate, SAMPLE_RATE_HZ)
    if not len(mono_S):
        raise AudioError(f"{url}: no samples left at {SAMPLE_RATE_HZ} Hz")
    return np.ascontiguousarray(mono_S, dtype=np.float32)


def _open(file: IO[bytes], url: str) -> soundfile.SoundFile:
    _check_wav_is_whole(file, url)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as failure:
        reason = str(failure).rpartition(": ")[2]
        raise AudioError(f"{url}: not an audio file: {reason}") from None
    if sound.frames < 1 or sound.samplerate < 1:
        sound.close()
        raise AudioError(f"{url}: its header announces no audio")
    return sound


def _check_wav_is_whole(file: IO[bytes], url: str) -> None:
    """libsndfile reads a truncated WAV, or one that claims 4 GB, as if it were whole; compare the header with the size."""
    file.seek(0, 2)
    size = file.tell()
    file.seek(0)
    if size == 0:
        raise AudioError(f"{url}: an empty file")
    if file.read(4) == b"RIFF":
        position = 12
        while position + 8 <= size:
            file.seek(position)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                if position + 8 + length > size:
                    present = size - position - 8
                    raise AudioError(f"{url}: truncated: {present} bytes of audio of {length} in its header")
                break
            position += 8 + length + length % 2
    file.seek(0)
