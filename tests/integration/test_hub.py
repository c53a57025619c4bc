"""Models pushed to a hub and read from it, by the client of huggingface_hub and a real server (tests/hub_server.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch
from conftest import ENVIRONMENT, ROOT
from hub_server import TOKEN, Hub, serving
from kept_models import SHAPE, facts_of, write_run
from language_models import config_of, tensors

Call = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as started:
        yield started


@pytest.fixture
def call(hub, tmp_path) -> Call:
    """Run python with arguments against that hub; return what it printed."""

    def run(*arguments: str, exit_code: int = 0, **environment: str) -> str:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT | variables | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == exit_code, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_a_run_is_pushed_with_its_card_and_read_by_its_id(call, hub, tmp_path):
    run = write_run(tmp_path / "run")
    printed = call("-m", "megascale", "export", str(run), "--push-to-hub", "me/audio", "--private")
    assert f"{hub.endpoint}/me/audio" in printed and hub.private == {"me/audio"}
    files = hub.repos["me/audio"]
    kept = run / "checkpoints" / "step-00000010" / "model"
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (kept / "model.safetensors").read_bytes()
    assert files["config.json"] == (kept / "config.json").read_bytes()
    assert b"| updates | 10 of 20 |" in files["README.md"]

    export = ["-m", "megascale", "export", "me/audio"]
    call(*export, str(tmp_path / "by_id"))
    # what was fetched once is read without the hub
    call(*export, str(tmp_path / "offline"), HF_HUB_OFFLINE="1")
    for folder in ("by_id", "offline"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()


def test_all_files_are_of_one_commit_though_another_is_pushed_meanwhile(call, hub, tmp_path):
    kept = [write_run(tmp_path / "run") / "checkpoints" / f"step-000000{step}" / "model" for step in (10, 20)]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in kept)
    hub.repos["me/audio"] = dict(first)

    def push() -> None:
        hub.repos["me/audio"] = second | {"README.md": b"of the second"}

    hub.meanwhile["config.json"] = push
    export = ["-m", "megascale", "export", "me/audio"]
    call(*export, str(tmp_path / "first"))
    assert hub.repos["me/audio"]["README.md"] == b"of the second", "it was pushed"
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == first["model.safetensors"]
    assert "of the second" not in (tmp_path / "first" / "README.md").read_text()
    call(*export, str(tmp_path / "second"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == second["model.safetensors"]


def test_a_hub_that_refuses_or_has_no_such_repo_is_one_line_and_exit_2(call, hub, tmp_path):
    run, out = write_run(tmp_path / "run"), str(tmp_path / "out")
    hub.repos["me/notes"] = {"README.md": b"no model"}
    hub.repos["me/half"] = {"config.json": json.dumps(facts_of()).encode()}
    export = ["-m", "megascale", "export"]
    for arguments, environment, said in (
        (
            [*export, "me/nowhere", out],
            {},
            "me/nowhere: no such folder here; config.json of that repo: ",
        ),
        (
            [*export, "me/notes", out],
            {},
            "me/notes: no such folder here, and no config.json in that repo",
        ),
        ([*export, "me/half", out], {}, "me/half: no model.safetensors in that repo"),
        (
            [*export, str(run), "--push-to-hub", "me/audio"],
            {"HF_TOKEN": "hf_wrong"},
            "me/audio: the",
        ),
    ):
        printed = call(*arguments, exit_code=2, **environment)
        lines = [line for line in printed.splitlines() if "Error: " in line]
        assert len(lines) == 1 and said in lines[0] and "Traceback" not in printed
    assert "me/audio" not in hub.repos and not os.path.exists(out)


def test_first_weights_are_read_from_a_repo_in_shards(call, hub, tmp_path):
    weights = tensors(SHAPE)
    parts = {"a.safetensors": ".layers.0.", "b.safetensors": ".layers.1.", "c.safetensors": "model.norm."}
    shards = {shard: {key: value for key, value in weights.items() if part in key} for shard, part in parts.items()}
    index = {"weight_map": {key: shard for shard, held in shards.items() for key in held}}
    hub.repos["lm/small"] = {
        "config.json": json.dumps(config_of(SHAPE)).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{shard: safetensors.torch.save(held) for shard, held in shards.items()},
    }
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch, safetensors.torch\n"
        "from megascale.model.config import ModelConfig\n"
        "from megascale.model.language_model import load_language_model\n"
        "from megascale.model.mega_audioformer import GlobalEncoder\n"
        "encoder = GlobalEncoder(ModelConfig.model_validate_json(sys.argv[1]), 2)\n"
        "load_language_model(encoder, 'hf:lm/small')\n"
        "safetensors.torch.save_file(dict(encoder.named_parameters()), sys.argv[2])\n"
    )
    call(str(script), SHAPE.model_dump_json(), str(tmp_path / "out.safetensors"), PYTHONPATH=str(ROOT))
    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(loaded["norm.weight"], weights["model.norm.weight"])
    for i in range(SHAPE.layers):
        for ours, theirs in (("mlp.down_proj", "mlp.down_proj"), ("mlp_norm", "post_attention_layernorm")):
            assert torch.equal(loaded[f"blocks.{i}.{ours}.weight"], weights[f"model.layers.{i}.{theirs}.weight"])
