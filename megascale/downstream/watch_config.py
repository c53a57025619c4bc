"""What `launch/watch.py` can be told."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megascale.config import Section
from megascale.downstream.protocols import TaskConfig, refuse_several_labels
from megascale.downstream.table1_config import check_budget
from megascale.storage import StorageConfig


class WatchTaskConfig(Section):
    """One labelled corpus."""

    url: str = Field(description="its token folder")
    task: TaskConfig = Field(description="what is classified, and how the clips are split")


class WatchOutputConfig(Section):
    """Where the curve goes."""

    url: str = Field(description="folder for watch.json, the page and the runs, on a local or shared disk")


class WatchConfig(Section):
    """Everything `launch/watch.py` needs."""

    run: str = Field(description="the pretraining run, or the URL that it uploads its checkpoints to")
    output: WatchOutputConfig = Field(description="where the curve goes")
    tasks: dict[str, WatchTaskConfig] = Field(min_length=1, description="labelled corpora by name")
    every: int = Field(1, ge=1, description="checkpoints are evaluated whose step is a multiple of this")
    follow: bool = Field(
        True, description="wait for new checkpoints until the run is finished; false: take those there are"
    )
    poll_seconds: float = Field(30, gt=0, description="time between two looks at the run")
    arm: Literal["probe", "ft", "ft_aug"] = Field("ft", description="how a checkpoint is fine-tuned")
    finetune: dict[str, Any] = Field(
        {}, description="sections train, optim, head, drop and zero of a finetune config, the same for every checkpoint"
    )
    gpus_each: float = Field(0, ge=0, description="GPUs per classifier; 0 trains on CPUs, one thread each")
    seeds: list[int] = Field([0], min_length=1, description="one classifier per seed; splits are drawn from it too")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")

    @field_validator("finetune")
    @classmethod
    def _is_a_budget(cls, tree: dict[str, Any]) -> dict[str, Any]:
        check_budget(tree)
        return tree

    @model_validator(mode="after")
    def _has_accuracies(self) -> "WatchConfig":
        refuse_several_labels((f"tasks.{name}.task", labelled.task) for name, labelled in self.tasks.items())
        return self
