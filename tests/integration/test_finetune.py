"""Fine-tuning from a kept checkpoint and from scratch, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import command, run
from support import write_token_folder
from test_tokenize import wait_for

from megascale.log import read_metrics

SMOKE = "configs/finetune/smoke.yaml"


def finetune(tokens: Path, checkpoint: Path, output: Path, *overrides: str) -> list[str]:
    shared = [f"data.url={tokens}", f"checkpoint={checkpoint}", f"output.url={output}"]
    return command("finetune.py", SMOKE, *shared, *overrides)


@pytest.fixture(scope="module")
def pretrained(tokens, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pretrained") / "run"
    run(command("pretrain.py", "configs/pretrain/smoke.yaml", f"data.url={tokens}", f"output.url={output}"))
    return output


@pytest.mark.parametrize("arm", ["scratch", "probe", "ft", "ft_aug"])
def test_every_arm_writes_the_result_files_of_the_contract(tokens, pretrained, tmp_path, arm):
    printed = run(finetune(tokens, pretrained, tmp_path / "run", f"arm={arm}", "seed=3"))
    assert str(tmp_path / "run") in printed.splitlines()[-1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["arm"], result["seed"], result["protocol"], result["bitrate_kbps"]) == (arm, 3, "stratified", 1.5)
    assert result["codec"] == "ab" * 32
    assert (result["checkpoint"] is None) == (arm == "scratch")
    assert result["split_sizes"] == {"train": 24, "valid": 8, "test": 8} and result["count"] == 8
    assert sum(map(sum, result["confusion"])) == 8
    assert {"accuracy", "macro_f1", "per_class", "classes", "wall_seconds", "split_check"} <= result.keys()
    assert result["clip"]["count"] == 8 and result["last_epoch"] == 2
    assert f"split: {result['split_check']['summary']}" in printed
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    assert len(rows) == 8
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert right / 8 == pytest.approx(result["accuracy"])


def test_fine_tuning_starts_from_the_checkpoint_and_scratch_does_not(tokens, pretrained, tmp_path):
    """With a rate of almost nothing the weights kept are the first ones."""
    kept = {}
    for arm in ("ft", "scratch"):
        run(finetune(tokens, pretrained, tmp_path / arm, f"arm={arm}", "optim.lr=1e-12", "train.epochs=1"))
        kept[arm] = safetensors.torch.load_file(tmp_path / arm / "model" / "model.safetensors")
    (newest,) = (pretrained / "checkpoints").glob("step-00000006")
    reference = safetensors.torch.load_file(newest / "model" / "model.safetensors")
    shared = [name for name in reference if name.startswith("global_encoder.") and name.endswith("q_proj.weight")]
    assert shared and not any(name.startswith("local_encoder.") for name in kept["ft"])
    for name in shared:
        torch.testing.assert_close(kept["ft"][name], reference[name], rtol=0, atol=1e-9)  # the rate above, a few times
        assert not torch.allclose(kept["scratch"][name], reference[name], rtol=0, atol=1e-3)


def test_finished_run_is_not_repeated_and_another_config_is_refused(tokens, pretrained, tmp_path):
    run(finetune(tokens, pretrained, tmp_path / "run"))
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert "already done" in run(finetune(tokens, pretrained, tmp_path / "run"))
    printed = run(finetune(tokens, pretrained, tmp_path / "run", "train.epochs=3"), exit_code=2)
    assert "train.epochs=3" in printed
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


def test_same_seed_gives_the_same_predictions(tokens, pretrained, tmp_path):
    for name in ("one", "two"):
        run(finetune(tokens, pretrained, tmp_path / name, "arm=ft_aug"))
    assert (tmp_path / "one" / "predictions.csv").read_bytes() == (tmp_path / "two" / "predictions.csv").read_bytes()


def test_what_does_not_fit_ends_with_2_and_one_line(tokens, pretrained, tmp_path):
    write_token_folder(tmp_path / "other", 40, fingerprint="cd" * 32)
    cases = [
        ((tokens, pretrained, "data.bitrate_kbps=3"), "was pretrained at 1.5 kbps"),
        ((tmp_path / "other", pretrained), "pretrained on tokens of codec abababab"),
        ((tokens, tmp_path / "nowhere"), "no checkpoint here"),
        ((tokens, pretrained, "task.label=genre"), "has no label 'genre'"),
        ((tokens, "null"), "checkpoint is required for arm=ft"),
        ((tokens, pretrained, "arm=frozen"), "arm='frozen'"),
    ]
    for (folder, checkpoint, *overrides), message in cases:
        printed = run(finetune(folder, checkpoint, tmp_path / "run", *overrides), exit_code=2)
        assert message in printed and "Traceback" not in printed
        assert not (tmp_path / "run").exists()


def test_sigterm_ends_with_75_and_does_not_claim_to_have_saved(tokens, pretrained, tmp_path, start):
    driver = start(finetune(tokens, pretrained, tmp_path / "run", "train.epochs=100000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 3, driver)
    driver.terminate()
    assert driver.wait(timeout=60) == 75
    assert "nothing of it is kept; run the same command to go on" in driver.stderr.read()
    assert not (tmp_path / "run" / "result.json").exists()
