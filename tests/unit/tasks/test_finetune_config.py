"""Fine-tuning's config: what cannot be meant is one line, and every recipe in the repository can be loaded."""

from pathlib import Path

import pytest
import yaml

from megascale.config import load_config, validate
from megascale.downstream.table1_config import Table1Config
from megascale.downstream.watch import WatchConfig
from megascale.errors import ConfigError
from megascale.tasks.finetune_config import FinetuneConfig

RECIPES = Path(__file__).parents[3] / "configs" / "finetune"
TREE = {
    "data": {"url": "tokens"},
    "task": {"label": "genre"},
    "arm": "ft",
    "checkpoint": "run",
    "output": {"url": "out"},
}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"checkpoint": None}, "finetune: checkpoint is required for arm=ft"),
        ({"checkpoint": None, "arm": "probe"}, "finetune: checkpoint is required for arm=probe"),
        ({"train": {"patience": 0}}, "finetune.train.patience=0: Input should be greater than or equal to 1"),
        (
            {"zero": {"stage": 3}},
            "finetune: zero.stage=3 shards weights over ranks, and fine-tuning runs on one process; take 0, 1 or 2",
        ),
        ({"head": {"pooling": "max"}}, "finetune.head.pooling='max': Input should be 'mean' or 'mean_std'"),
        ({"optim": {"layer_decay": 1.5}}, "finetune.optim.layer_decay=1.5: Input should be less than or equal to 1"),
        ({"task": {"label": "genre", "kind": "multiple"}}, "finetune.task.kind='multiple': "),
        ({"task": {"label": "genre", "protocol": "fold"}}, "finetune.task.protocol='fold': "),
    ],
)
def test_what_cannot_be_meant_is_one_line(changed, line):
    with pytest.raises(ConfigError) as failure:
        validate(FinetuneConfig, "finetune", TREE | changed)
    assert str(failure.value).startswith(line) and "\n" not in str(failure.value)


def test_every_arm_has_the_same_budget_unless_told():
    config = validate(FinetuneConfig, "finetune", TREE)
    assert (config.train.patience, config.optim.layer_decay) == (None, 1.0)
    assert config.optim.lr == 1e-4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_in_the_repository_is_valid(path):
    config = load_config(FinetuneConfig, "finetune", str(path))
    assert load_config(FinetuneConfig, "finetune", str(path), ["arm=probe"]).arm == "probe"
    assert config.task.kind == ("multi" if path.stem == "audioset" else "single")


def test_recipes_name_the_protocols_of_the_literature():
    def task(name: str):
        return load_config(FinetuneConfig, "finetune", str(RECIPES / f"{name}.yaml")).task

    assert (task("paper_gtzan").label, task("paper_gtzan").protocol) == ("genre", "paper")
    assert (task("nsynth_family").label, task("nsynth_family").protocol) == ("instrument_family_str", "official")
    assert task("nsynth_family").absent_from_test == ["synth_lead"]
    assert (task("music_speech_folds").label, task("music_speech_folds").folds) == ("class", 10)
    lists = task("gtzan_fault_filtered").lists
    assert all(str(url).endswith(f"{side}_filtered.txt") for side, url in lists.model_dump().items())


@pytest.mark.parametrize("path", sorted(RECIPES.with_name("table1").glob("*.yaml")), ids=lambda path: path.stem)
def test_tables_recipes_let_nsynths_synth_lead_be_in_training_alone(path):
    config = load_config(Table1Config, "table1", str(path))
    assert config.tasks.nsynth.absent_from_test == ["synth_lead"]
    assert yaml.safe_load(path.read_text())["tasks"]["nsynth"]["absent_from_test"] == ["synth_lead"], (
        "said, not implied"
    )
    assert not config.tasks.gtzan.absent_from_test and not config.tasks.music_speech.absent_from_test


def test_watchs_recipe_lets_synth_lead_be_in_training_alone():
    config = load_config(WatchConfig, "watch", str(RECIPES.with_name("watch") / "small.yaml"))
    assert config.tasks["nsynth"].task.absent_from_test == ["synth_lead"]
