"""`.ecdc` in, label out: a classifier's probabilities, or an encoder's embeddings, from codes alone. No codec is needed.

B windows, T frames, Q codebooks, D width, C classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from megascale.data.index import CodecFacts
from megascale.errors import CheckpointError
from megascale.model.config import ModelConfig, Pooling
from megascale.model.mega_audioformer import GlobalEncoder, mean_over_frames, pool_frames, pooled_width
from megascale.tokens import FRAMES_PER_SECOND
from megascale.train.checkpoint import read_model

# matrix products of few rows have kernels of their own, which round otherwise: on CPUs windows of 1 and 2 frames were seen to
# depend on how many others went along, and those of 7 and more were not (AVX2)
_ALONE_BELOW = 32  # frames
PRETRAINING_SECONDS = 10.0  # the paper's clips; of a model whose config.json does not tell its own


class ModelFacts(BaseModel):
    """What of a `config.json` predictions need; there may be more in it."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model: ModelConfig
    num_codebooks: int = Field(ge=1, le=32)
    codec: CodecFacts
    label: str | None = None
    task_kind: Literal["single", "multi"] = "single"
    classes: list[str] | None = Field(None, min_length=2)
    pooling: Pooling = "mean"  # older models don't tell
    clip_frames: int = Field(round(PRETRAINING_SECONDS * FRAMES_PER_SECOND), ge=1)


class Answer(NamedTuple):
    """Of one clip: the mean over frames of the global encoder, float32 (D,); probabilities of all classes, float32 (C,),
    None where the model has no classes. Of a clip that is longer than a window, each is the mean over its windows."""

    embedding_D: np.ndarray
    probabilities_C: np.ndarray | None


class Predictor:
    """A model, and the way from codes to its answers."""

    def __init__(self, url: str, device: str = "cpu", batch: int = 16) -> None:
        """
        Args:
            url: a fine-tuned run or its `model/`; for embeddings also a pretraining run (its best checkpoint), one
                checkpoint, or a bare `model/`; anywhere.
            device: `cpu` or `cuda`.
            batch: windows of equal length that are given to the model together.

        Raises:
            CheckpointError: none of these, damaged, or not a model of this package.
        """
        weights, facts = read_model(url)
        try:
            self.facts = ModelFacts.model_validate(facts)
        except ValidationError as failure:
            first = failure.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{url}: config.json: {key}: {first['msg']}") from None
        self._url, self.classes = url, self.facts.classes
        self.device, self.batch = device, batch
        try:
            self._encoder = GlobalEncoder(self.facts.model, self.facts.num_codebooks)
            self._encoder.load_state_dict(_of("global_encoder.", weights))
            self._head = None
            if self.classes is not None:
                seen = pooled_width(self.facts.model.width, self.facts.pooling)
                self._head = nn.Linear(seen, len(self.classes))
                self._head.load_state_dict(_of("head.", weights))
        except (ValueError, RuntimeError) as failure:
            reason = str(failure).splitlines()[-1].strip()
            raise CheckpointError(f"{url}: its weights are not those of its config.json: {reason}") from None
        for part in (self._encoder, self._head):
            if part is not None:
                part.to(device).eval()

    @torch.inference_mode()
    def __call__(self, clips: Sequence[np.ndarray], window_frames: int | None) -> list[Answer]:
        """Answer for clips.

        Args:
            clips: codes_QT of each, of any lengths; nothing is padded: windows of equal length go together.
            window_frames: a longer clip is cut to the fewest windows of this length that cover it, evenly spread (they
                overlap where they must), which count alike; None takes every clip in one pass.

        Raises:
            CheckpointError: what comes out is not finite.
        """
        windows = [
            (i, start) for i, codes_QT in enumerate(clips) for start in _starts(codes_QT.shape[1], window_frames)
        ]
        lengths = [min(window_frames or clips[i].shape[1], clips[i].shape[1]) for i, _ in windows]
        embedding: dict[int, np.ndarray] = {}
        probabilities: dict[int, np.ndarray] = {}
        for length in dict.fromkeys(lengths):
            same = [n for n, found in enumerate(lengths) if found == length]
            size = 1 if length < _ALONE_BELOW else self.batch
            for first in range(0, len(same), size):
                part = same[first : first + size]
                codes = [clips[i][:, start : start + length] for i, start in (windows[n] for n in part)]
                embedding_BD, probabilities_BC = self._forward(np.stack(codes))
                embedding |= zip(part, embedding_BD, strict=True)
                if probabilities_BC is not None:
                    probabilities |= zip(part, probabilities_BC, strict=True)
        of_clip: list[list[int]] = [[] for _ in clips]
        for n, (i, _) in enumerate(windows):
            of_clip[i].append(n)
        return [
            Answer(
                np.mean([embedding[n] for n in own], axis=0),
                np.mean([probabilities[n] for n in own], axis=0) if probabilities else None,
            )
            for own in of_clip
        ]

    def _forward(self, codes_BQT: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        codes_BTQ = torch.from_numpy(codes_BQT).to(self.device).long().transpose(1, 2).contiguous()
        x_BTD = self._encoder(codes_BTQ)
        mean_BD = mean_over_frames(x_BTD)
        if not bool(torch.isfinite(mean_BD).all()):
            raise CheckpointError(f"{self._url}: puts out what is no finite number; did its training diverge?")
        if self._head is None:
            return mean_BD.cpu().numpy(), None
        seen = pool_frames(x_BTD, self.facts.pooling).split(1)
        logits_BC = torch.cat([self._head(of_one) for of_one in seen])  # see _ALONE_BELOW
        several = self.facts.task_kind == "multi"  # each label has a chance of its own
        return mean_BD.cpu().numpy(), (logits_BC.sigmoid() if several else logits_BC.softmax(dim=-1)).cpu().numpy()


def _of(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _starts(num_frames: int, window_frames: int | None) -> list[int]:
    """Return where the windows of a clip begin."""
    if window_frames is None or num_frames <= window_frames:
        return [0]
    count = -(-num_frames // window_frames)
    return [round(start) for start in np.linspace(0, num_frames - window_frames, count)]
