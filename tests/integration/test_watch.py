"""Watching a pretraining run: every Nth checkpoint is fine-tuned once, while the run goes on and after it."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, command, run

LEARN = ["train.steps=8", "train.validate_every=2", "checkpoint.every=2", "checkpoint.keep_every=2"]


def pretrain(tokens: Path, output: Path) -> list[str]:
    return command("pretrain.py", "configs/pretrain/smoke.yaml", f"data.url={tokens}", f"output.url={output}", *LEARN)


def watch(watched: str | Path, tokens: Path, output: Path, *overrides: str) -> list[str]:
    places = (f"run={watched}", f"tasks.class.url={tokens}", f"output.url={output}")
    return command("watch.py", "configs/watch/smoke.yaml", *places, "poll_seconds=0.2", *overrides)


def curve(output: Path) -> dict[str, object]:
    return json.loads((output / "watch.json").read_text())


def steps(output: Path) -> list[int | None]:
    return [point["step"] for point in curve(output)["points"]]


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    run(pretrain(tokens, output))
    return output


def test_checkpoints_of_a_run_that_goes_on_are_evaluated_until_it_ends(tokens, tmp_path, start):
    learning = start(pretrain(tokens, tmp_path / "run"))
    while not (tmp_path / "run" / "config.yaml").exists():
        assert learning.poll() is None
    printed = run(watch(tmp_path / "run", tokens, tmp_path / "out"))
    assert learning.wait() == 0
    assert steps(tmp_path / "out") == [None, 2, 4, 6, 8]
    assert list((tmp_path / "out" / "models").iterdir()) == []
    assert "4 checkpoints evaluated" in printed
    assert all(0 <= point["accuracy"] <= 1 and point["count"] > 0 for point in curve(tmp_path / "out")["points"])
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "from scratch" in (tmp_path / "out" / "report.html").read_text()


def test_only_what_is_missing_is_trained_and_checkpoints_may_be_gone_by_then(finished, tokens, tmp_path):
    mine, output = tmp_path / "run", tmp_path / "out"
    shutil.copytree(finished, mine)
    run(watch(mine, tokens, output, "every=4", "follow=false"))
    assert steps(output) == [None, 4, 8]
    before = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")}
    assert len(before) == 3
    # as a start that was killed leaves it: step 4's classifier is not trained, and its model was copied
    lost = output / "runs" / "step-00000004-class-seed0" / "result.json"
    lost.unlink()
    model = mine / "checkpoints" / "step-00000004" / "model"
    shutil.copytree(model, output / "models" / "00000004")
    shutil.rmtree(model.parent)
    run(watch(mine, tokens, output, "every=4", "follow=false"))
    assert {p for p in before if p.stat().st_mtime_ns != before[p]} == {lost}
    assert steps(output) == [None, 4, 8]
    # what is trained needs neither checkpoint nor copy
    before, curve_file = {path: path.stat().st_mtime_ns for path in before}, output / "watch.json"
    assert list((output / "models").iterdir()) == []
    known = curve(output)
    curve_file.unlink()
    run(watch(mine, tokens, output, "every=4", "follow=false"))
    assert {path: path.stat().st_mtime_ns for path in before} == before and curve(output) == known
    assert list((output / "models").iterdir()) == []


def test_finished_watch_says_so_and_touches_nothing(finished, tokens, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(watch(finished, tokens, output, "every=8"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setitem(ENVIRONMENT, "RAY_ADDRESS", "127.0.0.1:1")  # where there is no Ray to join
    printed = run(watch(finished, tokens, output, "every=8"))
    assert f"{output / 'watch.json'}: already done\n1 checkpoints evaluated" in printed
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_what_cannot_be_watched_is_one_line(finished, tokens, tmp_path):
    cases = {
        tmp_path / "none": "no pretraining run there: config.yaml is missing; start it first",
        finished: "has no checkpoint whose step is a multiple of every=7",
    }
    for watched, told in cases.items():
        printed = run(watch(watched, tokens, tmp_path / "out", "every=7"), exit_code=2)
        assert told in printed
    printed = run(watch(finished, tokens, tmp_path / "out", "finetune.seed=3", "follow=false"), exit_code=2)
    assert "finetune.seed: is set here" in printed
    assert not (tmp_path / "out").exists()
