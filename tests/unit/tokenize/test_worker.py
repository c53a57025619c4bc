"""What runs in a worker: a bounded number of attempts, and where the time goes."""

from pathlib import Path

import numpy as np
from support import write_tones

from megascale.data.index import Quarantined
from megascale.tokenize.plan import TokenizeConfig
from megascale.tokenize.sources import Clip
from megascale.tokenize.worker import _read_clip


def clip(path: Path) -> Clip:
    return Clip("key", str(path), path.name, "key", 0.0, None, {}, None)


def config(path: Path) -> TokenizeConfig:
    sections = {"source": {"kind": "files", "url": str(path)}, "codec": {"weights": "calibrate"}}
    return TokenizeConfig.model_validate(sections | {"output": {"url": str(path / "out")}})


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
