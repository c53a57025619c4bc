"""The benchmark of a GPU, on a CPU and at sizes that say nothing about speed."""

import json
import os
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.bench import gpu, measure
from megascale.bench.corpus import write_tokens
from megascale.errors import ConfigError, DataError
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


@dataclass(frozen=True)
class Fatal(gpu.Sizes):
    """Kills the first process that is handed it, as the kernel does where memory ends."""

    once: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if Path(self.once).exists():
            Path(self.once).unlink()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_benchmark_of_a_gpu_tells_each_part_and_a_killed_process_costs_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    (tmp_path / "once").touch()
    tiny = {name: getattr(TINY, name) for name in asdict(TINY)}
    found = json.loads(gpu.run(2, Fatal(**tiny, once=str(tmp_path / "once"))).read_text())
    killed, *rows = found["training"]
    ways = [(row["num_codebooks"], row["micro_batch"], row["tokens"], row["deterministic"]) for row in rows]
    assert ways == [(16, 2, "streamed", True), (16, 2, "resident", True), (16, 2, "streamed", False)]
    assert (killed["num_codebooks"], killed["failed"]) == (2, "its process was killed")
    for row in rows:
        assert len(row["clips_per_second"]) == 2 and min(row["clips_per_second"]) > 0
        assert row["seconds"].keys() == set(gpu.PARTS) and all(value > 0 for value in row["seconds"].values())
        assert 0 <= row["data_wait_share"] <= 1 and row["peak_memory_gib"] > 0
        assert 0.7 * 75 <= row["frames_per_clip"] < 75  # chunk drop takes from half of the batches
    assert all(len(rates) == 2 for rates in found["tokenization"]["hours_per_second"].values())
    first, every = found["tokenization"]["codes_changed_by_bf16"]
    assert 0 <= first <= 1 and 0 <= every <= 1
    told = capsys.readouterr().out
    assert "its process was killed" in told and "EnCodec in bf16: " in told


def test_rows_that_were_measured_are_kept_when_a_later_one_ends_the_benchmark(tmp_path, monkeypatch):
    """A width that does not fit the codebooks is a mistake, not the GPU's: it ends the run."""
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    (tmp_path / "once").touch()
    tiny = {name: getattr(TINY, name) for name in asdict(TINY)}
    with pytest.raises(ValueError, match="multiple of the 3 codebooks"):
        gpu.run(1, Fatal(**(tiny | {"codebooks": (2, 3)}), once=str(tmp_path / "once")))
    (kept,) = json.loads((tmp_path / "gpu.json").read_text())["training"]
    assert kept["num_codebooks"] == 2 and kept["failed"]


def test_most_clips_that_fitted_are_measured_further_and_eager_if_they_can_be():
    cells = [gpu.Cell(2, compiled, clips) for compiled in (False, True) for clips in (16, 32, 64)]
    fits, fails = {"clips_per_second": [1.0]}, {"failed": "out of memory"}
    assert gpu.further(cells, [fits, fits, fails, fits, fits, fails]) == [
        gpu.Cell(2, False, 32, tokens="resident"),
        gpu.Cell(2, False, 32, deterministic=False),
    ]
    assert gpu.further(cells, [fits, fails, fails, fits, fits, fails])[0].compiled
    assert gpu.further(cells, 6 * [fails]) == []


def fail(kind: type[Exception], said: str) -> None:
    raise kind(said)


def test_failure_of_cuda_is_told_and_any_other_is_raised():
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert gpu.apart(fail, RuntimeError, cublas + "\nmore") == {"failed": cublas}
    assert gpu.apart(fail, torch.OutOfMemoryError, "Tried to allocate") == {"failed": "out of memory"}
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        gpu.apart(fail, RuntimeError, "shapes do not fit")


def test_tokens_are_streamed_from_shards_unless_they_are_resident(tmp_path):
    write_tokens(tmp_path / "tokens", 2, 8, 75, 4)
    made = {}
    for tokens in ("streamed", "resident"):
        cell = gpu.Cell(2, False, 2, tokens)
        made[tokens] = gpu.make_batches(cell, str(tmp_path / "tokens"), TINY, torch.device("cpu"))
    shutil.rmtree(tmp_path / "tokens")
    made["resident"].micro_batches(0)
    with pytest.raises(DataError, match="missing"):
        made["streamed"].micro_batches(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ConfigError, match="no CUDA GPU here"):
        gpu.run(1)
