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
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field

from megascale import storage
from megascale.config import Section
from megascale.errors import TokenError
from megascale.tokenize.encoder import TiledEncoder
from megascale.tokens import PUBLISHED_NAME, SAMPLE_RATE_HZ, codec_fingerprint, model_name

PUBLISHED_FILE = "encodec_24khz-d7cc33bc.th"
CALIBRATE = "calibrate"
_BANDWIDTHS_KBPS = [1.5, 3.0, 6.0, 12.0, 24.0]


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
    model = new_model()
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
        model = new_model()
        encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        model.encoder.load_state_dict(encoder)
        for i in range(facts.num_codebooks):
            set_codebook(model, i, state[f"codebook.{i}"])
        codec = Codec(model, facts.num_codebooks, facts.origin, published=False)
    except (KeyError, ValueError, RuntimeError, IndexError, safetensors.SafetensorError) as failure:
        raise TokenError(f"{url}: not a codec this package saved: {str(failure).splitlines()[0]}") from None
    if codec.fingerprint != facts.fingerprint:
        raise TokenError(f"{url}: its weights do not match its fingerprint; the file was changed")
    return codec


def set_codebook(model: Any, i: int, centers_VD: torch.Tensor) -> None:
    """Make these the codes of an `encodec.EncodecModel`'s codebook i: (1024, 128)."""
    codebook = model.quantizer.vq.layers[i]._codebook
    codebook.embed.copy_(centers_VD)
    codebook.embed_avg.copy_(centers_VD)
    codebook.cluster_size.fill_(1.0)
    codebook.inited.fill_(1.0)


def new_model() -> Any:
    """Return an `encodec.EncodecModel` of 24 kHz whose codebooks are empty and whose weights are random."""
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
