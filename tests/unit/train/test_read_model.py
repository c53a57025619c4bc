"""Models of checkpoints: a run, a checkpoint or a folder gives its weights, verified; what is broken is named."""

import hashlib
import json
import shutil

import pytest
import torch
from checkpoints import FACTS, WEIGHTS, save
from stores import hooked_copy

from megascale.errors import CheckpointError
from megascale.train import checkpoint


def test_model_is_read_from_a_run_a_checkpoint_or_a_bare_folder(tmp_path):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        save(tmp_path / "run" / "checkpoints", step, loss, weights=step)
    chosen = tmp_path / "run" / "checkpoints" / "step-00000002"
    shutil.copytree(chosen / "model", tmp_path / "sent by mail")
    for url in (tmp_path / "run", chosen, f"file://{chosen}", chosen / "model", tmp_path / "sent by mail"):
        weights, facts = checkpoint.read_model(str(url))
        assert facts == FACTS
        assert weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(weights[name], 2 * WEIGHTS[name]) for name in WEIGHTS)
    copied = shutil.copytree(chosen, tmp_path / "renamed")
    (copied / "zero" / "optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"renamed/zero/optim_states.pt: its sha256"):
        checkpoint.read_model(str(copied))


def test_what_a_name_stands_for_is_told_with_its_step_and_hash(tmp_path, monkeypatch):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        save(tmp_path / "run" / "checkpoints", step, loss, weights=step)
    chosen = tmp_path / "run" / "checkpoints" / "step-00000002"
    digest = hashlib.sha256((chosen / "model" / "model.safetensors").read_bytes()).hexdigest()
    shutil.copytree(chosen / "model", tmp_path / "bare")
    shutil.copytree(chosen / "model", tmp_path / "finetuned" / "model")
    monkeypatch.chdir(tmp_path)
    with hooked_copy(tmp_path / "run") as store:
        names = {
            str(tmp_path / "run"): (str(chosen), 2),
            "run": ("run/checkpoints/step-00000002", 2),
            "run/": ("run/checkpoints/step-00000002", 2),
            store: (f"{store}/checkpoints/step-00000002", 2),
            f"file://{chosen}": (f"file://{chosen}", 2),
            f"{store}/checkpoints/step-00000002/model": (f"{store}/checkpoints/step-00000002/model", 2),
            "run/checkpoints/step-00000002/model": ("run/checkpoints/step-00000002/model", 2),
            "bare": ("bare", None),
            "finetuned": ("finetuned", None),
        }
        for url, (own, step) in names.items():
            found = checkpoint.find_model(url)
            assert found == checkpoint.FoundModel(own, step, digest)
            one, other = checkpoint.read_model(url)[0], checkpoint.read_model(own)[0]
            assert all(torch.equal(one[name], other[name]) for name in WEIGHTS)
    save(tmp_path / "run" / "checkpoints", 4, 1.5, weights=4)
    assert checkpoint.find_model("run").step == 4


@pytest.mark.parametrize(
    ("url", "told"), [("run", "a run without a committed checkpoint"), ("none", "no checkpoint here: none/model.")]
)
def test_name_that_stands_for_no_weights_is_told(tmp_path, monkeypatch, url, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"^{url}: {told}"):
        checkpoint.find_model(url)


def test_model_folder_of_a_checkpoint_is_verified_by_the_manifest_above_it(tmp_path):
    model = save(tmp_path, 1) / "model"
    data = bytearray((model / "config.json").read_bytes())
    data[-2] ^= 1
    (model / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{model}/config.json: its sha256"):
        checkpoint.read_model(str(model))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_model_folder_without_its_files_is_named(tmp_path, missing):
    checkpoint.write_model(tmp_path, WEIGHTS, FACTS)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: no checkpoint here: {tmp_path}/{missing} is missing$"):
        checkpoint.read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [("config.json", b"{"), ("config.json", b"\xff"), ("config.json", b"[]"), ("model.safetensors", b"\0" * 20)],
)
def test_broken_model_folder_is_named(tmp_path, name, data):
    checkpoint.write_model(tmp_path, WEIGHTS, FACTS)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: cannot be read: "):
        checkpoint.read_model(str(tmp_path))


def test_run_without_a_checkpoint_and_missing_paths_are_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: a run without a committed checkpoint$"):
        checkpoint.read_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/none: no checkpoint here"):
        checkpoint.read_model(str(tmp_path / "none"))


def test_model_config_is_plain_json(tmp_path):
    checkpoint.write_model(tmp_path, WEIGHTS, FACTS)
    assert json.loads((tmp_path / "config.json").read_text()) == FACTS


def test_models_can_be_read_by_a_team_that_shares_the_folder(tmp_path):
    folder = save(tmp_path, 1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "model" / "model.safetensors" in files
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o644 for path in files}
