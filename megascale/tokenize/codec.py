"""EnCodec 24 kHz: its published weights, or weights calibrated on the corpus; audio to codes.

EnCodec's code and weights are Meta's (arXiv:2210.13438); the weights are licensed CC BY-NC 4.0.

B batch, S samples, Q codebooks, T frames.
"""

import hashlib
import importlib
import importlib.machinery
import io
import json
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import scipy.linalg
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from megascale import seeding, storage
from megascale.config import Section
from megascale.errors import AudioError, TokenError
from megascale.tokenize.encoder import TiledEncoder
from megascale.tokens import CODEBOOK_SIZE, PUBLISHED_NAME, SAMPLE_RATE_HZ, codec_fingerprint, model_name

PUBLISHED_FILE = "encodec_24khz-d7cc33bc.th"
CALIBRATE = "calibrate"
_BANDWIDTHS_KBPS = [1.5, 3.0, 6.0, 12.0, 24.0]
_KMEANS_FRAMES = 16_500
_KMEANS_ITERATIONS = 8
_FRAMES_PER_CODE = 16  # with fewer, a codebook memorises the sample and leaves no residual for the next one
_LEAST_SECONDS = 4
_SLOW = 64  # latent dimensions that a calibrated encoder fills, of 128
_SCALE_SECONDS = 32  # the whole sample in one pass would spend most of its time on page faults
_UNUSED = 1e3  # coordinates of codes a small sample cannot fill: too far off for any latent
_SILENT = 1e-4  # a second whose samples all lie so close together, three steps of 16 bits, is silence


class CodecFile(Section):
    """What a saved codec says of itself, in the metadata of its safetensors."""

    num_codebooks: int = Field(description="codebooks that hold something")
    origin: str = Field(description="how it was calibrated")
    fingerprint: str = Field(description="sha256 over settings and weights")


class Codec:
    """An EnCodec encoder with its codebooks; `fingerprint` names the meaning of its codes."""

    def __init__(self, model: Any, num_codebooks: int, origin: str, published: bool) -> None:
        """
        Args:
            model: an `encodec.EncodecModel` with its weights.
            num_codebooks: how many of its codebooks hold something.
            origin: what the weights are, for people: a file's name, or how they were calibrated.
            published: whether they are the weights that EnCodec's authors published.
        """
        self.model = model.eval()
        self.num_codebooks = num_codebooks
        self.origin = origin
        self.published = published
        settings = {"model": PUBLISHED_NAME, "sample_rate_hz": SAMPLE_RATE_HZ, "channels": 1, "normalize": False}
        self.fingerprint = codec_fingerprint(settings, {k: v.numpy() for k, v in self.state().items()})
        self.name = model_name(self.fingerprint, published)
        self._encoder = TiledEncoder(self.model)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights that decide codes: the encoder, and the codebooks that hold something."""
        encoder = {f"encoder.{k}": v.contiguous() for k, v in self.model.encoder.state_dict().items()}
        layers = self.model.quantizer.vq.layers[: self.num_codebooks]
        return encoder | {f"codebook.{i}": layer.codebook.contiguous() for i, layer in enumerate(layers)}

    def encode(self, clips: Sequence[np.ndarray], num_codebooks: int) -> list[np.ndarray]:
        """Encode clips on the CPU.

        Args:
            clips: float32, 24 kHz mono, (S,) each, of any lengths.
            num_codebooks: stop the quantizer after so many; RVQ is nested, so the first Q never depend on it.

        Returns:
            codes_QT of each, int16 in 0..1023, T = ceil(S / 320).
        """
        assert num_codebooks <= self.num_codebooks, "the job's plan checks this"
        return [self._encoder.encode(clip_S, num_codebooks) for clip_S in clips]

    def to_bytes(self) -> bytes:
        """Serialise as safetensors, to be kept beside the shards."""
        assert not self.published, "published weights are never copied: their licence and name stay with their file"
        facts = CodecFile(num_codebooks=self.num_codebooks, origin=self.origin, fingerprint=self.fingerprint)
        return safetensors.torch.save(self.state(), {"codec": facts.model_dump_json()})


def load_codec(url: str) -> Codec:
    """Load EnCodec's published checkpoint (checked against the hash in its name) or a codec this package saved.

    Raises:
        TokenError: the file's content does not match its name, or is not a codec.
        StorageError: no such file.
    """
    data = storage.read_bytes(url)
    return _from_safetensors(data, url) if url.endswith(".safetensors") else _from_checkpoint(data, url)


def _from_checkpoint(data: bytes, url: str) -> Codec:
    name = url.rpartition("/")[2]
    match = re.fullmatch(r"encodec_24khz-([0-9a-f]{8,64})\.th", name)
    if match is None:
        raise TokenError(f"{url}: codec.weights is named like {PUBLISHED_FILE} or ends in .safetensors")
    actual = hashlib.sha256(data).hexdigest()
    if not actual.startswith(match[1]):
        raise TokenError(f"{url}: its sha256 begins with {actual[:8]}, its name says {match[1]}: a damaged download?")
    model = _new_model()
    try:
        model.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as failure:  # torch.load raises many types for a file that is no checkpoint
        raise TokenError(f"{url}: not an EnCodec 24 kHz state dict: {str(failure).splitlines()[0]}") from None
    return Codec(model, len(model.quantizer.vq.layers), name, published=name == PUBLISHED_FILE)


def _from_safetensors(data: bytes, url: str) -> Codec:
    try:
        state = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = CodecFile.model_validate_json(header["__metadata__"]["codec"])
        model = _new_model()
        encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        model.encoder.load_state_dict(encoder)
        for i in range(facts.num_codebooks):
            _set_codebook(model, i, state[f"codebook.{i}"])
        codec = Codec(model, facts.num_codebooks, facts.origin, published=False)
    except (KeyError, ValueError, RuntimeError, IndexError, safetensors.SafetensorError) as failure:
        raise TokenError(f"{url}: not a codec this package saved: {str(failure).splitlines()[0]}") from None
    if codec.fingerprint != facts.fingerprint:
        raise TokenError(f"{url}: its weights do not match its fingerprint; the file was changed")
    return codec


@torch.inference_mode()
def calibrate(
    clips: Sequence[np.ndarray], num_codebooks: int, seed: int, report: Callable[[int, int], None] | None = None
) -> Codec:
    """Fit a codec to a corpus, with no download: EnCodec's encoder with seeded weights, each convolution rescaled so
    that its output has zero mean and unit variance on the sample; its last convolution fitted to put out the features
    that change slowest; and residual codebooks fitted there by k-means.

    Its codes carry information about the audio but do not decode to it.

    Args:
        clips: float32 24 kHz mono, at least 4 s in all, 220 s to fill every code; joined and cut to pieces of one
            second. Silent ones are left out: a convolution that puts out a constant cannot be rescaled.
        num_codebooks: how many codebooks to fit.
        seed: fixes the weights and the k-means starts.
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeding.generator(seed, "codec weights").integers(2**62)))
        model = _new_model()
    _standardise(model.encoder, torch.from_numpy(audio_BS[:_SCALE_SECONDS])[:, None])
    *layers, last = model.encoder.model
    parts = torch.from_numpy(audio_BS)[:, None].split(8)
    hidden = []
    report = report or (lambda done, total: None)
    total = len(parts) + num_codebooks
    for part_B1S in parts:
        hidden.append(nn.Sequential(*layers)(part_B1S))
        report(len(hidden), total)
    hidden_BCT = torch.cat(hidden)
    _slow_down(last.conv.conv, hidden_BCT)
    residual_ND = last(hidden_BCT).permute(0, 2, 1).reshape(-1, model.encoder.dimension).numpy()
    for i in range(num_codebooks):
        centers_VD, nearest_N = _fit_codebook(residual_ND, seeding.generator(seed, "codebook", i))
        _set_codebook(model, i, torch.from_numpy(centers_VD))
        residual_ND = residual_ND - centers_VD[nearest_N]
        report(len(parts) + i + 1, total)
    return Codec(model, num_codebooks, f"calibrated on {len(audio_BS)} s, seed {seed}", published=False)


def _standardise(encoder: nn.Module, audio_B1S: torch.Tensor) -> None:
    """Rescale every convolution, in forward order, to zero mean and unit variance per channel on this audio."""

    def rescale(conv: Any, inputs: Any, output_BCT: torch.Tensor) -> torch.Tensor:
        mean_C = output_BCT.mean(dim=(0, 2))
        std_C = output_BCT.std(dim=(0, 2)).clamp_min(1e-6)
        conv.weight_g.div_(std_C[:, None, None])
        conv.bias.copy_((conv.bias - mean_C) / std_C)
        return (output_BCT - mean_C[:, None]) / std_C[:, None]  # so that the next layer is measured on the new scale

    hooks = [m.register_forward_hook(rescale) for m in encoder.modules() if isinstance(m, nn.Conv1d)]
    encoder(audio_B1S)
    for hook in hooks:
        hook.remove()


def _slow_down(conv: Any, hidden_BCT: torch.Tensor) -> None:
    """Fit the last convolution: its input averaged over its window, then turned to the directions that change least
    from frame to frame, of unit variance. (slow feature analysis, Wiskott and Sejnowski 2002)

    Seeded weights alone follow the phase of the waveform, so that a steady tone gives other codes at every frame: they
    say less about the sound, and a masked one can hardly be predicted from its neighbours.
    """
    taps = conv.kernel_size[0]
    mean_BTC = F.avg_pool1d(hidden_BCT, taps, stride=1).transpose(1, 2).double()
    offset_C = mean_BTC.mean(dim=(0, 1))
    mean_BTC -= offset_C
    step_BTC = mean_BTC.diff(dim=1)
    variance_CC = torch.einsum("bti,btj->ij", mean_BTC, mean_BTC) / mean_BTC[..., 0].numel()
    change_CC = torch.einsum("bti,btj->ij", step_BTC, step_BTC) / step_BTC[..., 0].numel()
    # a sample of a few seconds has fewer frames than channels; the ridge keeps its variance invertible
    ridge_CC = 1e-3 * variance_CC.diagonal().mean() * torch.eye(len(offset_C), dtype=torch.float64)
    _, slow_CD = scipy.linalg.eigh(change_CC.numpy(), (variance_CC + ridge_CC).numpy(), subset_by_index=[0, _SLOW - 1])
    slow_DC = torch.from_numpy(slow_CD.T).float()
    conv.weight_v[:_SLOW] = slow_DC[:, :, None] / taps
    conv.weight_g.zero_()  # the other outputs
    conv.weight_g[:_SLOW] = conv.weight_v[:_SLOW].norm(dim=(1, 2), keepdim=True)
    conv.bias.zero_()
    conv.bias[:_SLOW] = -slow_DC @ offset_C.float()


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


def _set_codebook(model: Any, i: int, centers_VD: torch.Tensor) -> None:
    codebook = model.quantizer.vq.layers[i]._codebook
    codebook.embed.copy_(centers_VD)
    codebook.embed_avg.copy_(centers_VD)
    codebook.cluster_size.fill_(1.0)
    codebook.inited.fill_(1.0)


def _new_model() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # encodec uses the older form of weight norm
        return _encodec().EncodecModel._get_model(_BANDWIDTHS_KBPS, SAMPLE_RATE_HZ, channels=1, name=PUBLISHED_NAME)


def _encodec() -> types.ModuleType:
    """Import `encodec`, which imports torchaudio for parts that are not used here."""
    prepare_torchaudio()
    return importlib.import_module("encodec")


def prepare_torchaudio() -> None:
    """Let packages that import torchaudio without need be imported where it does not load.

    torchaudio's wheels are CUDA builds that do not load beside a CPU torch. Then a placeholder stands in for the
    import, and its functions raise the original error; where the real torchaudio loads, it is used.
    """
    if "torchaudio" not in sys.modules:
        try:
            importlib.import_module("torchaudio")
        except (OSError, ImportError) as failure:
            _register_placeholder("torchaudio", failure)


def _register_placeholder(name: str, failure: Exception) -> None:
    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"{name} cannot be loaded beside this torch: {failure}") from failure

    def attribute(attribute_name: str) -> Any:
        if attribute_name.startswith("__"):
            raise AttributeError(attribute_name)
        return unavailable

    for module_name in (name, f"{name}.transforms"):
        module = types.ModuleType(module_name)
        module.__getattr__ = attribute  # type: ignore[method-assign]
        module.__spec__ = importlib.machinery.ModuleSpec(module_name, None)  # others ask `find_spec` for torchaudio
        sys.modules[module_name] = module
    sys.modules[name].transforms = sys.modules[f"{name}.transforms"]  # type: ignore[attr-defined]
