"""Recipes of pretraining that are another one but for a few keys."""

from pathlib import Path

from megascale.config import load_config
from megascale.tasks.pretrain_config import PretrainConfig

RECIPES = Path(__file__).parents[3] / "configs" / "pretrain"


def test_the_recipe_from_a_language_model_is_the_papers_but_for_first_weights_and_rate():
    paper, other = (
        load_config(PretrainConfig, "pretrain", str(RECIPES / f"{name}.yaml")).model_dump()
        for name in ("paper_1k5", "from_language_model")
    )
    assert other["model"].pop("init_from") == "hf:EuroBERT/EuroBERT-210m" and paper["model"].pop("init_from") is None
    assert other["optim"].pop("lr") < paper["optim"].pop("lr")
    assert other.pop("output") != paper.pop("output")
    assert other == paper
