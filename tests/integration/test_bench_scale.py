"""The benchmark of scaling, at sizes that say nothing about speed."""

import json

import pytest
import yaml
from conftest import ROOT

from megascale.bench import measure, scale


@pytest.mark.slow
def test_benchmark_of_scaling_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "FOLDER", tmp_path)
    path = scale.run(1, scale.Sizes(layers=1, width=24, seconds=1.0, global_batch=4, updates=2))
    found = json.loads(path.read_text())
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found["clips_per_second"].values())
    printed = capsys.readouterr().out
    assert "2 ranks / 1 rank: " in printed and "  1024          1 " in printed


def test_on_paper_are_the_recipes_of_the_paper():
    for num_codebooks, recipe in ((2, "paper_1k5"), (16, "paper_12k")):
        train = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{recipe}.yaml").read_text())["train"]
        assert train["micro_batch"] == scale._MICRO_BATCH[num_codebooks]
        assert train["global_batch"] == scale._GLOBAL_BATCH


def test_on_paper_one_gpu_computes_alone_and_many_wait_for_each_other():
    paper = scale.on_paper(2, scale.CLUSTER)
    assert [row["gpus"] * row["clips"] for row in paper["rows"]] == [1024] * 11
    alone, *others = paper["rows"]
    assert alone["communication"] == 0 and alone["mfu"] == pytest.approx(scale.CLUSTER.mfu, rel=1e-2)
    efficiencies = [row["efficiency"] for row in others]
    assert efficiencies == sorted(efficiencies, reverse=True) and efficiencies[-1] < 0.5
    assert paper["rows"][-1]["compute"] < paper["rows"][-1]["communication"]
