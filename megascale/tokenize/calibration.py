"""A codec for a corpus without a download: EnCodec's encoder with weights computed, not trained, so that it hears a
log-mel spectrogram; and residual codebooks fitted to what it hears.

Within EnCodec's layers (SEANet's strides of 2, 4, 5 and 8): the first two strides pass samples on, side by side in
channels; the third is a bank of band-pass filters, and the ELU after it a rectifier; the fourth averages each band over
its frame and the one before; the LSTM, with its gates fixed, bends each band at several gains; the last convolution is
fitted by ridge regression. All of it is causal, so that of a spectrogram's window the part after the frame is not heard.

B batch, S samples, M bands, G gains, C channels, K taps, P samples side by side, T frames, D latent dimensions,
V codebook size, N frames of all pieces.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from megascale import seeding
from megascale.errors import AudioError
from megascale.spectrogram import MELS, log_mel
from megascale.tokenize.codec import Codec, new_model, set_codebook
from megascale.tokens import CODEBOOK_SIZE, SAMPLE_RATE_HZ

_KMEANS_FRAMES = 16_500
_KMEANS_ITERATIONS = 8
_FRAMES_PER_CODE = 16  # with fewer, a codebook memorises the sample and leaves no residual for the next one
_LEAST_SECONDS = 4
_UNUSED = 1e3  # coordinates of codes a small sample cannot fill: too far off for any latent
_SILENT = 1e-4  # a second whose samples all lie so close together, three steps of 16 bits, is silence
_SMALL = 1 / 32  # samples are passed on so much smaller, where ELU is nearly straight: distortion below -48 dB
_LOUD = 3000.0  # and bands so much larger, where ELU is a rectifier down to -60 dB
_BANDS_HZ = (60.0, 11_000.0)
_GAINS = tuple(4.0**i for i in range(-1, 7))  # of tanh: it bends from 72 dB below a band's 90th percentile to 12 above
# the LSTM adds its input to its output: so small, even a band that was empty in the sample adds nothing
_SKIPPED = 2.0**-30
_OPEN, _SHUT = 30.0, -30.0  # biases of a gate that always, or never, lets through
_FAINTEST = 1e-5  # a band's amplitude below which it counts as empty in this corpus
_RIDGE = 1e-2


@torch.inference_mode()
def calibrate(
    clips: Sequence[np.ndarray], num_codebooks: int, seed: int, report: Callable[[int, int], None] | None = None
) -> Codec:
    """Fit a codec to a corpus: EnCodec's encoder set up to put out, in 64 of its 128 dimensions, the bands of a log-mel
    spectrogram, each with the mean and variance of the sample taken out; and residual codebooks fitted by k-means.

    Its codes carry information about the audio but do not decode to it.

    Args:
        clips: float32 24 kHz mono, at least 4 s in all, 220 s to fill every code; joined and cut to pieces of one
            second. Silent ones are left out.
        num_codebooks: how many codebooks to fit.
        seed: fixes the sample and the k-means starts.
        report: is told the steps done and their number, after each batch of the sample and each codebook.

    Raises:
        AudioError: too little audio, or nothing but silence.
    """
    audio_S = np.concatenate([np.empty(0, dtype=np.float32), *clips])
    audio_BS = audio_S[: len(audio_S) // SAMPLE_RATE_HZ * SAMPLE_RATE_HZ].reshape(-1, SAMPLE_RATE_HZ)
    audio_BS = audio_BS[np.ptp(audio_BS, axis=1) > _SILENT]
    if len(audio_BS) < _LEAST_SECONDS:
        raise AudioError(
            f"codec.weights=calibrate needs at least {_LEAST_SECONDS} s of readable audio that is not silent, "
            f"the sample holds {len(audio_BS)} s"
        )
    order = seeding.generator(seed, "calibrate").permutation(len(audio_BS))
    audio_BS = audio_BS[order[: _KMEANS_FRAMES // 75]]
    parts = torch.from_numpy(audio_BS)[:, None].split(8)
    report = report or (lambda done, total: None)
    total = len(parts) + num_codebooks

    with torch.random.fork_rng(devices=[]):  # it draws weights, of which the encoder keeps none
        model = new_model()
    *front, recurrent, elu, last = model.encoder.model
    _hear_bands(front)
    bands = []
    for part_B1S in parts:
        bands.append(nn.Sequential(*front)(part_B1S)[:, :MELS])
        report(len(bands), total)
    bands_BMT = torch.cat(bands)
    spread_BCT = _bend(front[-1], recurrent, bands_BMT)
    hidden_BCT = elu(recurrent(spread_BCT))
    target_BMT = np.stack([log_mel(audio_S) for audio_S in audio_BS])
    _fit_last(last, hidden_BCT, torch.from_numpy(target_BMT))

    residual_ND = last(hidden_BCT).permute(0, 2, 1).reshape(-1, model.encoder.dimension).numpy()
    for i in range(num_codebooks):
        centers_VD, nearest_N = _fit_codebook(residual_ND, seeding.generator(seed, "codebook", i))
        set_codebook(model, i, torch.from_numpy(centers_VD))
        residual_ND = residual_ND - centers_VD[nearest_N]
        report(len(parts) + i + 1, total)
    return Codec(model, num_codebooks, f"calibrated on {len(audio_BS)} s, seed {seed}", published=False)


def _hear_bands(front: Sequence[Any]) -> None:
    """Set every layer before the LSTM: its first 64 inputs are then the mean amplitude in each band over
    two frames."""
    for layer in front:
        if hasattr(layer, "shortcut"):  # a residual block is no more than its way past
            for conv in (layer.block[1], layer.block[3]):
                _set(conv, _zeros(conv))
            _set(layer.shortcut, torch.eye(layer.shortcut.conv.conv.out_channels)[:, :, None])
    first, by_2, by_4, by_5, by_8 = (layer for layer in front if hasattr(layer, "conv"))
    weight_CCK = _zeros(first)
    weight_CCK[:2, 0, -1] = torch.tensor([_SMALL, -_SMALL])  # ELU(x) - ELU(-x) is odd, 2 x - x |x| / 2 + …
    _set(first, weight_CCK)
    _set(by_2, _spread(by_2, 1))
    _set(by_4, _spread(by_4, 2))

    filters_CS = torch.from_numpy(_filters(80))  # a window of 2 x 5 steps of 8 samples
    weight_CCK = _zeros(by_5)
    weight_CKP = _LOUD / (2 * _SMALL) * filters_CS.reshape(len(filters_CS), 10, 8)
    weight_CCK[:, 0:16:2] = weight_CKP.transpose(1, 2)
    weight_CCK[:, 1:16:2] = -weight_CKP.transpose(1, 2)
    _set(by_5, weight_CCK)

    weight_CCK = _zeros(by_8)
    for band in range(MELS):
        weight_CCK[band, 4 * band : 4 * band + 4] = 1 / (16 * _LOUD)
    _set(by_8, weight_CCK)


def _spread(conv: Any, before: int) -> torch.Tensor:
    """Return the weight that lays the stride's newest columns, of `before` samples as x and -x, side by side, each again
    as x and -x."""
    weight_CCK, stride = _zeros(conv), conv.conv.conv.stride[0]
    for column in range(stride):
        for place in range(before):
            to = 2 * (column * before + place)
            for sign, row in ((0.5, to), (-0.5, to + 1)):
                weight_CCK[row, 2 * place, stride + column] = sign
                weight_CCK[row, 2 * place + 1, stride + column] = -sign
    return weight_CCK


def _filters(window: int) -> np.ndarray:
    """Return Gabor filters, (4 M, window): for bands even in mel, the cosine, minus it, the sine and minus it, whose
    rectified outputs add up to an amplitude: |cos| + |sin| depends on phase by 3 dB, of which averaging leaves 0.1 for most
    tones, and all for multiples of 150 Hz.

    Below 500 Hz, bands are narrower than the window can tell apart, and overlap.
    """
    low, high = (2595 * np.log10(1 + hz / 700) for hz in _BANDS_HZ)
    center_hz = 700 * (10 ** (np.linspace(low, high, MELS) / 2595) - 1)
    width_hz = np.gradient(center_hz)
    time = np.arange(window) - (window - 1) / 2
    rows = []
    for center, width in zip(center_hz, width_hz, strict=True):
        # at its end the window cuts the widest bell off at 4% of its peak
        deviation = min(window / 5, SAMPLE_RATE_HZ / (2 * np.pi * width))
        bell = np.exp(-0.5 * (time / deviation) ** 2)
        bell /= bell.sum()
        angle = 2 * np.pi * center * time / SAMPLE_RATE_HZ
        rows += [bell * np.cos(angle), -bell * np.cos(angle), bell * np.sin(angle), -bell * np.sin(angle)]
    return np.stack(rows).astype(np.float32)


def _bend(conv: Any, recurrent: Any, bands_BMT: torch.Tensor) -> torch.Tensor:
    """Spread each band over eight gains and let the LSTM bend them, each channel by itself: together they say the
    logarithm of the band's amplitude nearly linearly. Return what the convolution now puts out, (B, 8 M, T)."""
    loud_M = torch.quantile(bands_BMT.transpose(0, 1).flatten(1), 0.9, dim=1).clamp_min(_FAINTEST)
    gain_GM = torch.tensor(_GAINS)[:, None] / loud_M
    inner = conv.conv.conv
    of_band_MCK = torch._weight_norm(inner.weight_v, inner.weight_g)[:MELS]
    weight_CCK = _SKIPPED * gain_GM.flatten()[:, None, None] * of_band_MCK.repeat(len(_GAINS), 1, 1)
    _set(conv, weight_CCK)

    channels = len(weight_CCK)
    for i, scale in enumerate((1 / _SKIPPED, 1.0)):
        weight = torch.zeros(4, channels, channels)
        weight[2] = scale * torch.eye(channels)  # torch's order: input, forget, cell, output
        getattr(recurrent.lstm, f"weight_ih_l{i}").copy_(weight.flatten(0, 1))
        getattr(recurrent.lstm, f"weight_hh_l{i}").zero_()
        getattr(recurrent.lstm, f"bias_ih_l{i}").copy_(
            torch.tensor([_OPEN, _SHUT, 0.0, _OPEN]).repeat_interleave(channels)
        )
        getattr(recurrent.lstm, f"bias_hh_l{i}").zero_()
    return (_SKIPPED * gain_GM[None, :, :, None] * bands_BMT[:, None]).flatten(1, 2)


def _fit_last(conv: Any, hidden_BCT: torch.Tensor, target_BMT: torch.Tensor) -> None:
    """Fit the last convolution by ridge regression: from its newest column and the mean over its window to each band of
    the spectrogram, of zero mean and unit variance."""
    taps = conv.conv.conv.kernel_size[0]
    padded_BCT = torch.nn.functional.pad(hidden_BCT, (taps - 1, 0), mode="reflect")
    mean_BCT = torch.nn.functional.avg_pool1d(padded_BCT, taps, stride=1)
    inputs_NC = torch.cat([hidden_BCT, mean_BCT], dim=1).transpose(1, 2).flatten(0, 1).double()
    target_NM = target_BMT.transpose(1, 2).flatten(0, 1).double()
    target_NM = (target_NM - target_NM.mean(0)) / target_NM.std(0).clamp_min(0.1)  # a band that is always empty
    offset_C = inputs_NC.mean(0)
    inputs_NC = inputs_NC - offset_C
    gram_CC = inputs_NC.T @ inputs_NC / len(inputs_NC)
    gram_CC += _RIDGE * gram_CC.diagonal().mean() * torch.eye(len(gram_CC), dtype=torch.float64)
    fit_CM = torch.linalg.solve(gram_CC, inputs_NC.T @ target_NM / len(inputs_NC))

    newest_MC, mean_MC = fit_CM.T.float().chunk(2, dim=1)
    weight_DCK = _zeros(conv)
    weight_DCK[:MELS] = mean_MC[:, :, None] / taps
    weight_DCK[:MELS, :, -1] += newest_MC
    bias_D = torch.zeros(len(weight_DCK))
    bias_D[:MELS] = -(offset_C @ fit_CM).float()
    _set(conv, weight_DCK, bias_D)


def _zeros(conv: Any) -> torch.Tensor:
    return torch.zeros_like(conv.conv.conv.weight_v)


def _set(conv: Any, weight_CCK: torch.Tensor, bias_C: torch.Tensor | None = None) -> None:
    """Give a convolution with weight norm this weight; a row of zeros has no direction, so its gain is zero."""
    inner = conv.conv.conv
    inner.weight_g.copy_(weight_CCK.flatten(1).norm(dim=1)[:, None, None])
    inner.weight_v.copy_(torch.where(inner.weight_g > 0, weight_CCK, torch.ones_like(weight_CCK)))
    inner.bias.copy_(torch.zeros(len(weight_CCK)) if bias_C is None else bias_C)


def _fit_codebook(latent_ND: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return k-means centers (V, D) float32 and each latent's center."""
    from sklearn.cluster import KMeans

    count = min(CODEBOOK_SIZE, len(latent_ND) // _FRAMES_PER_CODE)
    state = int(rng.integers(2**31))
    fit = KMeans(count, init="random", n_init=1, max_iter=_KMEANS_ITERATIONS, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stopped early, or found equal points, as silence makes them
        nearest_N = fit.fit_predict(latent_ND)
    centers_VD = np.full((CODEBOOK_SIZE, latent_ND.shape[1]), _UNUSED, dtype=np.float32)
    centers_VD[:count] = fit.cluster_centers_
    return centers_VD, nearest_N
