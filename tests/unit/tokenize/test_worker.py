"""What runs in a worker: batches that depend on the clips alone, bounded memory, a bounded number of attempts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from support import write_tones

from megascale.data.index import Quarantined
from megascale.tokenize.plan import TokenizeConfig
from megascale.tokenize.sources import Clip
from megascale.tokenize.worker import _MOST_WAITING, _equal_length_batches, _read_clip


def clips(lengths: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    yield from ((i, np.full(n, i, dtype=np.float32)) for i, n in enumerate(lengths))


def places(lengths: list[int], batch_clips: int) -> list[list[int]]:
    return [[i for i, _ in batch] for batch in _equal_length_batches(clips(lengths), batch_clips)]


def clip(path: Path) -> Clip:
    return Clip("key", str(path), path.name, "key", 0.0, None, {}, None)


def test_batches_hold_one_length_in_order_and_are_never_padded():
    assert places([5, 7, 5, 5, 7, 5], 2) == [[0, 2], [1, 4], [3, 5]]
    assert places([5, 7, 5, 6], 2) == [[0, 2], [1], [3]]


def test_every_clip_is_in_one_batch():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 40, 500)]
    found = places(lengths, 4)
    assert sorted(i for batch in found for i in batch) == list(range(500))
    assert all(len({lengths[i] for i in batch}) == 1 and len(batch) <= 4 for batch in found)


def config(path: Path) -> TokenizeConfig:
    sections = {"source": {"kind": "files", "url": str(path)}, "codec": {"weights": "calibrate"}}
    return TokenizeConfig.model_validate(sections | {"output": {"url": str(path / "out")}})


def test_many_lengths_do_not_pile_up_in_memory():
    read = 0

    def counted() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal read
        for item in clips(list(range(1, 1001))):
            read += 1
            yield item

    held = []
    for given, batch in enumerate(_equal_length_batches(counted(), 4)):
        assert len(batch) == 1
        held.append(read - given)
    assert len(held) == 1000
    assert max(held) <= _MOST_WAITING * 4


def test_broken_audio_is_final_and_an_unreachable_file_is_tried_again(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    found, _ = _read_clip(clip(tmp_path / "text.wav"), config(tmp_path), "encodec_24khz")
    assert isinstance(found, Quarantined) and found.attempts == 1
    found, _ = _read_clip(clip(tmp_path / "gone.wav"), config(tmp_path), "encodec_24khz")
    assert isinstance(found, Quarantined) and found.attempts == 3 and "gone.wav: no such file" in found.reason


def test_time_is_told_by_stage(tmp_path):
    (path,) = write_tones(tmp_path, 1)
    samples_S, spent = _read_clip(clip(path), config(tmp_path), "encodec_24khz")
    assert isinstance(samples_S, np.ndarray) and len(samples_S) == 48_000
    assert spent.keys() == {"read", "decode", "resample"} and min(spent.values()) > 0
