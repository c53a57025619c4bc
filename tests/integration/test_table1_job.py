"""The paper's table end to end on Ray: every cell trained once, from tiny encoders."""

import json
import re
from pathlib import Path

import pytest
import soundfile
from conftest import ENVIRONMENT, command, run
from fault_proxy import FaultProxy
from s3_servers import keys_in_environment, moto
from support import tone, write_paced_tokens, write_pretrained

from megascale import run_folder
from megascale.table_baselines import CHANCE, LOG_MEL, bag_of_codes
from megascale.train import checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> list[str]:
    """Write tokens of two classes with their audio, and two tiny encoders; return what tells the table of them."""
    (folder / "audio").mkdir()
    for i in range(40):
        path, pitch_hz = folder / "audio" / f"{i:04d}.wav", (150, 1500)[i % 2] * (1 + 0.01 * i)
        soundfile.write(path, tone(1.0, 24_000, pitch_hz, seed=i), 24_000, subtype="PCM_16")
    write_paced_tokens(folder / "tokens", 40, audio=str(folder / "audio"))
    for num_codebooks in (2, 16):
        write_pretrained(folder / f"model-q{num_codebooks}", num_codebooks)
    data = [f"data.{name}={folder / 'tokens'}" for name in ("gtzan", "nsynth", "music_speech")]
    labels = ["tasks.gtzan.label=class", "tasks.nsynth.label=class"]
    return [*data, *labels, f"checkpoints.1k5={folder / 'model-q2'}", f"checkpoints.12k={folder / 'model-q16'}"]


def table1(output: Path, inputs: list[str], *overrides: str) -> list[str]:
    return command("table1.py", "configs/table1/smoke.yaml", f"output.url={output}", *inputs, *overrides)


def test_table_is_made_once_and_goes_on_where_it_stopped(inputs, tmp_path):
    output = tmp_path / "out"
    inputs = [*inputs, "tasks.music_speech={label: class, protocol: folds, folds: 3}"]
    printed = run(table1(output, inputs))
    assert "fine-tuning  100%  30/30 runs" in printed
    table = json.loads((output / "table1.json").read_text())
    assert len(table["cells"]) == len(table["summary"]) == 18
    assert all(cell["paper"]["accuracy"] > 0.2 for cell in table["summary"])
    markdown = (output / "table1.md").read_text()
    rows = [LOG_MEL, bag_of_codes(1.5), bag_of_codes(12), CHANCE]
    assert [list(found) for found in table["baselines"].values()] == [rows] * 3
    # the classes are an octave and more apart, and the splits are the cells'
    assert {found[LOG_MEL]["accuracy"] for found in table["baselines"].values()} == {1.0}
    counts = {(cell["task"], cell["count"]) for cell in table["summary"]}
    assert counts == {("gtzan", 8), ("nsynth", 10), ("music_speech", 40)}, "each of all recordings in one of the folds"
    assert {(task, found[CHANCE]["count"]) for task, found in table["baselines"].items()} == counts
    page = (output / "table1.html").read_text()
    assert "(69.00)" in markdown and "69.00" in page
    assert all(markdown.count(f"| {name} |") == page.count(f"<td>{name}</td>") == 3 for name in rows)
    assert len(re.findall(r"^\| (?:gtzan|nsynth|music_speech) ", markdown, re.M)) == 3 * (3 + len(rows))
    assert (output / "embeddings.png").read_bytes().startswith(b"\x89PNG")

    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    assert "already done" in run(table1(output, inputs))
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before

    (output / "table1.json").unlink()
    lost = next((output / "cells").glob("nsynth-12kbps-ft-*/result.json"))
    lost.unlink()
    assert "30/30 runs" in run(table1(output, inputs))
    changed = {p for p in output.rglob("result.json") if p not in before or p.stat().st_mtime_ns != before[p]}
    assert changed == {lost}
    assert json.loads((output / "table1.json").read_text())["summary"] == table["summary"]


def test_cells_of_another_budget_are_not_taken_for_this_ones(inputs, tmp_path):
    output = tmp_path / "out"
    cell = "gtzan-1.5kbps-scratch-seed0-lr0.001"
    (output / "cells" / cell).mkdir(parents=True)
    (output / "cells" / cell / "config.yaml").write_text("train: {epochs: 99}\n")
    printed = run(table1(output, inputs), exit_code=2)
    assert "the run in" in printed and cell in printed


def test_what_a_cell_cannot_use_is_one_line_before_ray_starts(inputs, tmp_path):
    printed = run(table1(tmp_path / "out", inputs, f"checkpoints.12k={tmp_path / 'gone'}"), exit_code=2)
    assert printed.count("\n") == 1 and "CheckpointError" in printed
    assert not (tmp_path / "out").exists()


def test_each_checkpoint_in_a_store_is_copied_once_for_all_cells_and_the_page(inputs, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(temporary))
    monkeypatch.setitem(ENVIRONMENT, "RAY_TMPDIR", "/tmp")  # its sockets' paths may not be long
    for name, num_codebooks in (("run-1k5", 2), ("run-12k", 16)):
        folder = checkpoint.step_folder(tmp_path / name / "checkpoints", 1)
        checkpoint.begin(folder)
        write_pretrained(folder / "model", num_codebooks)
        checkpoint.commit(folder, 1, 16, 1, 2.0)
    with keys_in_environment(), moto() as server, FaultProxy(server.endpoint, 0) as store:
        for name in ("run-1k5", "run-12k"):
            server.upload(tmp_path / name, name)
        urls = ["checkpoints.1k5=s3://bucket/run-1k5", "checkpoints.12k=s3://bucket/run-12k"]
        run(table1(tmp_path / "out", inputs, *urls, f"storage.endpoint_url={store.url}", "baselines=false"))
        reads = {name: count for name, count in store.asked.items() if name.startswith("GET") and "model/" in name}
    files = [f"checkpoints/step-00000001/model/{name}" for name in ("config.json", "model.safetensors")]
    assert reads == {f"GET /bucket/{name}/{file}": 1 for name in ("run-1k5", "run-12k") for file in files}
    table = json.loads((tmp_path / "out" / "table1.json").read_text())
    pinned = {f"s3://bucket/{name}/checkpoints/step-00000001" for name in ("run-1k5", "run-12k")}
    assert {cell["checkpoint"] for cell in table["cells"]} == {None} | pinned
    assert (tmp_path / "out" / "embeddings.png").exists()


def test_what_ends_one_cell_ends_the_table_with_one_line(inputs, tmp_path):
    cell = tmp_path / "out" / "cells" / "nsynth-12kbps-ft-seed0-lr0.001"
    with run_folder.lock(cell):
        printed = run(table1(tmp_path / "out", inputs), exit_code=2)
    told = f"FolderInUse: {cell}: another process is at work in this folder; wait for it, or stop it"
    assert f"\n{told}\n" in f"\n{printed}"
    assert "Traceback" not in printed
    assert not (tmp_path / "out" / "table1.json").exists()


def test_what_is_wrong_with_clips_is_one_line_before_ray_starts(inputs, tmp_path):
    for more in ([], ["--dry-run"]):
        printed = run(table1(tmp_path / "out", inputs, "tasks.nsynth.label=nothing", *more), exit_code=2)
        assert printed == "DataError: 0000.wav: has no label 'nothing' (task.label); its labels: class\n"
    assert not (tmp_path / "out").exists()
