"""The whole way in one command: on the synthesised corpus, and on a stranger's folder."""

import json
import os
import re
from itertools import product
from pathlib import Path

import matplotlib.image
import pytest
import soundfile
from conftest import ROOT, command, run
from support import tone, write_tones

from megascale.downstream.table1_config import ARMS, BITRATES_KBPS
from megascale.table_baselines import CHANCE, LOG_MEL, bag_of_codes

TASKS = ("gtzan", "nsynth", "music_speech")
BASELINES = (LOG_MEL, bag_of_codes(1.5), bag_of_codes(12), CHANCE)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("quickstart") / "out"
    return output, run(command("quickstart.py", "configs/quickstart/smoke.yaml", f"output.url={output}"), timeout=600)


def test_every_cell_of_the_table_is_there_with_its_scores(made):
    summary = json.loads((made[0] / "summary.json").read_text())
    cells = {(c["task"], c["arm"], c["bitrate_kbps"]): c for c in summary["cells"]}
    assert set(cells) == set(product(TASKS, ARMS, BITRATES_KBPS)) and len(summary["cells"]) == 18
    for cell in cells.values():
        assert 0 <= cell["accuracy"] <= 1 and 0 <= cell["macro_f1"] <= 1
        assert cell["count"] > 0 and cell["seed"] == 0
        assert cell["lrs"][0] in cell["lrs_tried"] and len(cell["lrs"]) == 1
    assert len({tuple(c["lrs_tried"]) for c in cells.values()}) == 1 and "train" in summary["budget"]["finetune"]
    for task in TASKS:
        assert tuple(summary["baselines"][task]) == BASELINES
    assert summary["above_unigram_q0"].keys() == {"1.5", "12"}
    assert "scratch" in summary["verdict"]


def test_terminal_ends_with_the_table_and_what_to_run_next(made):
    output, printed = made
    for stage in range(1, 7):
        assert f"[{stage}/6]" in printed
    for title in ("synthesising", "tokenising", "pretraining 1.5 kbps", "pretraining 12 kbps", "fine-tuning"):
        lines = re.findall(rf"^{title}  +\d+%  \d+/\d+ \w+  .+$", printed, flags=re.MULTILINE)
        assert lines, f"no progress of {title}"
        assert all(re.search(r"  (\d+[smhd]\w* (taken|left)|\? left)", line) for line in lines), lines
        assert re.search(r"  \d+[smhd]\w* taken", lines[-1])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [[task, kind] for task in TASKS for kind in (*ARMS, *BASELINES)]
    cells = {
        (c["task"], c["arm"], c["bitrate_kbps"]): c for c in json.loads((output / "summary.json").read_text())["cells"]
    }
    for task, arm, *scores, count in rows:
        for kbps, shown in zip(BITRATES_KBPS, scores if arm in ARMS else (), strict=False):
            cell = cells[task, arm, kbps]
            assert shown == f"{100 * cell['accuracy']:.1f} ({100 * cell['macro_f1']:.1f})"
            assert count == str(cell["count"])
    assert str(output / "report.html") in printed and "next: " in printed


def test_page_is_whole_and_its_pictures_can_be_read(made):
    output, _ = made
    page = (output / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for text in ("Classification", "Pretraining", "Audio and tokens", "Confusion matrices", "NOT", "calibrated on"):
        assert text in page
    for name in ("loss", "codebooks", "clips", *(f"confusion-{task}" for task in TASKS)):
        assert matplotlib.image.imread(output / f"{name}.png").std() > 0.01


def test_finished_quickstart_does_nothing_again(made):
    output, _ = made
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    printed = run(command("quickstart.py", "configs/quickstart/smoke.yaml", f"output.url={output}"))
    assert "already done" in printed
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


@pytest.mark.slow
def test_own_folder_is_classified_by_its_sub_folders_and_lies_beside_what_was_made_before(made, tmp_path):
    mine = tmp_path / "my sounds: #1 [é]"
    write_tones(mine, 30, seconds=1.0)
    write_damaged(mine)
    before = (made[0] / "summary.json").read_bytes()
    own = [f'data="{mine}"', f"output.url={made[0]}", "ranks=1"]
    printed = run(command("quickstart.py", "configs/quickstart/smoke.yaml", *own), exit_code=3)
    assert (
        "QuarantineExceeded: " in printed.splitlines()[-1] and "5 of 39 clips quarantined" in printed.splitlines()[-1]
    )
    assert "only pretraining uses them: few (2), " in printed
    assert (made[0] / "summary.json").read_bytes() == before
    output = made[0].with_name(f"out-{mine.name}")
    summary = json.loads((output / "summary.json").read_text())
    assert {c["task"] for c in summary["cells"]} == {"folders"} and len(summary["cells"]) == 6
    assert all(c["count"] == 6 for c in summary["cells"])
    assert summary["baselines"]["folders"][LOG_MEL]["seeds"][0]["classes"] == ["high", "low"]
    table = json.loads((output / "table1" / "table1.json").read_text())
    assert all(cell["classes"] == ["high", "low"] for cell in table["cells"])
    # 16 and 15 recordings: the half readable one is among them, the broken ones and the small folders are not
    assert all(sum(cell["split_sizes"].values()) == 31 for cell in table["cells"])
    assert summary["clips"] == {"pretrain": {"stored": 34, "quarantined": 5}}
    page = (output / "report.html").read_text()
    assert "test files included" in page and "5 clips could not be read" in page
    # the same audio from another place: finished, and it ends as it did
    again = [f'data="{os.path.relpath(mine, ROOT)}"', f"output.url={made[0]}"]
    assert "already done" in run(command("quickstart.py", "configs/quickstart/smoke.yaml", *again), exit_code=3)


def write_damaged(folder: Path) -> None:
    """Add what a stranger's folder holds: broken files, a recording cut short, a loose file, a folder of few files."""
    (folder / "few").mkdir()
    for i in range(2):
        soundfile.write(folder / "few" / f"{i}.wav", tone(1.0, 22_050, 600, seed=i), 22_050)
    for i in range(3):
        (folder / "few" / f"broken-{i}.wav").write_text("not audio")
    (folder / "low" / "broken.wav").write_text("not audio")
    half = folder / "low" / "half.flac"  # two windows of 3 s, the second cut short
    soundfile.write(half, tone(6.0, 22_050, 150), 22_050)
    half.write_bytes(half.read_bytes()[: int(0.9 * half.stat().st_size)])
    soundfile.write(folder / "loose.wav", tone(1.0, 22_050, 300), 22_050)


@pytest.mark.slow
def test_quickstart_as_documented_learns_more_than_the_unigram_baseline(tmp_path):
    """The recipe of `make quickstart`; minutes long."""
    run(command("quickstart.py", "configs/quickstart/small.yaml", f"output.url={tmp_path}"), timeout=1800)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["cells"]) == 18
    assert summary["above_unigram_q0"] == {"1.5": True, "12": True}
    for result in summary["pretraining"]:
        found = result["validation"]
        assert found["valid/acc_q0"] > 5 * found["valid/unigram_acc_q0"]  # 265 and 9 times when this was written
