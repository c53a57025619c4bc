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
from typing import Any, TypeVar

import numpy as np

from megascale.errors import TokenError

SAMPLE_RATE_HZ = 24_000
SAMPLES_PER_FRAME = 320
FRAMES_PER_SECOND = 75
CODEBOOK_SIZE = 1024
KBPS_PER_CODEBOOK = 0.75
PUBLISHED_NAME = "encodec_24khz"
LONGEST_HEADER = 1024  # bytes; EnCodec writes fewer than 100, and a hostile stream may announce 4 GB

Count = TypeVar("Count", int, np.ndarray)

_HEADER = struct.Struct("!4sBI")
_BITS = 10
_BLOCK_WORDS = 1 << 15  # a block and its scratch fit a core's cache, and a call's own cost is small beside it
_SPARE_BYTES = 8  # read together with the last codes
_CODE = np.uint64(0x3FF)
_SPREAD = [
    tuple(np.uint64(n) for n in facts)
    for facts in ((12, 0xFFFFF, 0xFFFFF << 32), (6, 0x3FF | 0x3FF << 32, 0x3FF << 16 | 0x3FF << 48))
]


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
    codes = np.zeros(-(-codes_QT.size // 4) * 4, dtype="<i2")
    codes[: codes_QT.size] = codes_QT.T.reshape(-1)
    payload = pack(codes)[: payload_bytes(codes_QT.size)]
    return _HEADER.pack(b"ECDC", 0, len(meta)) + meta + payload.tobytes()


def payload_bytes(num_codes: Count) -> Count:
    """Return how many bytes so many codes take; of an array, for each."""
    return (num_codes * _BITS + 7) // 8


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
    expected = start + payload_bytes(header.num_frames * header.num_codebooks)
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
    count = header.num_frames * header.num_codebooks
    words = code_words(data[start:] + bytes(_SPARE_BYTES), (1, -(-count // 4)), (0, 5))
    codes_TQ = unpack(words)[0, :count].reshape(header.num_frames, header.num_codebooks)
    return header, codes_TQ[:, :num_codebooks].T


def pack(codes: np.ndarray) -> np.ndarray:
    """Pack groups of four codes (any integer dtype, 0..1023, (..., 4 n)) into five bytes each, uint8 (..., 5 n)."""
    lanes = np.ascontiguousarray(codes, dtype="<i2").view("<u8")
    words = lanes & _CODE
    for k in (1, 2, 3):
        words |= (lanes >> np.uint64(6 * k)) & (_CODE << np.uint64(10 * k))
    octets = words.view(np.uint8).reshape(*words.shape, 8)[..., :5]
    return octets.reshape(*codes.shape[:-1], -1)


def code_words(data: bytes, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Look at packed bytes as little-endian words of four codes each, at any place, without copying.

    A word is read as 8 bytes, of which 5 are its own: 3 more have to follow the last one.
    """
    return np.ndarray(shape, dtype="<u8", buffer=data, strides=strides)


def unpack(words: np.ndarray, shifts: np.ndarray | None = None) -> np.ndarray:
    """Unpack four codes from the low 40 bits of each word.

    Args:
        words: (N, G), such as `code_words` gives; whatever stands above the 40 bits is ignored.
        shifts: uint64 (N, 1), by how many bits, 0 to 24, the codes of a row begin later than its words.

    Returns:
        int16 (N, 4 G), each 0..1023.
    """
    rows, groups = words.shape
    out = np.empty((rows, groups), dtype="<u8")
    block = max(1, _BLOCK_WORDS // max(1, groups))
    scratch = np.empty((min(block, rows), groups), dtype="<u8")
    for first in range(0, rows, block):
        lanes = out[first : first + block]
        moved = scratch[: len(lanes)]
        np.copyto(lanes, words[first : first + block])
        if shifts is not None:
            lanes >>= shifts[first : first + block]
        # 40 bits to two of 20, each in a half of its own, then to four of 10: fewer passes than code by code
        for shift, low, high in _SPREAD:
            np.left_shift(lanes, shift, out=moved)
            moved &= high
            lanes &= low
            lanes |= moved
    return out.view("<i2")


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
