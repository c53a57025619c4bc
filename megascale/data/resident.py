"""The codes of many clips in one tensor: on the host as int16, from which batches are copied; on a GPU packed, 10 bits
a code, from which they are gathered and unpacked there.

B clips, T frames, Q codebooks. Every rank holds its own; nothing is shared between them.
"""

from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from megascale.data.folder import TokenFolder
from megascale.data.packed import gather_codes, pack_clips, packed_bytes, padded, select_frames
from megascale.data.transforms import on_device
from megascale.errors import ConfigError
from megascale.log import Progress, local_rank, local_world_size

Where = Literal["cpu", "gpu"]
_PART_CLIPS = 256
_CODE_BYTES = 2  # int16


class ResidentTokens:
    """Some clips of a folder, the first Q codebooks alone."""

    def __init__(self, folder: TokenFolder, clips: np.ndarray, device: torch.device, title: str = "") -> None:
        """Read these clips (numbers in the folder), which takes their shards' hashes to be right.

        `title` is the progress line's; an empty one shows none. Raises as `TokenFolder.codes`.
        """
        self.device, self._num_codebooks = device, folder.num_codebooks
        where: Where = "cpu" if device.type == "cpu" else "gpu"
        sizes_N = _clip_bytes(folder, clips, where)
        self._offset_N = np.full(len(folder), -1, dtype=np.int64)  # bytes
        self._offset_N[clips] = np.cumsum(sizes_N) - sizes_N
        self._data = torch.empty(int(sizes_N.sum()), dtype=torch.uint8, device=device)
        progress, done, end = Progress(title, len(clips), unit="clips"), 0, 0
        for part in folder.sweep(clips, _PART_CLIPS):
            codes_BTQ, frames_B = folder.whole(part), folder.frames_N[part]
            held = pack_clips(codes_BTQ, frames_B) if where == "gpu" else _joined(codes_BTQ, frames_B).view(np.uint8)
            self._data[end : end + len(held)] = torch.from_numpy(held).to(device)
            done, end = done + len(part), end + len(held)
            progress.update(done)
        progress.close()
        self._view = self._data.numpy().data if where == "cpu" else None

    def take(self, clips_B: np.ndarray, starts_B: Tensor, lengths_B: np.ndarray, kept_BT: Tensor) -> Tensor:
        """Return codes_BTQ, int64, of frames kept_BT (int64, ascending) of the stretch of each clip that begins at
        starts_B and is lengths_B long; as `TokenFolder.take`, on this device."""
        if self._view is not None:
            return select_frames(self.codes(clips_B, starts_B.numpy(), lengths_B), kept_BT)
        offsets_B = on_device(self._offsets(clips_B), self.device)
        return gather_codes(self._data, offsets_B, starts_B[:, None] + kept_BT, self._num_codebooks)

    def codes(self, clips_B: np.ndarray, starts_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Return codes_BTQ, int16, on the host, as `TokenFolder.codes`; only where the clips are held there."""
        view = self._view
        assert view is not None, "codes on a GPU are made by `take`"
        frame_bytes = self._num_codebooks * _CODE_BYTES
        first_B = self._offsets(clips_B) + starts_B * frame_bytes
        ends_B = first_B + lengths_B * frame_bytes
        data = bytearray().join([view[start:end] for start, end in zip(first_B.tolist(), ends_B.tolist(), strict=True)])
        return padded(np.frombuffer(data, dtype=np.int16).reshape(-1, self._num_codebooks), lengths_B)

    def _offsets(self, clips_B: np.ndarray) -> np.ndarray:
        offsets_B = self._offset_N[clips_B]
        assert (offsets_B >= 0).all(), "only clips that are held are asked for"
        return offsets_B


def resident_bytes(folder: TokenFolder, clips: np.ndarray, where: Where) -> int:
    """Return how many bytes `ResidentTokens` of these clips takes for codes."""
    return int(_clip_bytes(folder, clips, where).sum())


def check_room(num_bytes: int, where: Where, training_bytes: int) -> None:
    """Raise ConfigError unless every rank of this machine has room for so many bytes, as things are now; on another rank's
    machine or GPU it may be otherwise.

    `training_bytes`: what a rank's training takes besides, on its device.
    """
    key = f"data.resident={where}"
    if where == "gpu":
        if not torch.cuda.is_available():
            raise ConfigError(f"{key}: there is no CUDA GPU here")
        free, each = torch.cuda.mem_get_info(local_rank())[0], "on each GPU"
    else:
        free, each = psutil.virtual_memory().available // local_world_size(), f"for each of {local_world_size()} ranks"
    if num_bytes + training_bytes > free:
        failure = ConfigError(
            f"{key}: the training clips take {num_bytes / 1e9:.2f} GB {each}, training about {training_bytes / 1e9:.2f} GB, "
            f"and {free / 1e9:.2f} GB are free; leave it out, or read a lower data.bitrate_kbps"
        )
        failure.on_every_rank, failure.of_own_device = False, where == "gpu"
        raise failure


def _clip_bytes(folder: TokenFolder, clips: np.ndarray, where: Where) -> np.ndarray:
    counts_N = folder.frames_N[clips].astype(np.int64) * folder.num_codebooks
    return packed_bytes(counts_N) if where == "gpu" else counts_N * _CODE_BYTES


def _joined(codes_BTQ: np.ndarray, frames_B: np.ndarray) -> np.ndarray:
    """Return the clips' codes one after the other, without what pads them, int16."""
    return codes_BTQ[np.arange(codes_BTQ.shape[1]) < frames_B[:, None]].reshape(-1)
