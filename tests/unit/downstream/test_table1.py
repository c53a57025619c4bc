"""The table's job: what it checks before it starts anything, and what of it outlives another config."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
from support import tone, write_pretrained
from tables import finish_cells, write_inputs

from megascale.config import validate
from megascale.data.index import read_clips, read_manifest
from megascale.downstream import table1
from megascale.downstream.pool import CellJob
from megascale.downstream.protocols import TaskConfig, each_fold, split_clips
from megascale.downstream.table1 import _plan
from megascale.downstream.table1_config import Table1Config
from megascale.downstream.watch_config import WatchConfig
from megascale.errors import CheckpointError, ConfigError, DataError, MegascaleError
from megascale.table_baselines import CHANCE, LOG_MEL, check_recordings, score_baselines
from megascale.tasks import finetune
from megascale.tasks.finetune import FinetuneConfig
from megascale.tasks.finetune_data import check_clips
from megascale.train import checkpoint

JOB = CellJob(FinetuneConfig, finetune.check, check_clips, finetune.run)
BASELINES = table1.BaselineJob(check_recordings, score_baselines)


@pytest.fixture
def tree(tmp_path) -> dict[str, Any]:
    return write_inputs(tmp_path)


def config_of(tree: dict[str, Any], **changes: Any) -> Table1Config:
    return validate(Table1Config, "table1", tree | changes)


def make(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Make a table whose cells are all finished."""
    config = config_of(tree, **changes)
    finish_cells(config, JOB, BASELINES)
    return table1.run(config, JOB, BASELINES)


def times(places: list[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in places}


@pytest.mark.parametrize(("working_dir", "url", "kept"), [("gcs://_ray_pkg_0.zip", "runs/t", False), (None, "t", True)])
def test_relative_output_is_refused_only_in_rays_copy_of_the_working_directory(
    tmp_path, monkeypatch, working_dir, url, kept
):
    """As `ray job submit` tells its job. What is not refused goes on to the token folders, of which there are none."""
    monkeypatch.chdir(tmp_path)
    environment = {"working_dir": working_dir} if working_dir else {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
    data = dict.fromkeys(("gtzan", "nsynth", "music_speech"), str(tmp_path / "none"))
    lost = f"^table1.output.url={url}: lies in Ray's copy of the working directory, which Ray deletes; "
    for output, refused in ((url, not kept), (str(tmp_path / "t"), False)):
        tree = {"data": data, "checkpoints": {"1k5": "none", "12k": "none"}, "output": {"url": output}}
        with pytest.raises(MegascaleError, match=lost if refused else "none"):
            table1.run(validate(Table1Config, "table1", tree), JOB, BASELINES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"label": "nothing"}, "0000.wav: has no label 'nothing'"),
        ({"label": "class", "classes": ["low", "middle"]}, "task.classes: no clip has the class 'middle'"),
        ({"label": "class", "protocol": "stratified", "test_share": 0.99, "valid_share": 0.001}, "too few"),
    ],
)
def test_what_is_wrong_with_the_clips_of_any_task_is_found_before_anything_is_written(tree, task, told):
    config = config_of(tree, tasks={"music_speech": task})
    for start in (lambda: table1.describe_plan(config, JOB, BASELINES), lambda: table1.run(config, JOB, BASELINES)):
        with pytest.raises(DataError, match=told):
            start()
    assert not Path(config.output.url).exists()


def test_task_of_several_labels_a_clip_is_refused_where_accuracies_are_compared(tree):
    told = ".kind=multi: accuracies are compared here, and it has none; launch/finetune.py scores it$"
    several = {"label": "tags", "kind": "multi"}
    with pytest.raises(ConfigError, match=rf"^table1: tasks\.nsynth{told}"):
        config_of(tree, tasks={"nsynth": several})
    tree = {"run": "run", "output": {"url": "out"}, "tasks": {"tags": {"url": "tokens", "task": several}}}
    with pytest.raises(ConfigError, match=rf"^watch: tasks\.tags\.task{told}"):
        validate(WatchConfig, "watch", tree)


def test_splits_of_every_fold_are_looked_at_before_anything_is_written(tree):
    task = TaskConfig(label="class", protocol="folds", folds=21)  # 20 low clips and 20 high ones: each misses one fold
    clips = list(read_clips(tree["data"]["gtzan"], read_manifest(tree["data"]["gtzan"]), 2))

    def fits(fold: TaskConfig) -> bool:
        splits = split_clips(clips, fold, 0)
        return all(len({clips[i].labels["class"] for i in splits[side]}) == 2 for side in ("valid", "test"))

    assert fits(each_fold(task)[0]) and not all(map(fits, each_fold(task)))
    config = config_of(tree, tasks={"gtzan": task.model_dump()})
    with pytest.raises(DataError, match=r"all 1 clips of the (valid|test) split are of"):
        table1.run(config, JOB, BASELINES)
    assert not Path(config.output.url).exists()


# ------------------------------------------------------------------------------------------------- the same table again


@pytest.mark.parametrize("changes", [{}, {"storage": {"endpoint_url": "http://127.0.0.1:1"}}])
def test_finished_table_is_not_made_again(tree, changes, capsys):
    table = make(tree)
    written = Path(tree["output"]["url"], table1.TABLE)
    before = times([written])
    assert table1.run(config_of(tree, **changes), JOB, BASELINES) == json.loads(json.dumps(table))
    assert "already done" in capsys.readouterr().err
    more_gpus = config_of(tree, cells=tree["cells"] | {"gpus_each": 0.5})
    table1.run(more_gpus, JOB, BASELINES)
    assert times([written]) == before


@pytest.mark.parametrize(
    "changes", [{"seeds": [0, 1]}, {"map_recordings": 7}, {"cells": {"lrs": [1e-3, 1e-2], "gpus_each": 0.5}}]
)
def test_what_is_added_to_a_finished_table_costs_no_cell_that_is_there(tree, changes):
    make(tree)
    cells = finish_cells(config_of(tree), JOB, BASELINES)
    before = times(cells)
    changes = changes | {"cells": tree["cells"] | changes.get("cells", {})}
    table = make(tree, **changes)
    assert times(cells) == before
    config = config_of(tree, **changes)
    assert {len(summary["seeds"]) for summary in table["summary"]} == {len(config.seeds)}
    assert {len(summary["lrs_tried"]) for summary in table["summary"]} == {len(config.cells.lrs)}
    assert json.loads(Path(tree["output"]["url"], table1.TABLE).read_bytes()) == json.loads(json.dumps(table))
    assert {len(summary["seeds"]) for summary in make(tree)["summary"]} == {1}, "and back again"


def test_cells_of_another_budget_are_refused_by_name_and_the_table_stays(tree):
    make(tree)
    before = times(list(Path(tree["output"]["url"]).rglob("*.json")))
    other = config_of(tree, cells={"lrs": [1e-3], "finetune": {"train": {"epochs": 9}}})
    for start in (lambda: table1.describe_plan(other, JOB, BASELINES), lambda: table1.run(other, JOB, BASELINES)):
        with pytest.raises(ConfigError, match=r"finetune.train.epochs=9: the run in .*/cells/gtzan-1.5kbps-scratch-"):
            start()
    assert times(list(before)) == before


# ----------------------------------------------------------------------------------------------------------- baselines


def write_audio(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        soundfile.write(folder / f"{i:04d}.wav", tone(1.0, 24_000, (150, 1500)[i % 2], seed=i), 24_000)


def test_table_that_was_left_over_from_another_config_is_not_taken_for_this_ones(tmp_path):
    """The job ended between its config and its table."""
    tree = write_inputs(tmp_path, str(tmp_path / "audio"))
    make(tree)
    write_audio(tmp_path / "audio")
    broken = tmp_path / "audio" / "0017.wav"
    whole = broken.read_bytes()
    broken.write_bytes(b"no audio")
    with pytest.raises(MegascaleError, match=r"0017\.wav"):
        make(tree, seeds=[0, 1], baselines=True)
    broken.write_bytes(whole)
    table = table1.run(config_of(tree, seeds=[0, 1], baselines=True), JOB, BASELINES)
    assert {len(summary["seeds"]) for summary in table["summary"]} == {2} and len(table["baselines"]) == 3


@pytest.mark.parametrize("lost", ["0017.wav", "."])
def test_audio_that_baselines_need_is_looked_for_before_anything_is_written(tmp_path, lost):
    tree = write_inputs(tmp_path, str(tmp_path / "audio")) | {"baselines": True}
    write_audio(tmp_path / "audio")
    assert table1.describe_plan(config_of(tree), JOB, BASELINES).startswith("18 fine-tuning runs")
    if lost == ".":
        shutil.rmtree(tmp_path / "audio")
    else:
        (tmp_path / "audio" / lost).unlink()
    told = f"{tmp_path}/audio: no such folder" if lost == "." else "0017.wav: was tokenised, and is no longer among the"
    for start in (table1.describe_plan, table1.run):
        with pytest.raises(MegascaleError, match=f"^{told}"):
            start(config_of(tree), JOB, BASELINES)
    assert not Path(tree["output"]["url"]).exists()
    assert make(tree, baselines=False)["baselines"] == {}


def test_baselines_are_scored_once_for_the_same_splits(tmp_path):
    tree = write_inputs(tmp_path, str(tmp_path / "audio")) | {"baselines": True}
    write_audio(tmp_path / "audio")
    found = make(tree)["baselines"]
    assert all(scores[LOG_MEL]["accuracy"] == 1.0 and scores[CHANCE]["accuracy"] < 0.8 for scores in found.values())
    shutil.rmtree(tmp_path / "audio")
    assert make(tree, cells=tree["cells"] | {"lrs": [1e-3, 1e-2]})["baselines"] == json.loads(json.dumps(found))
    with pytest.raises(MegascaleError, match="no such folder"):
        make(tree, seeds=[0, 1])


# ------------------------------------------------------------------------------------------------- one encoder a table


def save(run: Path, step: int, valid_loss: float) -> None:
    """A checkpoint of a pretraining run at 1.5 kbps, whose weights are drawn from its step."""
    folder = checkpoint.step_folder(run / "checkpoints", step)
    checkpoint.begin(folder)
    write_pretrained(folder / "model", 2, seed=step)
    checkpoint.commit(folder, step, 16 * step, 1, valid_loss)


def test_table_keeps_to_the_checkpoint_it_began_with_when_a_run_that_goes_on_has_a_better_one(tree, tmp_path):
    run = tmp_path / "run"
    save(run, 1, 3.0)
    tree["checkpoints"]["1k5"] = str(run)
    first = make(tree)
    save(run, 2, 2.0)
    make(tree, seeds=[0, 1])
    config = config_of(tree, seeds=[0, 1])
    own = {
        finetuned.checkpoint
        for finetuned in _plan(config, JOB, BASELINES).configs
        if finetuned.data.bitrate_kbps == 1.5
    }
    begun = f"{run}/checkpoints/step-00000001"
    assert own == {begun} and table1.checkpoints_of(config)[1.5] == begun
    digest = hashlib.sha256(Path(begun, "model", "model.safetensors").read_bytes()).hexdigest()
    assert first["checkpoints"][str(run)] == {"url": begun, "step": 1, "sha256": digest}
    # another table of the same run begins with what is best by now
    other = config_of(tree, output={"url": str(tmp_path / "other")})
    assert table1.checkpoints_of(other)[1.5] == f"{run}/checkpoints/step-00000002"


def test_checkpoint_that_is_gone_or_has_other_weights_by_now_is_refused(tree, tmp_path):
    run, bare = tmp_path / "run", Path(tree["checkpoints"]["12k"])
    save(run, 1, 3.0)
    tree["checkpoints"]["1k5"] = str(run)
    make(tree)
    before = (bare / "model.safetensors").read_bytes()
    write_pretrained(bare, 16, seed=9)
    with pytest.raises(CheckpointError, match=f"^{bare}: not the weights that this table began with; choose another "):
        make(tree, seeds=[0, 1])
    (bare / "model.safetensors").write_bytes(before)
    save(run, 2, 2.0)
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"step-00000001: no manifest; .*; this table began with it"):
        make(tree, seeds=[0, 1])
    # what is finished needs no checkpoint any more
    Path(tree["output"]["url"], table1.TABLE).unlink()
    assert table1.run(config_of(tree), JOB, BASELINES)["checkpoints"][str(run)]["step"] == 1
