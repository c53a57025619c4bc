"""Codes to `.ecdc` bytes and back, and the codec fingerprint.

Format (EnCodec 0.1.1, `encodec/binary.py` and `encodec/compress.py`, without its language model): struct `!4sBI` =
magic `ECDC`, version 0, length of the JSON that follows; JSON `m` model name, `al` audio length in samples, `nc` number
of codebooks, `lm` false; then for each frame, for each codebook: 10 bits, least significant bit first, zero-padded to
a byte. Time-first order is the paper's flattening (section 3).

Q codebooks, T frames; codes are int16 in 0..1023 because 10 bits fit and batches stay small.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.errors import TokenError

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_FRAME = 320
FRAMES_PER_SECOND = 75
CODEBOOK_SIZE = 1024
KBPS_PER_CODEBOOK = 0.75
PUBLISHED_NAME = "encodec_24khz"
LONGEST_HEADER = 1024  # bytes; EnCodec writes fewer than 100, and a hostile stream may announce 4 GB

_HEADER = struct.Struct("!4sBI")
_BITS = 10


@dataclass(frozen=True)
class EcdcHeader:
    """What an `.ecdc` stream says of itself: model name, audio length in samples at 24 kHz, number of codebooks."""

    model_name: str
    audio_samples: int
    num_codebooks: int

    @property
    def num_frames(self) -> int:
        return num_frames(self.audio_samples)


def num_frames(audio_samples: int) -> int:
    """Return how many frames EnCodec makes of so many samples at 24 kHz (one per 320, the last one padded)."""
    return (audio_samples + SAMPLES_PER_FRAME - 1) // SAMPLES_PER_FRAME


def codebooks_for(bitrate_kbps: float) -> int:
    """Return Q for a bitrate: 0.75 kbps per codebook. Raises TokenError unless Q is a whole number from 1 to 32."""
    count = bitrate_kbps / KBPS_PER_CODEBOOK
    if count != int(count) or not 1 <= count <= 32:
        raise TokenError(f"bitrate_kbps={bitrate_kbps}: must be a multiple of 0.75 from 0.75 to 24")
    return int(count)


def model_name(fingerprint: str, published: bool) -> str:
    """Return the `m` of our streams: only EnCodec's published weights may call themselves `encodec_24khz`."""
    return PUBLISHED_NAME if published else f"{PUBLISHED_NAME}+{fingerprint[:8]}"


def write_ecdc(codes_QT: np.ndarray, audio_samples: int, name: str) -> bytes:
    """Pack codes_QT (any integer dtype, 0..1023) into an `.ecdc` stream.

    Raises:
        ValueError: a code outside 0..1023, or T that does not belong to `audio_samples`.
    """
    num_codebooks, frames = codes_QT.shape
    if frames != num_frames(audio_samples):
        raise ValueError(f"{frames} frames do not belong to {audio_samples} samples")
    if codes_QT.size and (codes_QT.min() < 0 or codes_QT.max() >= CODEBOOK_SIZE):
        raise ValueError(f"codes must lie in 0..{CODEBOOK_SIZE - 1}")
    meta = json.dumps({"m": name, "al": int(audio_samples), "nc": num_codebooks, "lm": False}).encode()
    flat = np.ascontiguousarray(codes_QT.T).reshape(-1).astype("<u2")
    bits = np.unpackbits(flat.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")[:, :_BITS]
    return _HEADER.pack(b"ECDC", 0, len(meta)) + meta + np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def read_ecdc_header(data: bytes, where: str) -> tuple[EcdcHeader, int]:
    """Read the header of an `.ecdc` stream; return it and the offset of the first code.

    Raises:
        TokenError: not an `.ecdc` stream, truncated, language-model coded, or a 48 kHz stream; names `where`.
    """
    if len(data) < _HEADER.size:
        raise TokenError(f"{where}: {len(data)} bytes, too short for an .ecdc header")
    magic, version, meta_size = _HEADER.unpack_from(data)
    if magic != b"ECDC" or version != 0:
        raise TokenError(f"{where}: not an .ecdc stream (version 0)")
    start = _HEADER.size + meta_size
    if start > LONGEST_HEADER:
        raise TokenError(f"{where}: broken .ecdc header: {meta_size} bytes long")
    if len(data) < start:
        raise TokenError(f"{where}: truncated in its header")
    try:
        meta = json.loads(data[_HEADER.size : start])
        facts = [meta[key] for key in ("m", "al", "nc", "lm")]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TokenError(f"{where}: broken .ecdc header") from None
    if [type(fact) for fact in facts] != [str, int, int, bool]:
        raise TokenError(f"{where}: broken .ecdc header: m, al, nc, lm = {facts}")
    *named, uses_language_model = facts
    header = EcdcHeader(*named)
    if uses_language_model:
        raise TokenError(f"{where}: entropy-coded by EnCodec's language model (lm: true); write it with use_lm=False")
    if header.model_name.split("+")[0] != PUBLISHED_NAME:
        raise TokenError(f"{where}: codec {header.model_name!r}; only {PUBLISHED_NAME} streams are read")
    if not 1 <= header.audio_samples < 1 << 63 or not 1 <= header.num_codebooks <= 32:
        raise TokenError(
            f"{where}: impossible header: {header.audio_samples} samples, {header.num_codebooks} codebooks"
        )
    return header, start


def check_ecdc_size(header: EcdcHeader, start: int, size: int, where: str) -> None:
    """Raise TokenError unless a stream whose codes begin at `start` has the size in bytes that its header promises."""
    expected = start + (header.num_frames * header.num_codebooks * _BITS + 7) // 8
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise TokenError(f"{where}: {state}: {size} bytes, expected {expected}")


def read_ecdc(data: bytes, where: str, num_codebooks: int | None = None) -> tuple[EcdcHeader, np.ndarray]:
    """Read an `.ecdc` stream.

    Args:
        data: the whole stream.
        where: its file or URL, for error messages.
        num_codebooks: keep the first so many codebooks (RVQ is nested); None keeps all.

    Returns:
        The header as stored, and codes_QT, int16 in 0..1023.

    Raises:
        TokenError: as `read_ecdc_header`, or the payload's size is not what the header promises, or too few codebooks.
    """
    header, start = read_ecdc_header(data, where)
    check_ecdc_size(header, start, len(data), where)
    if num_codebooks is not None and num_codebooks > header.num_codebooks:
        raise TokenError(f"{where}: holds {header.num_codebooks} codebooks, {num_codebooks} were asked for")
    codes_TQ = _unpack(data, start, header.num_frames * header.num_codebooks).reshape(
        header.num_frames, header.num_codebooks
    )
    return header, codes_TQ[:, :num_codebooks].T


def _unpack(data: bytes, start: int, count: int) -> np.ndarray:
    groups = (count + 3) // 4  # four codes lie in five bytes
    padded = np.zeros(groups * 5, dtype=np.uint8)
    payload = np.frombuffer(data, dtype=np.uint8, offset=start)
    padded[: len(payload)] = payload
    b = padded.reshape(-1, 5).astype(np.int16)
    out = np.empty((groups, 4), dtype=np.int16)
    out[:, 0] = b[:, 0] | (b[:, 1] & 0x03) << 8
    out[:, 1] = b[:, 1] >> 2 | (b[:, 2] & 0x0F) << 6
    out[:, 2] = b[:, 2] >> 4 | (b[:, 3] & 0x3F) << 4
    out[:, 3] = b[:, 3] >> 6 | b[:, 4] << 2
    return out.reshape(-1)[:count]


def codec_fingerprint(settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return sha256 (hex) over a codec's settings and weights: two codecs with equal fingerprints give equal meaning
    to every code, so loaders, checkpoints and fine-tuning refuse a mismatch.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
