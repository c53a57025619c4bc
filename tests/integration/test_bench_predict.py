"""The prediction benchmark at a tiny size: every way is timed, and what is written says what was measured."""

import json

import numpy as np
import torch

from megascale.bench import predict
from megascale.model.config import ModelConfig

TINY = ModelConfig(layers=1, width=32, heads=2, mlp_width=48, local_layers=1, local_width=16, local_heads=1)


def test_every_way_is_timed_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    path = predict.run(2, predict.Sizes(seconds=1.0, calibration_seconds=8.0, batches=(1, 2), model=TINY, small=TINY))
    assert torch.get_num_threads() == threads
    assert path.resolve() == tmp_path / "runs" / "bench" / "predict.json"
    found = json.loads(path.read_text())
    names = [f"Q={q}, {batch} at a time: {name}" for q in (2, 16) for batch in (1, 2) for name in predict.THINGS]
    assert list(found["clips_per_second"]) == names
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found["clips_per_second"].values())
    assert len(found["ratios"]) == 2 * 2 * 2
    assert "Q=2, 1 at a time: ours / decode, log-mel, CNN" in found["ratios"]
    assert found["seconds"] == 1.0 and "calibrated" in found["about"]
    assert found["versions"].keys() == {"torch", "numpy", "encodec"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_the_rival_is_of_the_size_that_is_told_and_sees_the_codecs_frames():
    cnn = predict.LogMelCNN(10).eval()
    assert 1.1e6 < sum(p.numel() for p in cnn.parameters()) < 1.3e6
    audio_BS = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 24_000)).astype(np.float32))
    seen = []
    cnn.convolutions[0].register_forward_hook(lambda *call: seen.append(call[1][0].shape))
    with torch.inference_mode():
        assert cnn(audio_BS).shape == (2, 10)
    assert seen == [(2, 1, 64, 76)]  # one more than the codec's 75: torch.stft centres its windows
