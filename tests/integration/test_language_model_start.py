"""Pretraining and fine-tuning whose first weights are a language model's."""

import json
import shutil
from pathlib import Path

import language_models
import pytest
import safetensors.torch
import torch
from conftest import command, run
from support import write_paced_tokens

from megascale.model.config import ModelConfig
from megascale.train import checkpoint

SHAPE = ModelConfig(layers=2, width=32, heads=2, mlp_width=64)  # of smoke.yaml
STILL = "optim.lr=1e-12"  # the weights kept are the first ones


def pretrain(tokens: Path, output: Path, init_from: str, *more: str) -> list[str]:
    line = ["configs/pretrain/smoke.yaml", f"data.url={tokens}", f"output.url={output}", f"model.init_from={init_from}"]
    return command("pretrain.py", *line, *more)


def kept(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def assert_begun_as(language_model: Path, weights: dict[str, torch.Tensor]) -> None:
    theirs = safetensors.torch.load_file(language_model / "model.safetensors")
    for ours, name in (("attention.q_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.up_proj")):
        for i in range(SHAPE.layers):
            found = weights[f"global_encoder.blocks.{i}.{ours}.weight"]
            # the rate above, a few times, and weight decay by it
            torch.testing.assert_close(found, theirs[f"model.layers.{i}.{name}.weight"], rtol=0, atol=1e-9)


@pytest.fixture
def language_model(tmp_path) -> Path:
    language_models.write(tmp_path / "lm", SHAPE)
    return tmp_path / "lm"


def test_pretraining_begins_as_the_language_model_and_says_so(tokens, language_model, tmp_path):
    run(pretrain(tokens, tmp_path / "run", f"hf:{language_model}", STILL))
    step = checkpoint.step_folder(tmp_path / "run" / "checkpoints", 6)
    assert_begun_as(language_model, kept(step))
    facts = checkpoint.read_facts(step / "model")
    assert facts["init_from"] == f"hf:{language_model}" and "init_from" not in facts["model"]


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_need_the_language_model(tokens, language_model, tmp_path):
    line = pretrain(tokens, tmp_path / "run", f"hf:{language_model}")
    run(line)
    last = checkpoint.step_folder(tmp_path / "run" / "checkpoints", 6)
    straight = kept(last)
    shutil.rmtree(last)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(language_model)
    run([*line, "--dry-run"])
    assert "going on from" in run(line)
    resumed = kept(last)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    # it is part of the config all the same
    printed = run(pretrain(tokens, tmp_path / "run", "hf:another"), exit_code=2)
    assert "pretrain.model.init_from=hf:another: the run in" in printed


def test_one_that_does_not_fit_ends_with_2_and_nothing_is_written(tokens, language_model, tmp_path):
    for more in ([], ["--dry-run"]):
        line = pretrain(tokens, tmp_path / "run", f"hf:{language_model}", "model.layers=3", *more)
        printed = run(line, exit_code=2)
        assert f"ConfigError: {language_model}/config.json: num_hidden_layers=2, model.layers=3" in printed
        assert "Traceback" not in printed
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_fine_tuning_without_a_checkpoint_may_begin_as_a_language_model(tokens, language_model, tmp_path):
    shape = [f"model.{key}={value}" for key, value in SHAPE.shape().items()]
    shared = ["configs/finetune/smoke.yaml", f"data.url={tokens}", "arm=scratch", *shape, STILL, "train.epochs=1"]
    first = f"model.init_from=hf:{language_model}"
    run(command("finetune.py", *shared, first, "checkpoint=null", f"output.url={tmp_path / 'run'}"))
    assert_begun_as(language_model, kept(tmp_path / "run"))
    # a checkpoint may give the shape, and nothing else
    shared = [word for word in shared if word not in shape]
    both = [*shared, first, f"checkpoint={tmp_path / 'run'}", f"output.url={tmp_path / 'other'}"]
    assert "two first weights; model.init_from is for arm=scratch" in run(
        command("finetune.py", *both, "arm=ft"), exit_code=2
    )
    run(command("finetune.py", *both))
    assert_begun_as(language_model, kept(tmp_path / "other"))


@pytest.mark.slow
def test_one_table_compares_scratch_the_language_model_and_pretraining_on_audio_from_either(tmp_path):
    names = ("genre", "instrument_family_str", "class")
    write_paced_tokens(tmp_path / "tokens", 40, labels=lambda i: dict.fromkeys(names, ("low", "high")[i % 2]))
    init_from = language_models.write(tmp_path / "lm", SHAPE)
    for kbps in (1.5, 12):
        for name, first in (("audio", "null"), ("lm-audio", init_from)):
            bitrate = ("train.steps=2", f"data.bitrate_kbps={kbps}")
            run(pretrain(tmp_path / "tokens", tmp_path / f"{name}-{kbps:g}", first, *bitrate))
    recipe, places = "configs/table1/language_model.yaml", []
    for name in ("gtzan", "nsynth", "music_speech"):
        places.append(f"data.{name}={tmp_path / 'tokens'}")
    for key, name in (("checkpoints", "audio"), ("further.language_model_audio", "lm-audio")):
        places += [f"{key}.1k5={tmp_path / f'{name}-1.5'}", f"{key}.12k={tmp_path / f'{name}-12'}"]
    small = ["seeds=[0]", "cells.lrs=[1e-3]", "cells.gpus_each=0", "cells.finetune.train.epochs=1", "map_recordings=0"]
    small += ["cells.finetune.zero={stage: 0}", f"further.language_model.init_from={init_from}"]
    run(command("table1.py", recipe, *places, *small, f"output.url={tmp_path / 'table'}"))
    table = json.loads((tmp_path / "table" / "table1.json").read_text())
    rows = ["scratch", "ft", "ft_aug", "language_model", "language_model_audio"]
    assert [s["arm"] for s in table["summary"] if (s["task"], s["bitrate_kbps"]) == ("gtzan", 12)] == rows
    assert len(table["summary"]) == 3 * len(rows) * 2
    begun = {cell["arm"]: cell["checkpoint"] for cell in table["cells"] if cell["bitrate_kbps"] == 12}
    assert begun["scratch"] is None and begun["language_model"] is None
    assert "/lm-audio-12/checkpoints/" in begun["language_model_audio"] and "/audio-12/checkpoints/" in begun["ft"]
    told = [(tmp_path / "table" / "cells" / f"gtzan-12kbps-{row}-seed0-lr0.001" / "predictions.csv") for row in rows]
    assert len({path.read_text() for path in told}) == len(rows), "each begins with weights of its own"
