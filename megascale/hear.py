"""HEAR 2021's common API: raw audio to embeddings. (https://hearbenchmark.com/hear-api.html)

    from megascale import hear
    model = hear.load_model("runs/x")
    embeddings = hear.get_scene_embeddings(audio, model)

Audio is tokenised with the checkpoint's own codec; the embedding of a frame is the global encoder's output, that of a
clip the mean over frames: what fine-tuning's last layer sees with `head.pooling=mean`.

B clips, S samples, T frames, Q codebooks, D width of the global encoder.
"""

import numpy as np
import soxr
import torch
from torch import Tensor, nn

from megascale.errors import AudioError, CheckpointError, ConfigError
from megascale.export import load_model as load_kept
from megascale.model.mega_audioformer import GlobalEncoder, mean_over_frames
from megascale.tokenize.codec import PUBLISHED_FILE, Codec, load_codec
from megascale.tokens import PUBLISHED_NAME, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

SEPARATOR = "::"  # between a model and its codec


class HearModel(nn.Module):
    """A codec (on the CPU) and a global encoder (on any device), with the attributes that HEAR asks for."""

    # HEAR hands out audio at 16, 22.05, 32, 44.1 or 48 kHz; the codec's 24 kHz are half of the last
    sample_rate = 2 * SAMPLE_RATE_HZ

    def __init__(self, encoder: GlobalEncoder, codec: Codec) -> None:
        super().__init__()
        self.encoder, self.codec = encoder, codec
        self.scene_embedding_size = self.timestamp_embedding_size = encoder.config.width

    @torch.no_grad()
    def forward(self, audio_BS: Tensor) -> Tensor:
        """Return x_BTD, float32, T = ceil(S / 640), for audio_BS float in -1..1 at 48 kHz. Raises AudioError: no audio."""
        if audio_BS.dim() != 2 or not audio_BS.numel():
            raise AudioError(
                f"audio of shape {tuple(audio_BS.shape)}: (clips, samples) are needed, at least one of each"
            )
        clips = [_resampled(clip_S) for clip_S in audio_BS.detach().float().cpu().numpy()]
        codes = np.stack([codes_QT.T for codes_QT in self.codec.encode(clips, self.encoder.num_codebooks)])
        device = next(self.encoder.parameters()).device
        return self.encoder(torch.from_numpy(codes.astype(np.int64)).to(device)).float()


def _resampled(clip_S: np.ndarray) -> np.ndarray:
    if not np.isfinite(clip_S).all():
        raise AudioError("audio holds samples that are not finite numbers")
    return np.ascontiguousarray(soxr.resample(clip_S, HearModel.sample_rate, SAMPLE_RATE_HZ), dtype=np.float32)


def load_model(model_file_path: str = "") -> HearModel:
    """Load a kept model and its codec.

    Args:
        model_file_path: `MODEL` or `MODEL::CODEC`. MODEL is what `MegaAudioFormer.from_pretrained` or
            `AudioClassifier.from_pretrained` takes. CODEC is the `codec.safetensors` of the tokens that it was trained
            on, or EnCodec's published checkpoint; without it the codec is taken from the model's folder, or from the
            token folder that the run's config names.

    Raises:
        CheckpointError: no model, no codec, or a codec that is not the model's.
        ConfigError: no path.
    """
    name, _, codec_url = model_file_path.partition(SEPARATOR)
    if not name:
        raise ConfigError(f"load_model: a path is needed: MODEL or MODEL{SEPARATOR}CODEC")
    model = load_kept(name)
    made_by = model.codec
    url = codec_url or model.codec_url
    if url is None:
        needed = PUBLISHED_FILE if made_by.name == PUBLISHED_NAME else "the codec.safetensors of its token folder"
        raise CheckpointError(
            f"{name}: its codec {made_by.fingerprint[:8]} does not lie beside it; load {name}{SEPARATOR}CODEC, where "
            f"CODEC is {needed}"
        )
    codec = load_codec(url)
    if codec.fingerprint != made_by.fingerprint:
        raise CheckpointError(
            f"{url}: codec {codec.fingerprint[:8]}; {name} was trained on tokens of codec {made_by.fingerprint[:8]}"
        )
    return HearModel(model.global_encoder, codec).eval()


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embed each frame of a batch of clips of equal length.

    Args:
        audio: audio_BS, float in -1..1, mono at `model.sample_rate`.
        model: of `load_model`.

    Returns:
        x_BTD float32, and the centre of each frame in milliseconds, (B, T) float32; a frame is 13.33 ms.
    """
    x_BTD = model(audio)
    centres_T = (torch.arange(x_BTD.shape[1], dtype=torch.float64) + 0.5) * (1000 * SAMPLES_PER_FRAME / SAMPLE_RATE_HZ)
    return x_BTD, centres_T.float().to(x_BTD.device).repeat(len(x_BTD), 1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Embed each clip of a batch of clips of equal length: audio_BS as above to x_BD, float32, the mean over frames."""
    return mean_over_frames(model(audio))
