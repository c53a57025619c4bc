"""The benchmark of a GPU, on a CPU and at sizes that say nothing about speed."""

import json

import pytest
import torch

from megascale.bench import gpu, measure
from megascale.errors import ConfigError
from megascale.model.config import ModelConfig

SMALL = dict(
    layers=1, width=32, heads=2, mlp_width=64, local_layers=1, local_width=16, local_heads=2, local_mlp_width=32
)
TINY = gpu.Sizes(
    device="cpu",
    model=ModelConfig(**SMALL),
    seconds=1.0,
    micro_batches=(2,),
    compiled=(False,),  # needs a compiler
    updates=2,
    encoded_clips=5,
    encoded_codebooks=1,
)


def test_benchmark_of_a_gpu_runs_and_tells_each_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    found = json.loads(gpu.run(2, TINY).read_text())
    ways = [(row["num_codebooks"], row["compiled"], row["micro_batch"]) for row in found["training"]]
    assert ways == [(2, False, 2), (16, False, 2)]
    for row in found["training"]:
        assert len(row["clips_per_second"]) == 2 and min(row["clips_per_second"]) > 0
        assert row["seconds"].keys() == set(gpu.PARTS) and all(value > 0 for value in row["seconds"].values())
        assert 0 <= row["data_wait_share"] <= 1 and row["peak_memory_gib"] > 0
    assert all(len(rates) == 2 for rates in found["tokenization"]["hours_per_second"].values())
    assert "EnCodec in bf16: " in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ConfigError, match="no CUDA GPU here"):
        gpu.run(1)
