"""Table 1: a fair fight between the arms, rates chosen without the test set, and the paper's figures beside ours."""

import itertools
import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import scipy.stats

from megascale.config import validate
from megascale.downstream import table1
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1 import PAPER, LabelledTokens
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS, CellsConfig, Table1Config
from megascale.errors import ConfigError, MegascaleError
from megascale.table_baselines import score_baselines
from megascale.tasks import finetune
from megascale.tasks.finetune import FinetuneConfig

CHECKPOINTS = {1.5: "run-1k5", 12.0: "run-12k"}
PAPERS = table1.paper_arms(CHECKPOINTS)
LRS = [1e-4, 3e-4, 1e-3]
BUDGET = CellsConfig(lrs=LRS, finetune={"train": {"epochs": 3}, "drop": {"p": 0.5}, "optim": {"clip_norm": 2.0}})
ROWS = [
    LabelledTokens("gtzan", "tokens/gtzan", TaskConfig(label="genre")),
    LabelledTokens("nsynth", "tokens/nsynth", TaskConfig(label="instrument_family_str", protocol="official")),
]


def trees(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    return [table1._finetune_tree(cell, PAPERS, BUDGET, "out") for cell in table1._cells(ROWS, PAPERS, seeds, BUDGET)]


def result(cell: table1.Cell, **scores: float) -> dict[str, Any]:
    """What a fine-tuning run returns, as far as the table reads it."""
    known = {"accuracy": 0.5, "macro_f1": 0.4, "valid_accuracy": 0.5, "valid_loss": 1.0, "count": 100}
    return known | {"arm": cell.arm, "bitrate_kbps": cell.bitrate_kbps, "seed": cell.seed, "lr": cell.lr} | scores


def chosen(scores: dict[tuple[float, int], dict[str, float]], seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The summary of ROWS[0], scratch, 1.5 kbps, given scores by rate and seed there; all else is equal."""
    finished = []
    for cell in table1._cells(ROWS[:1], PAPERS, seeds, BUDGET):
        here = cell.arm == "scratch" and cell.bitrate_kbps == 1.5
        finished.append((cell, result(cell, **(scores.get((cell.lr, cell.seed), {}) if here else {}))))
    found = table1._choose(ROWS[:1], finished)
    return next(s for s in found["summary"] if (s["arm"], s["bitrate_kbps"]) == ("scratch", 1.5))


# ------------------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize(("working_dir", "url", "kept"), [("gcs://_ray_pkg_0.zip", "runs/t", False), (None, "t", True)])
def test_relative_output_is_refused_only_in_rays_copy_of_the_working_directory(
    tmp_path, monkeypatch, working_dir, url, kept
):
    """As `ray job submit` tells its job. What is not refused goes on to the token folders, of which there are none."""
    monkeypatch.chdir(tmp_path)
    environment = {"working_dir": working_dir} if working_dir else {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
    data = dict.fromkeys(("gtzan", "nsynth", "music_speech"), str(tmp_path / "none"))
    job = table1.CellJob(FinetuneConfig, finetune.check, finetune.run)
    lost = f"^table1.output.url={url}: lies in Ray's copy of the working directory, which Ray deletes; "
    for output, refused in ((url, not kept), (str(tmp_path / "t"), False)):
        tree = {"data": data, "checkpoints": {"1k5": "none", "12k": "none"}, "output": {"url": output}}
        with pytest.raises(MegascaleError, match=lost if refused else "none"):
            table1.run(validate(Table1Config, "table1", tree), job, score_baselines)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- cells


def test_every_arm_and_bitrate_gets_the_same_rates_and_seeds():
    tried = defaultdict(list)
    for tree in trees():
        tried[tree["data"]["url"], tree["arm"], tree["data"]["bitrate_kbps"]].append(
            (tree["seed"], tree["optim"]["lr"])
        )
    assert tried.keys() == set(itertools.product(("tokens/gtzan", "tokens/nsynth"), ARMS, BITRATES_KBPS))
    assert {tuple(runs) for runs in tried.values()} == {tuple(itertools.product((0, 1), LRS))}


def test_cells_of_a_task_differ_in_nothing_but_arm_bitrate_seed_and_rate():
    for tokens, task in (("tokens/gtzan", "genre"), ("tokens/nsynth", "instrument_family_str")):
        rest = []
        for tree in trees():
            if tree["data"]["url"] == tokens:
                assert tree["task"]["label"] == task
                assert tree["checkpoint"] == CHECKPOINTS[tree["data"]["bitrate_kbps"]]
                config = validate(FinetuneConfig, "finetune", tree).model_dump()
                for key in ("arm", "seed", "checkpoint", "output"):
                    del config[key]
                del config["data"]["bitrate_kbps"], config["optim"]["lr"]
                rest.append(config)
        assert all(config == rest[0] for config in rest)
        assert (rest[0]["train"]["epochs"], rest[0]["drop"]["p"], rest[0]["optim"]["clip_norm"]) == (3, 0.5, 2.0)


def test_every_cell_has_a_folder_of_its_own_below_the_output():
    urls = [tree["output"]["url"] for tree in trees()]
    assert len(set(urls)) == len(urls) == 2 * 3 * 2 * 2 * 3
    assert all(url.startswith("out/cells/") for url in urls)


def test_budget_is_not_changed_by_making_cells():
    before = json.dumps(BUDGET.model_dump())
    trees()
    assert json.dumps(BUDGET.model_dump()) == before


@pytest.mark.parametrize("repeated", [{"seeds": [0, 0]}, {"cells": {"lrs": [1e-4, 0.0001]}}])
def test_seed_or_rate_named_twice_is_refused(repeated):
    tree = {
        "data": {"gtzan": "a", "nsynth": "b", "music_speech": "c"},
        "checkpoints": {"1k5": "d", "12k": "e"},
        "output": {"url": "out"},
    }
    assert validate(Table1Config, "table1", tree).cells.lrs
    with pytest.raises(ConfigError, match="must not repeat a value"):
        validate(Table1Config, "table1", tree | repeated)


# ------------------------------------------------------------------------------------------------------------ choice


def test_rate_is_the_best_on_validation():
    scores = {(1e-4, 0): {"valid_accuracy": 0.6}, (3e-4, 0): {"valid_accuracy": 0.8, "accuracy": 0.7}}
    found = chosen(scores)
    assert (found["lr"], found["accuracy"]) == (3e-4, 0.7)
    assert found["lrs_tried"] == LRS


def test_rate_that_is_better_on_test_alone_is_not_chosen():
    scores = {
        (1e-4, 0): {"valid_accuracy": 0.8, "valid_loss": 2.0, "accuracy": 0.3, "macro_f1": 0.2},
        (3e-4, 0): {"valid_accuracy": 0.7, "valid_loss": 0.1, "accuracy": 0.9, "macro_f1": 0.9},
        (1e-3, 0): {"valid_accuracy": 0.7, "valid_loss": 0.1, "accuracy": 1.0, "macro_f1": 1.0},
    }
    found = chosen(scores)
    assert (found["lr"], found["accuracy"], found["macro_f1"]) == (1e-4, 0.3, 0.2)


def test_validation_loss_decides_between_equal_accuracies():
    scores = {
        (lr, 0): {"valid_accuracy": 0.8, "valid_loss": loss} for lr, loss in zip(LRS, (1.0, 0.4, 0.9), strict=True)
    }
    assert chosen(scores)["lr"] == 3e-4


def test_rate_is_chosen_over_all_seeds_together_and_the_scores_are_their_means():
    scores = {
        (1e-4, 0): {"valid_accuracy": 1.0},
        (1e-4, 1): {"valid_accuracy": 0.1},
        (3e-4, 0): {"valid_accuracy": 0.7, "accuracy": 0.5, "macro_f1": 0.2},
        (3e-4, 1): {"valid_accuracy": 0.7, "accuracy": 0.7, "macro_f1": 0.4},
    }
    found = chosen(scores, seeds=(0, 1))
    assert (found["lr"], found["seeds"]) == (3e-4, [0, 1])
    assert (found["accuracy"], found["macro_f1"]) == pytest.approx((0.6, 0.3))


def test_each_arm_and_bitrate_chooses_its_own_rate():
    best = {key: LRS[i % 3] for i, key in enumerate(itertools.product(("gtzan", "nsynth"), ARMS, BITRATES_KBPS))}
    finished = [
        (cell, result(cell, valid_accuracy=float(best[cell.task.name, cell.arm, cell.bitrate_kbps] == cell.lr)))
        for cell in table1._cells(ROWS, PAPERS, (0,), BUDGET)
    ]
    table = table1._choose(ROWS, finished)
    assert {(s["task"], s["arm"], s["bitrate_kbps"]): s["lr"] for s in table["summary"]} == best
    # the runs that were kept are those of the chosen rates
    assert {(c["task"], c["arm"], c["bitrate_kbps"]): c["lr"] for c in table["cells"]} == best
    assert len(table["cells"]) == len(best)


# ---------------------------------------------------------------------------------------------------------- interval


def interval(accuracies: list[float], count: int = 100) -> tuple[float, float]:
    return table1.interval([{"accuracy": value, "count": count} for value in accuracies])


@pytest.mark.parametrize(("right", "count"), [(69, 100), (11, 13), (13, 13), (0, 13), (1, 4096)])
def test_interval_of_one_seed_is_wilsons(right, count):
    # Wilson (1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, share = 1.959964, right / count
    middle = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    wanted = ((middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count))
    assert interval([share], count) == pytest.approx(wanted, abs=1e-6)  # z is given to seven digits


def test_interval_of_several_seeds_is_students_t():
    # mean 0.6, sample deviation 0.1, t(0.975, 2 degrees) = 4.3027
    half = 4.3027 * 0.1 / np.sqrt(3)
    assert interval([0.5, 0.6, 0.7]) == pytest.approx((0.6 - half, 0.6 + half), abs=1e-4)  # t is given to five digits
    values = [0.41, 0.47, 0.44, 0.5]
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((wanted.low, wanted.high))


# ---------------------------------------------------------------------------------------------------------- markdown


def test_markdown_has_the_papers_figures_beside_ours():
    summary = []
    for i, (task, arm, kbps) in enumerate(itertools.product(("gtzan", "folders"), ARMS, BITRATES_KBPS)):
        shown = {"accuracy": (30 + i) / 100, "macro_f1": (10 + i) / 100, "count": 100}
        shown |= {"accuracy_ci95": (0.2, 0.5), "paper": table1._paper(task, arm, kbps)}
        summary.append({"task": task, "arm": arm, "bitrate_kbps": kbps, **shown})
    lines = table1.to_markdown({"summary": summary, "baselines": {}}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if set(line) != set("|-")]
    assert rows[0] == ["Dataset", "Type", "Acc. 1.5", "Acc. 12", "F1 1.5", "F1 12", "n"]
    assert [row[:2] for row in rows[1:]] == [[task, arm] for task in ("gtzan", "folders") for arm in ARMS]
    ours = [*("30.00 [20, 50] (69.00)", "31.00 [20, 50] (63.00)"), *("10.00 (68.10)", "11.00 (60.07)")]
    assert rows[1] == ["gtzan", "scratch", *ours, "100"]
    assert rows[3][2:4] == ["34.00 [20, 50] (78.00)", "35.00 [20, 50] (79.00)"]
    assert rows[4] == ["folders", "scratch", "36.00 [20, 50]", "37.00 [20, 50]", "16.00", "17.00", "100"]


def test_papers_figures_are_those_of_its_table_1():
    rows = [row for arms in PAPER.values() for row in arms.values()]
    lines = [[low[0], high[0], low[1], high[1]] for low, high in rows]
    assert list(PAPER) == ["gtzan", "nsynth", "music_speech"]
    assert {tuple(arms) for arms in PAPER.values()} == {ARMS}
    assert lines == [  # accuracy at 1.5 and 12 kbps, F1 at 1.5 and 12 kbps, as printed
        [69.00, 63.00, 68.10, 60.07],
        [83.00, 79.00, 82.50, 78.01],
        [78.00, 79.00, 78.00, 78.91],
        [28.27, 26.03, 17.69, 14.87],
        [26.59, 27.56, 17.47, 16.51],
        [28.91, 27.88, 18.45, 17.61],
        [84.62, 84.62, 84.52, 84.52],
        [100.0, 100.0, 100.0, 100.0],
        [100.0, 100.0, 100.0, 100.0],
    ]


# ---------------------------------------------------------------------------------------------------- further arms


def test_further_arm_is_fine_tuned_from_checkpoints_of_its_own_and_is_a_row_of_the_table():
    arms = PAPERS | {"spans": ("ft_aug", {1.5: "spans-1k5", 12.0: "spans-12k"})}
    cells = table1._cells(ROWS[:1], arms, (0,), BUDGET)
    trees = {(c.arm, c.bitrate_kbps): table1._finetune_tree(c, arms, BUDGET, "out") for c in cells}
    assert {tree["output"]["url"] for tree in trees.values()} == {
        f"out/cells/gtzan-{kbps:g}kbps-{arm}-seed0-lr0.001" for arm in arms for kbps in BITRATES_KBPS
    }
    assert (trees["spans", 12.0]["arm"], trees["spans", 12.0]["checkpoint"]) == ("ft_aug", "spans-12k")
    assert (trees["ft", 1.5]["arm"], trees["ft", 1.5]["checkpoint"]) == ("ft", "run-1k5")
    table = table1._choose(ROWS[:1], [(cell, result(cell) | {"arm": arms[cell.arm][0]}) for cell in cells])
    assert [line.split("|")[2].strip() for line in table1.to_markdown(table).splitlines()[2:]] == [*ARMS, "spans"]
    assert {cell["arm"] for cell in table["cells"]} == {*ARMS, "spans"}


@pytest.mark.parametrize("name", ["ft", "a b", "a/b"])
def test_further_arm_needs_a_name_of_its_own_that_a_folder_can_have(name):
    tree = {"data": dict.fromkeys(("gtzan", "nsynth", "music_speech"), "t"), "output": {"url": "o"}}
    tree |= {"checkpoints": {"1k5": "a", "12k": "b"}, "further": {name: {"1k5": "a", "12k": "b"}}}
    with pytest.raises(ConfigError, match=f"further.{name}: a name of letters"):
        validate(Table1Config, "table1", tree)


# ------------------------------------------------------------------------------------------- beside the paper's figures


@pytest.mark.parametrize(("accuracy", "mark"), [(0.69, None), (0.9, "above"), (0.4, "below")])
def test_cell_whose_interval_excludes_the_papers_figure_is_marked(accuracy, mark):
    """The paper's GTZAN from scratch at 1.5 kbps is 69%; 100 recordings leave about 9 points to each side."""
    found = chosen({(lr, 0): {"accuracy": accuracy} for lr in LRS})
    assert found["against_paper"] == mark
    table = table1._choose(
        ROWS[:1], [(cell, result(cell, accuracy=accuracy)) for cell in table1._cells(ROWS[:1], PAPERS, (0,), BUDGET)]
    )
    line = next(line for line in table1.to_markdown(table).splitlines() if line.startswith("| gtzan | scratch "))
    first = line.split("|")[3]
    assert ("▲" in first, "▼" in first) == (mark == "above", mark == "below")


def test_baselines_stand_below_their_task_and_a_bag_of_codes_in_its_own_column():
    table = table1._choose(ROWS[:1], [(cell, result(cell)) for cell in table1._cells(ROWS[:1], PAPERS, (0,), BUDGET)])
    table["baselines"] = {
        "gtzan": {
            "bag": {"accuracy": 0.25, "accuracy_ci95": [0.2, 0.3], "macro_f1": 0.2, "count": 9, "bitrate_kbps": 12.0}
        }
    }
    assert table1.to_markdown(table).splitlines()[-1] == "| gtzan | bag |  | 25.00 [20, 30] |  | 20.00 | 9 |"
