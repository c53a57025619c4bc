"""`launch/predict.py MODEL INPUT …`: compressed audio, token shards or raw audio to labels and embeddings."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from megascale import storage
from megascale.config import has_credentials
from megascale.errors import AudioError, CheckpointError, ConfigError, Stopped, TokenError
from megascale.tokenize.sources import AUDIO_SUFFIXES, CONTAINER_SUFFIXES
from megascale.tokens import FRAMES_PER_SECOND

_DESCRIPTION = """\
Labels compressed audio without decoding it: JSON lines on stdout, one for each clip, in the order of the inputs, with
`source`, `key` (of a clip in a shard), `label`, `probabilities` of all classes, `frames` (75 a second) and `seconds`. Of a
model with several labels a clip (task.kind=multi) it is `labels`, those of probability 0.5 and more. What cannot be read has
`error` in place of a label, and the others are answered for all the same."""
_EPILOG = """\
INPUT: an .ecdc stream, a token folder (with manifest.json), a single shard (.tar), a recording (with --codec), or a
folder, prefix or glob of these, local or on any storage URL; or `-` alone: one such path or URL a line on stdin, each
answered before the next is read.

Exit codes: 0 done, 2 bad input (one line; also if not one clip could be read), 3 finished with bad clips, 75 stopped by a
signal."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"predict: {message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="predict", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a fine-tuned run or its model/ folder; for --embeddings also a pretraining run (its best checkpoint), one "
        "checkpoint, or its model/; local or on any storage URL",
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="see below")
    parser.add_argument(
        "--embeddings",
        metavar="OUT",
        help="also write the mean over frames of the global encoder, a row for each clip, to OUT.parquet or OUT.npz",
    )
    parser.add_argument(
        "--codec",
        metavar="URL",
        help="for raw audio: the model's codec, its codec.safetensors or EnCodec's checkpoint; nothing else needs it",
    )
    parser.add_argument(
        "--window",
        type=_window,
        metavar="SECONDS",
        help="a longer clip is cut to windows of this length, whose answers are averaged; `whole` takes every clip in one "
        "pass, as fine-tuning on whole clips does (default: the model's pretraining clips, 10 where its config.json does "
        "not say: longer stretches than it has seen, and hours of audio, are no trouble then)",
    )
    parser.add_argument(
        "--max-seconds", type=_positive, default=3600.0, metavar="S", help="a longer recording is bad (default 3600)"
    )
    parser.add_argument(
        "--batch", type=_count, default=16, metavar="N", help="windows of equal length taken together (default 16)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint, for stores other than AWS")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _window(text: str) -> float:
    return math.inf if text == "whole" else _positive(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def run(argv: Sequence[str] | None) -> int:
    """Run the command; return its exit code. Raises MegascaleError: bad input, or stopped."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    storage.configure(storage.StorageConfig(endpoint_url=arguments.endpoint_url))
    # after the arguments: torch takes seconds, and --help needs none of it
    import torch

    from megascale.downstream import answers
    from megascale.downstream.embeddings import EmbeddingFile
    from megascale.downstream.inputs import Inputs
    from megascale.downstream.predict import Predictor

    has_cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_cuda:
        raise ConfigError("--device=cuda: there is no GPU that torch can use here")
    device = arguments.device or ("cuda" if has_cuda else "cpu")
    predictor = Predictor(arguments.model, device, arguments.batch)
    facts = predictor.facts
    if predictor.classes is None and arguments.embeddings is None:
        raise CheckpointError(
            f"{arguments.model}: a pretrained encoder, which knows no classes; --embeddings OUT writes its embeddings, "
            "launch/finetune.py makes a classifier of it"
        )
    embeddings = None
    if arguments.embeddings is not None:
        made_by = {"model": arguments.model, "codec": facts.codec.fingerprint}
        embeddings = EmbeddingFile(arguments.embeddings, facts.model.width, made_by)
    tokeniser = _Tokeniser(arguments.codec, facts.codec, facts.num_codebooks, arguments.max_seconds)
    suffixes = AUDIO_SUFFIXES + CONTAINER_SUFFIXES
    inputs = Inputs(facts.codec, facts.num_codebooks, tokeniser, suffixes, arguments.max_seconds)
    window = _window_frames(arguments.window, facts.clip_frames)
    is_stream = arguments.inputs == ["-"]
    lines = answers.Lines(sys.stdout, predictor.classes, facts.task_kind == "multi", embeddings, hold=not is_stream)
    try:
        if is_stream:
            answers.predict_stream(predictor, inputs, sys.stdin.buffer, window, lines)
        else:
            answers.predict_all(predictor, inputs, arguments.inputs, window, lines)
        return answers.finish(lines, embeddings)
    except Stopped:
        raise answers.stopped(lines) from None


def _check(arguments: argparse.Namespace) -> None:
    for name in ("model", "codec", "embeddings"):
        if has_credentials(getattr(arguments, name) or ""):
            raise ConfigError(f"{name}: has credentials in it; leave them to the store's own chain")
    if "-" in arguments.inputs and len(arguments.inputs) > 1:
        raise ConfigError("predict: `-` stands alone: other inputs can be lines of stdin, too")


def _window_frames(seconds: float | None, clip_frames: int) -> int | None:
    if seconds is None:
        return clip_frames
    return None if seconds == math.inf else max(1, round(seconds * FRAMES_PER_SECOND))


class _Tokeniser:
    """Makes the model's codes of a recording; `encodec` is imported only if there is one."""

    def __init__(self, url: str | None, codec: Any, num_codebooks: int, most_seconds: float) -> None:
        """Raises TokenError: the file at `url` is no codec, or not the model's."""
        self._expected, self._num_codebooks, self._most_seconds = codec, num_codebooks, most_seconds
        self._codec = None
        if url is not None:
            from megascale.tokenize.codec import load_codec

            self._codec = load_codec(url)
            if self._codec.fingerprint != codec.fingerprint:
                raise TokenError(
                    f"--codec={url}: codec {self._codec.fingerprint[:8]}, the model was trained on tokens of codec "
                    f"{codec.fingerprint[:8]} ({codec.origin})"
                )

    def __call__(self, url: str) -> tuple[np.ndarray, int]:
        """Return codes_QT, int16, of a whole recording, and its samples at 24 kHz.

        Raises AudioError, StorageError: it cannot be read; TokenError: there is no codec.
        """
        if self._codec is None:
            raise TokenError(
                f"{url}: raw audio needs the model's codec: --codec URL of {self._expected.name} "
                f"({self._expected.origin}), such as the codec.safetensors beside its tokens"
            )
        from megascale.tokenize import audio

        seconds = audio.probe_seconds(url)
        if seconds > self._most_seconds:
            raise AudioError(f"{url}: {seconds:.0f} s, --max-seconds={self._most_seconds:g}")
        audio_S = audio.read_clip(url)
        (codes_QT,) = self._codec.encode([audio_S], self._num_codebooks)
        return codes_QT, len(audio_S)
