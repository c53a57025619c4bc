"""EnCodec's encoder and quantizer: in tiles on a CPU, over whole clips at once on a GPU.

On a CPU the codes are those of `encodec` 0.1.1 on one thread, bit by bit, in an order that suits caches. `encodec` runs
one layer over a whole clip before the next: 30 MB of activations come from memory and go back at every layer. Here the
convolutions, which are all causal, run over 0.85 s at a time, each keeping the few columns that its next tile needs, and
weight norm is computed once. Every sum is taken over the same terms in the same order, by the same kernels of oneDNN,
so that tiles change nothing (tested at many lengths). Memory does not grow with a clip's length.

Legend: S samples, T frames (or what stands for them inside: columns), C channels, D = 128 latent width, Q codebooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megascale.errors import ConfigError
from megascale.tokens import SAMPLES_PER_FRAME

# samples: few enough for the widest layer's activations to stay in the cache, and as many as make torch take oneDNN's
# kernel for the first layer; up to 20,480 numbers it has one of its own, which rounds otherwise on CPUs without AVX-512
# (`use_mkldnn` in its Convolution.cpp)
_TILE = 64 * SAMPLES_PER_FRAME
_SEGMENT = 12 * _TILE  # the deepest layers and the LSTM have few columns and large weights: more columns at a time

_MOST_SAMPLES = 640 * 75 * SAMPLES_PER_FRAME  # at once on a GPU, whose first layer makes 128 bytes of each
MOST_CHANGED = 0.005  # share of codebook 0's codes that a lower precision may change

Memory = dict["_Conv", torch.Tensor]  # of one clip: the last columns that each convolution has seen


class TiledEncoder:
    """Encodes with the weights of an `encodec.EncodecModel`, which are not to change or move afterwards."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        *layers, self._lstm, self._last = _layers(model.encoder)
        self._shallow, self._deep = layers[:-2], layers[-2:]
        self._codebooks = [layer.codebook for layer in model.quantizer.vq.layers]

    @torch.inference_mode()
    def encode(self, audio_S: np.ndarray, num_codebooks: int) -> np.ndarray:
        """Encode a clip of any length: float32 24 kHz mono, (S,). Returns codes_QT, int16."""
        with _one_thread():
            parts = [self._quantize(latent_DT, num_codebooks) for latent_DT in self._latents(audio_S)]
        return torch.cat(parts, dim=1).numpy()

    def _latents(self, audio_S: np.ndarray) -> Iterator[torch.Tensor]:
        memory: Memory = {}
        state = None
        for segment_11S in _pieces(torch.from_numpy(audio_S)[None, None], _SEGMENT):
            tiles = [_run(self._shallow, tile_11S, memory) for tile_11S in _pieces(segment_11S, _TILE)]
            hidden_1CT = _run(self._deep, torch.cat(tiles, dim=2), memory)
            hidden_T1C = hidden_1CT.permute(2, 0, 1)
            mixed_T1C, state = self._lstm(hidden_T1C, state)
            yield self._last((mixed_T1C + hidden_T1C).permute(1, 2, 0), memory)[0]

    def _quantize(self, latent_DT: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        codes_QT = torch.empty(num_codebooks, latent_DT.shape[1], dtype=torch.int16)
        residual_DT = latent_DT
        for q, codebook_VD in enumerate(self._codebooks[:num_codebooks]):
            # squared distances, as |x|^2 - 2 x.e + |e|^2
            distance_TV = (2 * residual_DT.t()) @ codebook_VD.t()
            torch.sub(residual_DT.t().pow(2).sum(1, keepdim=True), distance_TV, out=distance_TV)
            distance_TV += codebook_VD.t().pow(2).sum(0, keepdim=True)
            nearest_T = distance_TV.argmin(dim=1)
            codes_QT[q] = nearest_T
            residual_DT = residual_DT - codebook_VD[nearest_T].t()
        return codes_QT


class BatchedEncoder:
    """`encodec`'s own encoder and quantizer over clips of equal length at once, never padded: what a GPU wants."""

    def __init__(self, model: Any, device: str, precision: str) -> None:
        torch.backends.cudnn.allow_tf32 = False  # on by default, and not what fp32 says
        self._model = model.to(device)
        self._device, self._precision = device, precision
        self.is_checked = precision == "fp32"

    def encode(self, clips: Sequence[np.ndarray], num_codebooks: int) -> list[np.ndarray]:
        """Encode clips: float32 24 kHz mono, (S,) each. Returns codes_QT, int16, of each."""
        return self._encode(clips, num_codebooks, self._precision)

    def shares_changed(self, clips: Sequence[np.ndarray], num_codebooks: int) -> tuple[float, float]:
        """Encode clips in fp32 too. Returns the share of codes that the precision changes: of codebook 0, and of all."""
        exact = np.concatenate(self._encode(clips, num_codebooks, "fp32"), axis=1)
        changed_QN = exact != np.concatenate(self.encode(clips, num_codebooks), axis=1)
        return float(changed_QN[0].mean()), float(changed_QN.mean())

    def check_precision(self, clips: Sequence[np.ndarray], num_codebooks: int) -> tuple[float, float]:
        """Return `shares_changed`, and let the precision be used.

        Once is enough for a process: what it depends on, the device and its libraries, stays.

        Raises ConfigError if it changes more than 0.5% of codebook 0's codes.
        """
        first, every = self.shares_changed(clips, num_codebooks)
        if first > MOST_CHANGED:
            raise ConfigError(
                f"tokenize.codec.precision={self._precision}: changes {first:.2%} of codebook 0's codes on this device "
                f"({MOST_CHANGED:.1%} are allowed); use fp32, in another tokenize.output.url"
            )
        self.is_checked = True
        return first, every

    @torch.inference_mode()
    def _encode(self, clips: Sequence[np.ndarray], num_codebooks: int, precision: str) -> list[np.ndarray]:
        places: dict[int, list[int]] = {}
        for i, clip_S in enumerate(clips):
            places.setdefault(len(clip_S), []).append(i)
        encoded: dict[int, np.ndarray] = {}
        groups = [group for same in places.values() for group in _split(same, _MOST_SAMPLES // len(clips[same[0]]))]
        for same in groups:
            audio_BS = torch.from_numpy(np.stack([clips[i] for i in same])).to(self._device)
            with torch.autocast(self._device, torch.bfloat16, enabled=precision == "bf16"):
                latent_BDT = self._model.encoder(audio_BS[:, None])
            # distances in fp32: in bf16 the nearest code would be a matter of chance
            codes_QBT = self._model.quantizer.vq.encode(latent_BDT.float(), n_q=num_codebooks)
            codes_BQT = codes_QBT.permute(1, 0, 2).to(torch.int16).cpu().numpy()
            encoded |= dict(zip(same, codes_BQT, strict=True))
        return [encoded[i] for i in range(len(clips))]


def _split(places: list[int], most: int) -> list[list[int]]:
    size = max(1, most)
    return [places[i : i + size] for i in range(0, len(places), size)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads share a layer's columns, and round otherwise where their shares meet: codes would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pieces(x_BCT: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Cut columns to pieces of `size`; the last takes the rest too, because kernels treat a few columns otherwise."""
    columns = x_BCT.shape[2]
    count = max(1, columns // size)
    for n in range(count):
        yield x_BCT[..., n * size : (n + 1) * size if n < count - 1 else columns]


def _run(layers: Sequence[Any], x_1CT: torch.Tensor, memory: Memory) -> torch.Tensor:
    for layer in layers:
        x_1CT = layer(x_1CT, memory)
    return x_1CT


class _Conv:
    """A causal convolution, with the ELU before it; a clip's start is reflected. (`encodec`'s SConv1d)"""

    def __init__(self, layer: Any, after_elu: bool) -> None:
        conv = layer.conv.conv
        assert layer.causal and layer.pad_mode == "reflect" and conv.dilation == (1,), "EnCodec 24 kHz's encoder"
        self._weight = torch._weight_norm(conv.weight_v, conv.weight_g)
        self._bias = conv.bias.clone()
        (self._stride,) = conv.stride
        self._before = conv.kernel_size[0] - self._stride  # columns that a tile needs of what was before it
        self._after_elu = after_elu

    def __call__(self, x_1CT: torch.Tensor, memory: Memory) -> torch.Tensor:
        if self._before:
            x_1CT = self._padded(x_1CT, memory.get(self))
            memory[self] = x_1CT[..., x_1CT.shape[2] - self._before :].clone()
        # over the padding too, because ELU's kernel rounds otherwise where a row ends
        if self._after_elu:
            x_1CT = F.elu(x_1CT, inplace=self._before > 0)
        return F.conv1d(x_1CT, self._weight, self._bias, stride=self._stride)

    def _padded(self, x_1CT: torch.Tensor, before_1CT: torch.Tensor | None) -> torch.Tensor:
        before, columns = self._before, x_1CT.shape[2]
        after = -columns % self._stride  # more than 0 in a clip's last tile alone
        # a clip too short to be reflected is first made longer with zeros
        missing = max(0, max(before, after) + 1 - columns) if before_1CT is None else 0
        padded_1CT = x_1CT.new_empty(1, x_1CT.shape[1], before + columns + missing + after)
        end = before + columns + missing
        padded_1CT[..., before : before + columns] = x_1CT
        padded_1CT[..., before + columns : end] = 0
        padded_1CT[..., :before] = (
            padded_1CT[..., before + 1 : 2 * before + 1].flip(2) if before_1CT is None else before_1CT
        )
        padded_1CT[..., end:] = padded_1CT[..., end - 1 - after : end - 1].flip(2)
        return padded_1CT[..., : padded_1CT.shape[2] - missing].contiguous()


class _Residual:
    """Two convolutions, each after an ELU, beside a third as the way past them. (`encodec`'s SEANetResnetBlock)"""

    def __init__(self, block: Any) -> None:
        _, wide, _, narrow = block.block
        self._wide, self._narrow = _Conv(wide, after_elu=True), _Conv(narrow, after_elu=True)
        self._shortcut = _Conv(block.shortcut, after_elu=False)

    def __call__(self, x_1CT: torch.Tensor, memory: Memory) -> torch.Tensor:
        return self._shortcut(x_1CT, memory).add_(self._narrow(self._wide(x_1CT, memory), memory))


def _layers(encoder: Any) -> Iterator[Any]:
    """Yield an `encodec` encoder's layers, each ELU as part of the convolution that it comes before."""
    after_elu = False
    for layer in encoder.model:
        name = type(layer).__name__
        if name == "SConv1d":
            yield _Conv(layer, after_elu)
        elif name == "SEANetResnetBlock":
            yield _Residual(layer)
        elif name == "SLSTM":
            yield layer.lstm
        else:
            assert name == "ELU", f"{name}: not a layer of EnCodec 24 kHz's encoder"
        after_elu = name == "ELU"
