"""The packed codes of many clips in one tensor, on the host or on a GPU: batches are gathered, unpacked and cut there.

B clips, T frames, Q codebooks. Every rank holds its own; nothing is shared between them.
"""

from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from megascale.data.folder import TokenFolder
from megascale.data.packed import SPARE_BYTES, gather_codes, select_frames, stretch_bytes, unpack_stretches
from megascale.data.transforms import on_device
from megascale.errors import ConfigError
from megascale.log import Progress, local_rank, local_world_size
from megascale.tokens import pack

_PART_CLIPS = 256


class ResidentTokens:
    """Some clips of a folder, the first Q codebooks alone, each beginning at a byte of its own."""

    def __init__(self, folder: TokenFolder, clips: np.ndarray, device: torch.device, title: str = "") -> None:
        """Read and repack these clips (numbers in the folder), which takes their shards' hashes to be right.

        `title` is the progress line's; an empty one shows none. Raises as `TokenFolder.codes`.
        """
        self.device, self._num_codebooks = device, folder.num_codebooks
        sizes_N = _clip_bytes(folder, clips)
        self._offset_N = np.full(len(folder), -1, dtype=np.int64)
        self._offset_N[clips] = np.cumsum(sizes_N) - sizes_N
        self._data = torch.zeros(resident_bytes(folder, clips), dtype=torch.uint8, device=device)
        progress, done, end = Progress(title, len(clips), unit="clips"), 0, 0
        for part in folder.sweep(clips, _PART_CLIPS):
            packed = torch.from_numpy(_repack(folder.whole(part), folder.frames_N[part]))
            self._data[end : end + len(packed)] = packed.to(device)
            done, end = done + len(part), end + len(packed)
            progress.update(done)
        progress.close()
        self._view = self._data.numpy().data if device.type == "cpu" else None

    def take(self, clips_B: np.ndarray, starts_B: Tensor, lengths_B: np.ndarray, kept_BT: Tensor) -> Tensor:
        """Return codes_BTQ, int64, of frames kept_BT (int64, ascending) of the stretch of each clip that begins at
        starts_B and is lengths_B long; as `TokenFolder.take`, on this device."""
        offsets_B = self._offset_N[clips_B]
        assert (offsets_B >= 0).all(), "only clips that are held are asked for"
        if self._view is not None:
            return select_frames(self.codes(clips_B, starts_B.numpy(), lengths_B), kept_BT)
        return gather_codes(
            self._data, on_device(offsets_B, self.device), starts_B[:, None] + kept_BT, self._num_codebooks
        )

    def codes(self, clips_B: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Return codes_BTQ, int16, on the host, as `TokenFolder.codes`; only where the clips are held there."""
        assert self._view is not None, "codes on a GPU are made by `take`"
        offsets_B, sizes_B = stretch_bytes(self._num_codebooks, starts_B, lengths_B)
        offsets_B += self._offset_N[clips_B]
        ends_B, view = offsets_B + sizes_B, self._view
        pieces = [view[start:end] for start, end in zip(offsets_B.tolist(), ends_B.tolist(), strict=True)]
        return unpack_stretches(pieces, self._num_codebooks, self._num_codebooks, starts_B, lengths_B)


def resident_bytes(folder: TokenFolder, clips: np.ndarray) -> int:
    """Return how many bytes `ResidentTokens` of these clips takes for codes."""
    return int(_clip_bytes(folder, clips).sum()) + SPARE_BYTES


def check_room(num_bytes: int, where: Literal["cpu", "gpu"]) -> None:
    """Raise ConfigError unless every rank of this machine has room for so many bytes, as things are now."""
    key = f"data.resident={where}"
    if where == "gpu":
        if not torch.cuda.is_available():
            raise ConfigError(f"{key}: there is no CUDA GPU here")
        free, each = torch.cuda.mem_get_info(local_rank())[0], "on each GPU"
    else:
        free, each = psutil.virtual_memory().available // local_world_size(), f"for each of {local_world_size()} ranks"
    if num_bytes > free:
        raise ConfigError(
            f"{key}: the training clips take {num_bytes / 1e9:.2f} GB {each}, and {free / 1e9:.2f} GB are free; leave it "
            "out, or read a lower data.bitrate_kbps"
        )


def _clip_bytes(folder: TokenFolder, clips: np.ndarray) -> np.ndarray:
    # whole groups of four codes
    return -(-folder.frames_N[clips].astype(np.int64) * folder.num_codebooks // 4) * 5


def _repack(codes_BTQ: np.ndarray, frames_B: np.ndarray) -> np.ndarray:
    """Pack clips one after the other, each from a byte of its own on, uint8."""
    clips, longest, num_codebooks = codes_BTQ.shape
    counts_B = frames_B.astype(np.int64) * num_codebooks
    codes = np.zeros((clips, -(-longest * num_codebooks // 4) * 4), dtype=np.int16)
    codes[:, : longest * num_codebooks] = codes_BTQ.reshape(clips, -1)
    packed = pack(codes)
    # a clip that is shorter than the longest is followed by zeros, of which only its last group's stay
    return packed[np.arange(packed.shape[1]) < (-(-counts_B // 4) * 5)[:, None]]
