"""EnCodec's encoder and quantizer: in tiles on a CPU, over whole clips at once on a GPU.

On a CPU it is the arithmetic of `encodec` 0.1.1 in an order that suits caches. `encodec` runs one layer over a whole
clip before the next: 30 MB of activations come from memory and go back at every layer, and half of the time goes there.
Here the convolutions, which are all causal, run over a second at a time, each keeping the few columns that its next
tile needs; activations lie time-first, so that no library reorders them; weight norm is folded away. Only the LSTM,
whose weights are large, takes several clips at once, always as many rows, so that a clip's codes don't depend on the
clips beside it (tested; it rests on the machine's product of matrices treating rows alike). Memory does not grow with a
clip's length.

Legend: S samples, T frames (or what stands for them inside: columns), C channels, R rows of the LSTM, D = 128 latent
width, Q codebooks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megascale.errors import ConfigError
from megascale.tokens import SAMPLES_PER_FRAME

_TILE = 75 * SAMPLES_PER_FRAME  # samples: what a second makes of the widest layer stays in the cache
_TILES_PER_SEGMENT = 10  # the deepest layers and the LSTM have few columns and large weights: more columns at a time
_ROWS = 4  # always so many, because a product of fewer rows is slower and rounds otherwise

_MOST_SAMPLES = 640 * 75 * SAMPLES_PER_FRAME  # at once on a GPU, whose first layer makes 128 bytes of each
_MOST_CHANGED = 0.005  # share of codebook 0's codes that a lower precision may change

Memory = dict["_Conv", torch.Tensor]  # of one clip: the last columns that each convolution has seen


class TiledEncoder:
    """Encodes with the weights of an `encodec.EncodecModel`, which are not to change or move afterwards."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        *layers, self._lstm, self._last = _layers(model.encoder)
        self._shallow, self._deep = layers[:-2], layers[-2:]
        # |x - e|^2 is least where x.e - |e|^2 / 2 is greatest, and that is one product
        codebooks_VD = [layer.codebook for layer in model.quantizer.vq.layers]
        self._codebooks = [(e_VD.clone(), e_VD.t().contiguous(), e_VD.pow(2).sum(1) / -2) for e_VD in codebooks_VD]

    @torch.inference_mode()
    def encode(self, clips: Sequence[np.ndarray], num_codebooks: int) -> list[np.ndarray]:
        """Encode clips of any lengths: float32 24 kHz mono, (S,) each. Returns codes_QT, int16, of each."""
        encoded: list[np.ndarray] = []
        for first in range(0, len(clips), _ROWS):
            rows = [torch.from_numpy(clip_S)[:, None] for clip_S in clips[first : first + _ROWS]]
            codes: list[list[torch.Tensor]] = [[] for _ in rows]
            for r, latent_TD in self._latents(rows):
                codes[r].append(self._quantize(latent_TD, num_codebooks))
            encoded += [torch.cat(parts, dim=1).numpy() for parts in codes]
        return encoded

    def _latents(self, rows: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (r, latent_TD) of each clip of (S, 1), segment by segment."""
        memories: list[Memory] = [{} for _ in rows]
        segment, state = _TILE * _TILES_PER_SEGMENT, None
        for start in range(0, max(map(len, rows)), segment):
            hidden = {
                r: self._convolve(row_S1[start : start + segment], memories[r])
                for r, row_S1 in enumerate(rows)
                if start < len(row_S1)
            }
            # rows that are shorter, or missing, end with zeros: what comes later cannot change what came before
            hidden_TRC = torch.zeros(max(map(len, hidden.values())), _ROWS, self._lstm.input_size)
            for r, hidden_TC in hidden.items():
                hidden_TRC[: len(hidden_TC), r] = hidden_TC
            mixed_TRC, state = self._lstm(hidden_TRC, state)
            mixed_TRC += hidden_TRC
            for r, hidden_TC in hidden.items():
                yield r, self._last(mixed_TRC[: len(hidden_TC), r], memories[r])

    def _convolve(self, audio_S1: torch.Tensor, memory: Memory) -> torch.Tensor:
        tiles = [_run(self._shallow, tile_S1, memory) for tile_S1 in audio_S1.split(_TILE)]
        return _run(self._deep, torch.cat(tiles), memory)

    def _quantize(self, latent_TD: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        codes_QT = torch.empty(num_codebooks, len(latent_TD), dtype=torch.int16)
        residual_TD = latent_TD
        for q, (codebook_VD, codebook_DV, half_norm_V) in enumerate(self._codebooks[:num_codebooks]):
            nearest_T = torch.addmm(half_norm_V, residual_TD, codebook_DV).argmax(dim=1)
            codes_QT[q] = nearest_T
            residual_TD = residual_TD - codebook_VD[nearest_T]
        return codes_QT


class BatchedEncoder:
    """`encodec`'s own encoder and quantizer over clips of equal length at once, never padded: what a GPU wants."""

    def __init__(self, model: Any, device: str, precision: str) -> None:
        torch.backends.cudnn.allow_tf32 = False  # on by default, and not what fp32 says
        self._model = model.to(device)
        self._device, self._precision = device, precision

    def encode(self, clips: Sequence[np.ndarray], num_codebooks: int) -> list[np.ndarray]:
        """Encode clips: float32 24 kHz mono, (S,) each. Returns codes_QT, int16, of each."""
        return self._encode(clips, num_codebooks, self._precision)

    def check_precision(self, clips: Sequence[np.ndarray], num_codebooks: int) -> tuple[float, float]:
        """Encode clips in fp32 too. Returns the share of codes that the precision changes: of codebook 0, and of all.

        Raises ConfigError if it changes more than 0.5% of codebook 0's codes.
        """
        exact = np.concatenate(self._encode(clips, num_codebooks, "fp32"), axis=1)
        changed_QN = exact != np.concatenate(self.encode(clips, num_codebooks), axis=1)
        first, every = float(changed_QN[0].mean()), float(changed_QN.mean())
        if first > _MOST_CHANGED:
            raise ConfigError(
                f"tokenize.codec.precision={self._precision}: changes {first:.2%} of codebook 0's codes on this device "
                f"({_MOST_CHANGED:.1%} are allowed); use fp32, in another tokenize.output.url"
            )
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


def _run(layers: Sequence[Any], x_TC: torch.Tensor, memory: Memory) -> torch.Tensor:
    for layer in layers:
        x_TC = layer(x_TC, memory)
    return x_TC


class _Conv:
    """A causal convolution over (T, C), with the ELU before it; a clip's start is reflected. (`encodec`'s SConv1d)"""

    def __init__(self, layer: Any, after_elu: bool) -> None:
        conv = layer.conv.conv
        assert layer.causal and layer.pad_mode == "reflect" and conv.dilation == (1,), "EnCodec 24 kHz's encoder"
        # as one row of an image, because oneDNN takes time-first activations in two dimensions only
        self._weight = _folded(conv)[:, :, None].contiguous(memory_format=torch.channels_last)
        self._bias = conv.bias.clone()
        (self._stride,) = conv.stride
        self._before = conv.kernel_size[0] - self._stride  # columns that a tile needs of what was before it
        self._after_elu = after_elu

    def __call__(self, x_TC: torch.Tensor, memory: Memory) -> torch.Tensor:
        padded_TC = self._padded(x_TC, memory.get(self))
        memory[self] = padded_TC[len(padded_TC) - self._before :].clone()
        image = padded_TC.view(1, 1, *padded_TC.shape).permute(0, 3, 1, 2)
        y = F.conv2d(image, self._weight, self._bias, stride=(1, self._stride))
        return y.permute(0, 2, 3, 1).view(-1, len(self._bias))

    def _padded(self, x_TC: torch.Tensor, before_TC: torch.Tensor | None) -> torch.Tensor:
        before, columns = self._before, len(x_TC)
        after = -columns % self._stride  # more than 0 in a clip's last tile alone
        # a clip too short to be reflected is first made longer with zeros
        missing = max(0, max(before, after) + 1 - columns) if before_TC is None else 0
        padded_TC = torch.empty(before + columns + missing + after, x_TC.shape[1])
        inner_TC, end = padded_TC[before : before + columns], before + columns + missing
        if self._after_elu:
            _elu(x_TC, inner_TC)
        else:
            inner_TC.copy_(x_TC)
        padded_TC[before + columns : end] = 0
        padded_TC[:before] = padded_TC[before + 1 : 2 * before + 1].flip(0) if before_TC is None else before_TC
        padded_TC[end:] = padded_TC[end - 1 - after : end - 1].flip(0)
        return padded_TC[: len(padded_TC) - missing]


class _Residual:
    """Two convolutions, each after an ELU, beside a third as the way past them. (`encodec`'s SEANetResnetBlock)"""

    def __init__(self, block: Any) -> None:
        _, wide, _, narrow = block.block
        self._wide = _Conv(wide, after_elu=True)
        # these two have kernels of one column, and so are products
        self._shortcut, self._narrow = (_folded(conv.conv.conv)[..., 0].t() for conv in (block.shortcut, narrow))
        self._bias = block.shortcut.conv.conv.bias + narrow.conv.conv.bias

    def __call__(self, x_TC: torch.Tensor, memory: Memory) -> torch.Tensor:
        past_TC = torch.addmm(self._bias, x_TC, self._shortcut)
        y_TC = self._wide(x_TC, memory)
        return past_TC.addmm_(_elu(y_TC, y_TC), self._narrow)


def _elu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    # the same as F.elu to half a unit of 1e-7, and faster
    return torch.maximum(x, x.clamp(max=0).exp_().sub_(1), out=out)


def _folded(conv: Any) -> torch.Tensor:
    """Return the weights (O, I, K) of a convolution under weight norm."""
    return conv.weight_v * (conv.weight_g / conv.weight_v.norm(dim=(1, 2), keepdim=True))


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
