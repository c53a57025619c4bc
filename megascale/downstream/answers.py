"""The prediction job: inputs in, one JSON line out for each clip, in the order of the inputs; batched, or line by line."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, Any, NoReturn

import numpy as np

from megascale.downstream.embeddings import EmbeddingFile
from megascale.downstream.inputs import Clip, Failure, Inputs
from megascale.downstream.predict import Answer, Predictor
from megascale.downstream.protocols import SURE
from megascale.errors import DataError, MegascaleError, Stopped, StorageError
from megascale.log import Progress, say

_PARTS_OF_BATCHES = 4  # clips looked at together, in batches: enough to find some of equal length


class Lines:
    """Writes answers to stdout, and embeddings to their file. Counts `num_clips` and `num_bad`."""

    def __init__(
        self, out: IO[str], classes: list[str] | None, several: bool, embeddings: EmbeddingFile | None, hold: bool
    ) -> None:
        """
        Args:
            out: stdout.
            classes: the model's; None: it has none.
            several: whether a clip may be of any number of them (`task.kind=multi`).
            embeddings: where those go.
            hold: keep the lines of bad inputs back until the first good one, because with none there is no line at all.
        """
        self._out, self._classes, self._several, self._embeddings, self._hold = out, classes, several, embeddings, hold
        self._held: list[dict[str, Any]] = []
        self.has_labels = classes is not None
        self.num_clips = self.num_bad = 0
        self.first_error: MegascaleError | None = None

    def write(self, clip: Clip, answer: Answer) -> None:
        """Write a clip's line."""
        self._hold = False
        self.num_clips += 1  # before the reader can have the line and stop us
        line: dict[str, Any] = {"source": _plain(clip.source)}
        if clip.key is not None:
            line["key"] = _plain(clip.key)
        frames = clip.codes_QT.shape[1]
        if answer.probabilities_C is not None and self._classes is not None:
            line |= self._labels(self._classes, answer.probabilities_C)
            shares = [round(float(share), 6) for share in answer.probabilities_C]
            line["probabilities"] = dict(zip(self._classes, shares, strict=True))
        self._put(line | {"frames": frames, "seconds": round(clip.seconds, 6)})
        if self._embeddings is not None:
            key = None if clip.key is None else _plain(clip.key)
            self._embeddings.add(_plain(clip.source), key, frames, clip.seconds, answer.embedding_D)

    def _labels(self, classes: list[str], probabilities_C: np.ndarray) -> dict[str, Any]:
        if not self._several:
            return {"label": classes[int(probabilities_C.argmax())]}
        return {"labels": [name for name, p in zip(classes, probabilities_C, strict=True) if p >= SURE]}

    def fail(self, failure: Failure) -> None:
        """Write the line of what could not be read."""
        self.num_bad += 1
        self.first_error = self.first_error or failure.error
        line = {"source": _plain(failure.source)} | ({} if failure.key is None else {"key": _plain(failure.key)})
        self._put(line | {"error": _plain(str(failure.error))})

    def _put(self, line: dict[str, Any]) -> None:
        self._held.append(line)
        if self._hold:
            return
        try:
            self._out.writelines(json.dumps(each) + "\n" for each in self._held)
        except OSError as failure:
            self._give_up(failure)
        self._held.clear()

    def flush(self) -> None:
        """Let the reader have what was written."""
        try:
            self._out.flush()
        except OSError as failure:
            self._give_up(failure)

    def _give_up(self, failure: OSError) -> NoReturn:
        # else the interpreter tries again at its end, and prints that
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
        gone = isinstance(failure, BrokenPipeError)
        why = "its reader is gone" if gone else f"cannot write: {failure.strerror or failure}"
        raise StorageError(f"stdout: {why} after {self.num_clips} clips") from None


def predict_all(predictor: Predictor, inputs: Inputs, urls: Sequence[str], window: int | None, lines: Lines) -> None:
    """Answer for arguments."""
    found = [item for url in urls for item in inputs.find(url)]
    # on a terminal the lines themselves tell how far it is
    progress = Progress("" if sys.stdout.isatty() else "predicting", inputs.num_clips, unit="clips")
    for part in _parts(inputs.read(found), predictor.batch * _PARTS_OF_BATCHES):
        _answer(predictor, part, window, lines)
        progress.total = inputs.num_clips
        progress.update(lines.num_clips + lines.num_bad, f"{lines.num_bad} bad" if lines.num_bad else "")


def predict_stream(
    predictor: Predictor, inputs: Inputs, given: Iterable[bytes], window: int | None, lines: Lines
) -> None:
    """Answer for each line that comes, a path or URL, before the next one is read."""
    for line in given:
        url = os.fsdecode(line.rstrip(b"\r\n"))
        if url.strip():
            for part in _parts(inputs.read(inputs.find(url)), predictor.batch * _PARTS_OF_BATCHES):
                _answer(predictor, part, window, lines)


def _answer(predictor: Predictor, part: list[Clip | Failure], window: int | None, lines: Lines) -> None:
    clips = [item for item in part if isinstance(item, Clip)]
    answers = iter(predictor([clip.codes_QT for clip in clips], window))
    for item in part:
        if isinstance(item, Clip):
            lines.write(item, next(answers))
        else:
            lines.fail(item)
    lines.flush()


def _parts(items: Iterator[Clip | Failure], size: int) -> Iterator[list[Clip | Failure]]:
    while part := list(islice(items, size)):
        yield part


def finish(lines: Lines, embeddings: EmbeddingFile | None) -> int:
    """Publish the embeddings, say what was done, and return the exit code: 0, or 3 if there were bad inputs.

    Raises:
        MegascaleError: not one clip could be answered for; no embeddings are written then.
    """
    if lines.first_error is not None and not lines.num_clips:
        if lines.num_bad == 1:
            raise lines.first_error
        raise DataError(f"none of {lines.num_bad} clips could be answered for; the first: {lines.first_error}")
    told = f"{lines.num_clips} clips {'labelled' if lines.has_labels else 'listed'} on stdout"
    if embeddings is not None and len(embeddings):
        embeddings.publish()
        read = "pandas.read_parquet" if embeddings.is_parquet else "numpy.load"
        told += f", their embeddings -> {embeddings.url}; next: {read}({embeddings.url!r})"
    elif not lines.num_bad:
        told += "; next: with --embeddings OUT.parquet, what the labels were made of"
    if lines.num_bad:
        told += f'; {lines.num_bad} could not be read: mend those whose lines say "error", and run them again'
    say(told)
    return 3 if lines.num_bad else 0


def stopped(lines: Lines) -> Stopped:
    """Return the error that says what a stop leaves behind."""
    return Stopped(f"{lines.num_clips} clips are answered for; the same command begins anew")


def _plain(text: str) -> str:
    """Return text that every JSON and Parquet reader takes: a path may be no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
