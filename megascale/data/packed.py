"""Stretches of many clips out of packed codes, without a Python object or a loop for each clip's codes.

B clips, T frames of the longest stretch, K codebooks stored, Q of them wanted. A frame takes 10 K bits. Where K is a
multiple of four, frames are whole words of four codes, and words of nothing but unwanted codebooks are passed over.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megascale.tokens import code_words, pack, unpack

SPARE_BYTES = 16  # so many may be read beyond a clip's last code


def stretch_bytes(num_stored: int, starts_B: np.ndarray, lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which bytes of each clip's codes `unpack_stretches` needs: offsets_B and sizes_B, int64.

    They may end up to SPARE_BYTES after the clip.
    """
    if num_stored % 4 == 0:
        frame_bytes = num_stored // 4 * 5
        return starts_B * frame_bytes, lengths_B * frame_bytes
    return starts_B * num_stored * 10 // 8, _words(num_stored, lengths_B) * 5


def _words(num_stored: int, lengths_B: np.ndarray) -> np.ndarray:
    # one more than the codes fill: where they begin within a byte, the last ones end in it
    return -(-lengths_B * num_stored // 4) + 1


def unpack_stretches(
    pieces: Sequence[bytes | memoryview], num_stored: int, num_wanted: int, starts_B: np.ndarray, lengths_B: np.ndarray
) -> np.ndarray:
    """Unpack frames starts_B .. starts_B + lengths_B of each clip.

    Args:
        pieces: the bytes that `stretch_bytes` named.
        num_stored: K.
        num_wanted: Q, the first so many codebooks.
        starts_B: int64; only where the first code lies within its byte is made of it.
        lengths_B: int64, frames.

    Returns:
        codes_BTQ, int16 in 0..1023; padding holds 0.
    """
    data = b"".join([*pieces, bytes(SPARE_BYTES)])
    clips, longest = len(lengths_B), int(lengths_B.max())
    same = int(lengths_B.min()) == longest
    if num_stored % 4 == 0:
        shape = int(lengths_B.sum()), -(-num_wanted // 4)
        return padded(unpack(code_words(data, shape, (num_stored // 4 * 5, 5)))[:, :num_wanted], lengths_B)
    words_B, shifts_B = _words(num_stored, lengths_B), (starts_B * num_stored * 10 % 8).astype("<u8")
    if same:
        words = code_words(data, (clips, int(words_B[0]) - 1), (int(words_B[0]) * 5, 5))
        codes = unpack(words, shifts_B[:, None] if shifts_B.any() else None)[:, : longest * num_stored]
        return codes.reshape(clips, longest, num_stored)[..., :num_wanted]
    codes = unpack(code_words(data, (int(words_B.sum()), 1), (5, 5)), np.repeat(shifts_B, words_B)[:, None]).reshape(-1)
    first_B = 4 * (np.cumsum(words_B) - words_B)
    counts_B = lengths_B * num_stored
    own = np.concatenate([codes[a : a + n] for a, n in zip(first_B.tolist(), counts_B.tolist(), strict=True)])
    return padded(own.reshape(-1, num_stored)[:, :num_wanted], lengths_B)


def padded(rows_NQ: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """Return codes_BTQ of clips whose frames lie one after the other in rows_NQ; padding holds 0."""
    longest = int(lengths_B.max())
    if int(lengths_B.min()) == longest:
        return rows_NQ.reshape(len(lengths_B), longest, rows_NQ.shape[1])
    codes_BTQ = np.zeros((len(lengths_B), longest, rows_NQ.shape[1]), dtype=np.int16)
    codes_BTQ[np.arange(codes_BTQ.shape[1]) < lengths_B[:, None]] = rows_NQ
    return codes_BTQ


def select_frames(codes_BTQ: np.ndarray, kept_BT: Tensor) -> Tensor:
    """Return the kept frames of each clip, int64 (B, T, Q): all, or those whose numbers kept_BT (int64) gives."""
    codes = torch.from_numpy(codes_BTQ)
    clips, frames, num_codebooks = codes.shape
    if kept_BT.shape[1] < frames:
        rows_BT = kept_BT + frames * torch.arange(clips)[:, None]
        codes = codes.reshape(clips * frames, num_codebooks).index_select(0, rows_BT.reshape(-1))
    return codes.reshape(clips, -1, num_codebooks).long()


def gather_codes(data: Tensor, offsets_B: Tensor, frames_BT: Tensor, num_codebooks: int) -> Tensor:
    """Return codes_BTQ, int64, of any frames of clips whose packed codes lie in a tensor, on its device.

    Args:
        data: uint8, packed.
        offsets_B: int64, where each clip's codes begin in `data`.
        frames_BT: int64, numbers of frames in their clip.
        num_codebooks: Q, all that are stored.
    """
    code_BTQ = frames_BT[..., None] * num_codebooks + torch.arange(num_codebooks, device=data.device)
    # 10 j bits are j bytes and 2 j bits: a code lies in two bytes, and the fourth of a word ends with its fifth byte
    byte_BTQ = offsets_B[:, None, None] + code_BTQ + (code_BTQ >> 2)
    pair_BTQ = data[byte_BTQ].long() | data[byte_BTQ + 1].long() << 8
    return pair_BTQ >> 2 * (code_BTQ & 3) & 0x3FF


def packed_bytes(num_codes_B: np.ndarray) -> np.ndarray:
    """Return how many bytes `pack_clips` makes of clips of so many codes (int64): whole groups of four codes."""
    return -(-num_codes_B // 4) * 5


def pack_clips(codes_BTQ: np.ndarray, frames_B: np.ndarray) -> np.ndarray:
    """Pack clips one after the other, each from a byte of its own on, uint8, as `gather_codes` reads them."""
    clips, longest, num_codebooks = codes_BTQ.shape
    codes = np.zeros((clips, -(-longest * num_codebooks // 4) * 4), dtype=np.int16)
    codes[:, : longest * num_codebooks] = codes_BTQ.reshape(clips, -1)
    packed = pack(codes)
    # a clip that is shorter than the longest is followed by zeros, of which only its last group's stay
    return packed[np.arange(packed.shape[1]) < packed_bytes(frames_B.astype(np.int64) * num_codebooks)[:, None]]
