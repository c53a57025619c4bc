"""A small table's rows, arms and budget."""

from megascale.downstream.cells import LabelledTokens, paper_arms
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1_config import CellsConfig

CHECKPOINTS = {1.5: "run-1k5", 12.0: "run-12k"}
PAPERS = paper_arms(CHECKPOINTS)
LRS = [1e-4, 3e-4, 1e-3]
BUDGET = CellsConfig(lrs=LRS, finetune={"train": {"epochs": 3}, "drop": {"p": 0.5}, "optim": {"clip_norm": 2.0}})
ROWS = [
    LabelledTokens("gtzan", "tokens/gtzan", TaskConfig(label="genre")),
    LabelledTokens("nsynth", "tokens/nsynth", TaskConfig(label="instrument_family_str", protocol="official")),
]
