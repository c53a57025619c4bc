"""`.ecdc` streams among a corpus's files: their codes are kept as they are, and no audio is decoded.

A stream is one clip, whole: codes depend on where audio was cut, so one cut out of another would be no codec's.
"""

import numpy as np

from megascale import storage
from megascale.errors import StorageError, TokenError
from megascale.tokens import LONGEST_HEADER, SAMPLE_RATE_HZ, check_ecdc_size, read_ecdc, read_ecdc_header


def is_stream(url: str) -> bool:
    """Return whether a file's name says that it holds codes."""
    return url.lower().endswith(".ecdc")


def probe_seconds(url: str) -> float:
    """Return a stream's length from its header, in seconds. Raises TokenError or StorageError naming the URL."""
    header, _ = read_ecdc_header(storage.read_start(url, LONGEST_HEADER), url)
    return header.audio_samples / SAMPLE_RATE_HZ


def read_stream(url: str, codec_name: str, num_codebooks: int, most_seconds: float) -> tuple[np.ndarray, int]:
    """Read a stream of the job's codec.

    Args:
        url: the stream.
        codec_name: what the job's codec calls itself, `m` of its streams.
        num_codebooks: how many to keep; RVQ is nested.
        most_seconds: a longer one is refused before it is read (`clips.max_seconds`).

    Returns:
        codes_QT, int16 in 0..1023, and the length of their audio in samples at 24 kHz.

    Raises:
        TokenError: broken, truncated, too long, of another codec, or with fewer codebooks; names the URL.
        StorageError: cannot be read at all, or the store failed on the way.
    """
    with storage.open_read(url) as file:
        try:
            header, start = read_ecdc_header(file.read(LONGEST_HEADER), url)
            if header.model_name != codec_name:
                raise TokenError(
                    f"{url}: codes of {header.model_name}, and this job's codec is {codec_name}; "
                    "codec.weights has to be the codec that wrote them"
                )
            seconds = header.audio_samples / SAMPLE_RATE_HZ
            if seconds > most_seconds:
                raise TokenError(f"{url}: {seconds:.0f} s in one stream, clips.max_seconds={most_seconds:g}")
            check_ecdc_size(header, start, file.seek(0, 2), url)
            file.seek(0)
            data = file.read()
        except OSError as failure:
            raise StorageError(f"{url}: {failure}") from None
    header, codes_QT = read_ecdc(data, url, num_codebooks)
    return codes_QT, header.audio_samples
