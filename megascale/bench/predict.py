"""How fast `.ecdc` bytes become labels, beside decoding them and running a CNN on log-mel: one thread, in turn.

B clips, T frames, Q codebooks, S samples, M mel bands, F spectrogram frames, C classes.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megascale import seeding, synthesis
from megascale.bench import measure
from megascale.data.index import CodecFacts
from megascale.downstream.predict import Predictor
from megascale.log import say
from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import AudioClassifier, count_parameters
from megascale.spectrogram import mel_filters
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import Codec
from megascale.tokens import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, read_ecdc, write_ecdc
from megascale.train.checkpoint import write_model

_WINDOW = 1024
_CLASSES = 10
OURS, SMALL, RIVAL, DECODE, CNN = "ours", "ours, small", "decode, log-mel, CNN", "decode alone", "log-mel and CNN alone"

THINGS = {
    OURS: "Predictor on .ecdc bytes: codes unpacked, the paper's 12 x 768, softmax",
    SMALL: "the same with the model of configs/pretrain/small.yaml",
    RIVAL: "the same bytes unpacked, decoded by encodec's own decoder, log-mel (torch.stft), the CNN, softmax",
    DECODE: "of the line above, up to the waveform",
    CNN: "of that line, from the waveform on",
}
ABOUT = (
    "The CNN: 64 mel bands, 75 frames a second; four blocks of two 3 x 3 convolutions with 32, 64, 128 and 256 channels, "
    "batch norm and ReLU, halved after each by 2 x 2 average pooling; mean and maximum over what is left, one linear layer: "
    "PANNs' CNN10 (arXiv:1912.10211) at half its width. All weights are random: only time is compared, not what is "
    "right. The codec is calibrated, so that its decoder is not trained either; it computes the same as the published one."
)


@dataclass(frozen=True)
class Sizes:
    """What is labelled; `batches`: how many clips one call gets."""

    seconds: float = 10.0
    calibration_seconds: float = 60.0
    batches: tuple[int, ...] = (1, 8)
    codebooks: tuple[int, ...] = (2, 16)
    model: ModelConfig = field(default_factory=ModelConfig)
    small: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            layers=3, width=96, heads=3, mlp_width=256, local_width=48, local_heads=2, local_mlp_width=96
        )
    )


class LogMelCNN(nn.Module):
    """Waveforms to logits, as people do it; `ABOUT` describes it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(_WINDOW))
        self.register_buffer("filters_MK", torch.from_numpy(mel_filters()).float())
        layers: list[nn.Module] = []
        channels = 1
        for width in (32, 64, 128, 256):
            for before in (channels, width):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.AvgPool2d(2))
            channels = width
        self.convolutions, self.head = nn.Sequential(*layers), nn.Linear(channels, num_classes)

    def forward(self, audio_BS: Tensor) -> Tensor:
        """Return logits_BC."""
        spectrum = torch.stft(
            audio_BS, _WINDOW, SAMPLES_PER_FRAME, window=self.get_buffer("window"), return_complex=True
        )
        mel_BMF = torch.log(self.get_buffer("filters_MK") @ (spectrum.real**2 + spectrum.imag**2) + 1e-10)
        x_BCMF = self.convolutions(mel_BMF[:, None])
        return self.head(x_BCMF.mean(dim=(2, 3)) + x_BCMF.amax(dim=(2, 3)))


def run(rounds: int, sizes: Sizes = Sizes()) -> Path:
    """Measure, print the table, and write `runs/bench/predict.json`; return its path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what an untrained decoder puts out may be so small that it would be slow
    try:
        codec, streams = _streams(sizes)
        cnn = LogMelCNN(_CLASSES).eval()
        things: dict[str, Callable[[], float]] = {}
        for num_codebooks in sizes.codebooks:
            with tempfile.TemporaryDirectory() as folder:
                ours, small = (
                    _predictor(Path(folder, name), model, num_codebooks, max(sizes.batches))
                    for name, model in ((OURS, sizes.model), (SMALL, sizes.small))
                )
            for batch in sizes.batches:
                prefix = f"Q={num_codebooks}, {batch} at a time: "
                made = _things(ours, small, codec, cnn, streams[num_codebooks][:batch])
                things |= {prefix + name: thing for name, thing in made.items()}
        rates = measure.in_turn("predicting", things, rounds)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    facts = {
        "clips_per_second": {name: sorted(values) for name, values in rates.items()},
        "ratios": {
            f"{prefix}{name} / {RIVAL}": measure.ratio(rates[prefix + name], rates[prefix + RIVAL])
            for prefix in dict.fromkeys(name.partition(": ")[0] + ": " for name in rates)
            for name in (OURS, SMALL)
        },
        "what": THINGS,
        "about": ABOUT,
        "parameters": {OURS: _count(sizes.model), SMALL: _count(sizes.small), "CNN": count_parameters(cnn)},
        "seconds": sizes.seconds,
        "rounds": rounds,
    }
    _print(facts)
    path = measure.write("predict", facts, ["torch", "numpy", "encodec"])
    say(f"{rounds} rounds -> {path}")
    return path


def _count(config: ModelConfig) -> int:
    return count_parameters(AudioClassifier(config, 2, _CLASSES, torch.Generator()))


def _streams(sizes: Sizes) -> tuple[Codec, dict[int, list[bytes]]]:
    """Fit a codec to rendered sounds; return it, and `.ecdc` streams of some of them by their number of codebooks."""
    num_codebooks = max(sizes.codebooks)
    say(f"fitting a codec of {num_codebooks} codebooks, and encoding {max(sizes.batches)} clips")
    count = max(*sizes.batches, round(sizes.calibration_seconds / sizes.seconds))
    clips = [
        synthesis.make_mixture(seeding.generator(0, "bench", i), i, sizes.seconds, SAMPLE_RATE_HZ).astype(np.float32)
        for i in range(count)
    ]
    codec = calibrate(clips, num_codebooks, seed=0)
    chosen = clips[: max(sizes.batches)]
    codes = codec.encode(chosen, num_codebooks)
    return codec, {
        q: [write_ecdc(codes_QT[:q], len(audio_S), codec.name) for codes_QT, audio_S in zip(codes, chosen, strict=True)]
        for q in sizes.codebooks
    }


def _predictor(folder: Path, config: ModelConfig, num_codebooks: int, batch: int) -> Predictor:
    """Return a classifier with first weights, loaded as any kept one is."""
    model = AudioClassifier(config, num_codebooks, _CLASSES, torch.Generator().manual_seed(0))
    codec = CodecFacts(name="bench", fingerprint="0" * 64, origin="none", num_codebooks=num_codebooks)
    facts = {
        "model": config.model_dump(),
        "num_codebooks": num_codebooks,
        "codec": codec.model_dump(),
        "classes": [str(i) for i in range(_CLASSES)],
    }
    write_model(folder, {k: v.detach() for k, v in model.named_parameters()}, facts)
    return Predictor(str(folder), batch=batch)


def _things(
    ours: Predictor, small: Predictor, codec: Codec, cnn: LogMelCNN, streams: Sequence[bytes]
) -> dict[str, Callable[[], float]]:
    amount = float(len(streams))

    def predict(predictor: Predictor) -> float:
        answers = predictor([read_ecdc(data, "bench")[1] for data in streams], None)
        assert answers[0].probabilities_C is not None, "it has classes"
        return amount

    @torch.inference_mode()
    def decode() -> Tensor:
        codes_BQT = torch.from_numpy(np.stack([read_ecdc(data, "bench")[1] for data in streams])).long()
        audio_B1S = codec.model.decode([(codes_BQT, None)])
        return audio_B1S[:, 0]

    @torch.inference_mode()
    def classify(audio_BS: Tensor) -> float:
        probabilities_BC = cnn(audio_BS).softmax(dim=-1)
        assert bool(torch.isfinite(probabilities_BC).all()), "a label comes out"
        return amount

    def decode_alone() -> float:
        decode()
        return amount

    waveforms_BS = decode()
    return {
        OURS: lambda: predict(ours),
        SMALL: lambda: predict(small),
        RIVAL: lambda: classify(decode()),
        DECODE: decode_alone,
        CNN: lambda: classify(waveforms_BS),
    }


def _print(facts: dict[str, Any]) -> None:
    print("\nclips per core-second                        median      min      max    / decode, log-mel, CNN")
    for name, values in facts["clips_per_second"].items():
        found = facts["ratios"].get(f"{name} / {RIVAL}")
        over = f"{found['median']:8.2f}  ({found['min']:.2f} to {found['max']:.2f})" if found else ""
        print(f"{name:44s} {np.median(values):8.3f} {min(values):8.3f} {max(values):8.3f} {over}")
    print(f"\nparameters: {json.dumps(facts['parameters'])}")
    for name, what in facts["what"].items():
        print(f"{name}: {what}")
    print(facts["about"])
