"""A table's cells: a fair fight between the arms."""

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tables import BUDGET, CHECKPOINTS, LRS, PAPERS, ROWS

from megascale.config import load_config, validate
from megascale.downstream.cells import Arm, LabelledTokens, _finetune_tree, cells_of
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS, CellsConfig, Table1Config
from megascale.errors import ConfigError
from megascale.tasks.finetune import FinetuneConfig
from megascale.tasks.pretrain_config import PretrainConfig

RECIPES = Path(__file__).parents[3] / "configs"


def trees(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    return [_finetune_tree(cell, PAPERS, BUDGET, "out") for cell in cells_of(ROWS, PAPERS, seeds, BUDGET)]


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


@pytest.mark.parametrize(
    ("finetune", "told"),
    [
        ({"seed": 3}, "finetune.seed: is set here; only train, optim, head, drop, zero may stand in it"),
        ({"optim": {"lr": 1e-3}}, "finetune.optim.lr: the rates are cells.lrs"),
    ],
)
def test_budget_holds_what_is_the_same_for_every_cell_alone(finetune, told):
    with pytest.raises(ConfigError, match=told):
        validate(CellsConfig, "table1.cells", {"finetune": finetune})


def test_further_arm_is_fine_tuned_from_checkpoints_of_its_own():
    arms = PAPERS | {"spans": Arm("ft_aug", {1.5: "spans-1k5", 12.0: "spans-12k"})}
    cells = cells_of(ROWS[:1], arms, (0,), BUDGET)
    trees = {(c.arm, c.bitrate_kbps): _finetune_tree(c, arms, BUDGET, "out") for c in cells}
    assert {tree["output"]["url"] for tree in trees.values()} == {
        f"out/cells/gtzan-{kbps:g}kbps-{arm}-seed0-lr0.001" for arm in arms for kbps in BITRATES_KBPS
    }
    assert (trees["spans", 12.0]["arm"], trees["spans", 12.0]["checkpoint"]) == ("ft_aug", "spans-12k")
    assert (trees["ft", 1.5]["arm"], trees["ft", 1.5]["checkpoint"]) == ("ft", "run-1k5")


@pytest.mark.parametrize("name", ["ft", "a b", "a/b"])
def test_further_arm_needs_a_name_of_its_own_that_a_folder_can_have(name):
    tree = {"data": dict.fromkeys(("gtzan", "nsynth", "music_speech"), "t"), "output": {"url": "o"}}
    tree |= {"checkpoints": {"1k5": "a", "12k": "b"}, "further": {name: {"1k5": "a", "12k": "b"}}}
    with pytest.raises(ConfigError, match=f"further.{name}: a name of letters"):
        validate(Table1Config, "table1", tree)


@pytest.mark.parametrize(
    ("further", "told"),
    [
        ({"arm": "scratch"}, "arm=scratch needs init_from"),
        ({"arm": "scratch", "init_from": "hf:lm", "1k5": "a"}, "arm=scratch needs init_from, and nothing else"),
        ({"1k5": "a"}, "arm=ft needs 1k5 and 12k"),
        ({"1k5": "a", "12k": "b", "init_from": "hf:lm"}, "arm=ft needs 1k5 and 12k, and nothing else"),
    ],
)
def test_further_arm_has_one_kind_of_first_weights(further, told):
    tree = {"data": dict.fromkeys(("gtzan", "nsynth", "music_speech"), "t"), "output": {"url": "o"}}
    tree |= {"checkpoints": {"1k5": "a", "12k": "b"}, "further": {"lm": further}}
    with pytest.raises(ConfigError, match=rf"^table1.further.lm: {told}"):
        validate(Table1Config, "table1", tree)


def test_language_models_arm_begins_as_it_and_differs_from_scratch_in_nothing_else():
    arms = PAPERS | {"lm": Arm("scratch", CHECKPOINTS, "hf:lm")}
    cells = {c.arm: c for c in cells_of(ROWS[:1], arms, (0,), BUDGET) if (c.bitrate_kbps, c.lr) == (12.0, 1e-3)}
    scratch, lm = (
        validate(FinetuneConfig, "finetune", _finetune_tree(cells[name], arms, BUDGET, "out")).model_dump()
        for name in ("scratch", "lm")
    )
    assert lm.pop("output") != scratch.pop("output")
    assert lm == scratch | {"model": scratch["model"] | {"init_from": "hf:lm"}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("table1/*.yaml")), ids=lambda path: path.stem)
def test_recipe_in_the_repository_is_valid(path):
    assert load_config(Table1Config, "table1", str(path)).cells.lrs


def test_language_models_recipe_is_the_papers_but_for_first_weights_and_rate():
    overrides = {"1k5": [], "12k": ["data.bitrate_kbps=12", "train.micro_batch=32"]}
    for name, more in overrides.items():
        begun, paper = (
            load_config(PretrainConfig, "pretrain", str(RECIPES / "pretrain" / f"{recipe}.yaml"), given).model_dump()
            for recipe, given in (("from_language_model", more), (f"paper_{name}", []))
        )
        assert (
            begun["model"].pop("init_from") == "hf:EuroBERT/EuroBERT-210m" and paper["model"].pop("init_from") is None
        )
        assert begun["optim"].pop("lr") < paper["optim"].pop("lr") and begun.pop("output") != paper.pop("output")
        assert begun == paper


def test_every_fold_of_every_seed_is_a_cell_where_the_task_has_folds():
    folds = LabelledTokens("x", "tokens/x", TaskConfig(label="genre", protocol="folds", folds=4))
    cells = cells_of([folds, ROWS[0]], PAPERS, (0, 1), BUDGET)
    told = [_finetune_tree(cell, PAPERS, BUDGET, "out") for cell in cells if cell.task is folds]
    mine = [
        t["task"]["fold"] for t in told if (t["arm"], t["data"]["bitrate_kbps"], t["optim"]["lr"]) == ("ft", 12, 1e-3)
    ]
    assert mine == [0, 1, 2, 3] * 2 and len(told) == 3 * 2 * 3 * 2 * 4
    assert len({tree["output"]["url"] for tree in told}) == len(told)
    assert {cell.fold for cell in cells if cell.task is ROWS[0]} == {None}
    assert not any("fold" in cell.name for cell in cells if cell.task is ROWS[0])
