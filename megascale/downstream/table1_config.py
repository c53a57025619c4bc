"""What `launch/table1.py` can be told."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from megascale.config import Section
from megascale.downstream.protocols import TaskConfig, refuse_several_labels
from megascale.storage import StorageConfig

ARMS = ("scratch", "ft", "ft_aug")
BITRATES_KBPS = (1.5, 12.0)
_BUDGET = ("train", "optim", "head", "drop", "zero")
_ROW_NAME = re.compile(r"[\w-]+")


def check_budget(finetune: dict[str, Any]) -> None:
    """Raise ValueError for a section of a finetune config that is not the same for every classifier."""
    for name in finetune:
        if name not in _BUDGET:
            raise ValueError(f"finetune.{name}: is set here; only {', '.join(_BUDGET)} may stand in it")


class Table1DataConfig(Section):
    """Token folders of the labelled corpora."""

    gtzan: str = Field(description="tokens of GTZAN")
    nsynth: str = Field(description="tokens of NSynth")
    music_speech: str = Field(description="tokens of GTZAN music/speech")


class CheckpointsConfig(Section):
    """Pretrained encoders."""

    kbps_1k5: str = Field(alias="1k5", description="pretraining run or checkpoint at 1.5 kbps")
    kbps_12k: str = Field(alias="12k", description="pretraining run or checkpoint at 12 kbps")


class FurtherArmConfig(Section):
    """One more row for each corpus."""

    arm: Literal["scratch", "probe", "ft", "ft_aug"] = Field(
        "ft", description="how its checkpoints are fine-tuned; scratch: not pretrained on audio, begins as init_from"
    )
    kbps_1k5: str | None = Field(None, alias="1k5", description="pretraining run or checkpoint at 1.5 kbps")
    kbps_12k: str | None = Field(None, alias="12k", description="pretraining run or checkpoint at 12 kbps")
    init_from: str | None = Field(
        None,
        description="arm=scratch: hf:FOLDER_OR_ID of a language model of the shape of `checkpoints`, as model.init_from",
    )

    @model_validator(mode="after")
    def _has_first_weights(self) -> "FurtherArmConfig":
        urls = {"1k5": self.kbps_1k5, "12k": self.kbps_12k, "init_from": self.init_from}
        needed = ("init_from",) if self.arm == "scratch" else ("1k5", "12k")
        for name, url in urls.items():
            if (url is not None) != (name in needed):
                raise ValueError(
                    f"arm={self.arm} needs {' and '.join(needed)}, and nothing else of 1k5, 12k, init_from"
                )
        return self


class TasksConfig(Section):
    """How each corpus is split."""

    gtzan: TaskConfig = Field(TaskConfig(label="genre"), description="music genre")
    nsynth: TaskConfig = Field(
        TaskConfig(label="instrument_family_str", protocol="official", absent_from_test=["synth_lead"]),
        description="instrument family",
    )
    music_speech: TaskConfig = Field(TaskConfig(label="class"), description="music or speech")


class Table1OutputConfig(Section):
    """Where the table goes."""

    url: str = Field(description="run folder, on a local or shared disk")


class CellsConfig(Section):
    """The budget of every cell."""

    lrs: list[float] = Field([3e-5, 1e-4, 3e-4], min_length=1, description="learning rates tried by every arm")
    finetune: dict[str, Any] = Field(
        {}, description="sections train, optim, head, drop and zero of a finetune config, the same for every cell"
    )
    gpus_each: float = Field(0, ge=0, description="GPUs per run; 0 runs on CPUs, one thread a run")

    @model_validator(mode="after")
    def _finetune_is_a_budget(self) -> "CellsConfig":
        check_budget(self.finetune)
        if "lr" in (self.finetune.get("optim") or {}):
            raise ValueError("finetune.optim.lr: the rates are cells.lrs")
        return self


class Table1Config(Section):
    """Everything `launch/table1.py` needs."""

    data: Table1DataConfig = Field(description="token folders")
    checkpoints: CheckpointsConfig = Field(description="pretrained encoders")
    output: Table1OutputConfig = Field(description="where the table goes")
    further: dict[str, FurtherArmConfig] = Field(
        {}, description="more rows, such as other masks or first weights, by name"
    )
    tasks: TasksConfig = Field(TasksConfig(), description="how each corpus is split")
    cells: CellsConfig = Field(CellsConfig(), description="the budget of every cell")
    seeds: list[int] = Field([0], min_length=1, description="one run per seed; splits are drawn from it too")
    baselines: bool = Field(
        True,
        description="logistic regressions on log-mel statistics and on bags of codes, too; they read all audio again",
    )
    map_recordings: int = Field(
        200, ge=0, description="the page shows embeddings of at most so many recordings of each corpus; 0: none"
    )
    storage: StorageConfig = Field(StorageConfig(), description="object stores")

    @model_validator(mode="after")
    def _no_repeats(self) -> "Table1Config":
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.cells.lrs)) < len(self.cells.lrs):
            raise ValueError("seeds and cells.lrs must not repeat a value")
        for name in self.further:
            if name in ARMS or not _ROW_NAME.fullmatch(name):
                raise ValueError(f"further.{name}: a name of letters, digits, - and _, and none of {', '.join(ARMS)}")
        return self

    @model_validator(mode="after")
    def _has_accuracies(self) -> "Table1Config":
        refuse_several_labels((f"tasks.{name}", getattr(self.tasks, name)) for name in TasksConfig.model_fields)
        return self
