"""What `launch/finetune.py` can be told."""

from typing import Literal

from pydantic import Field, model_validator

from megascale.config import Section
from megascale.data.transforms import DropConfig
from megascale.downstream.protocols import TaskConfig
from megascale.model.config import ModelConfig, Pooling
from megascale.storage import StorageConfig
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig


class FinetuneDataConfig(Section):
    """Which tokens."""

    url: str = Field(description="token folder of the labelled corpus")
    test_url: str | None = Field(
        None,
        description="task.protocol=official: a second token folder, all of which is the test split; if url has no clips "
        "for validation, task.valid_share of its training clips is drawn",
    )
    bitrate_kbps: float = Field(1.5, description="must be the checkpoint's")


class FinetuneOptimConfig(OptimConfig):
    """AdamW and its schedule, and how much less the encoder's first layers learn."""

    layer_decay: float = Field(
        1.0, gt=0, le=1, description="ft, ft_aug: each layer's rate is this share of that of the layer above it"
    )


class HeadConfig(Section):
    """The linear layer and what it sees."""

    pooling: Pooling = Field(
        "mean", description="over frames; the paper's mean, or mean_std: standard deviations besides"
    )
    start: Literal["random", "regression"] = Field(
        "random",
        description="first weights; regression: logistic regression on the encoder as it begins, the penalty chosen on "
        "validation. That is epoch 0, which may stay the best",
    )


class FinetuneTrainConfig(Section):
    """Length and batches."""

    epochs: int = Field(20, ge=1, description="passes over the training clips")
    patience: int | None = Field(
        None,
        ge=1,
        description="end after so many epochs without a better validation; null: never, so that budgets are equal",
    )
    batch: int = Field(16, ge=1, description="clips per update")
    crop_seconds: float | None = Field(
        None, gt=0, description="train on random crops of this length; null: whole clips"
    )
    eval_batch: int = Field(16, ge=1, description="clips per forward pass when scoring; whole clips")


class FinetuneOutputConfig(Section):
    """Where the run lies."""

    url: str = Field(description="run folder, on a local or shared disk")
    save_model: bool = Field(True, description="keep the classifier's weights (model/)")


class FinetuneConfig(Section):
    """Everything `launch/finetune.py` needs."""

    data: FinetuneDataConfig = Field(description="which tokens")
    task: TaskConfig = Field(description="what is classified")
    arm: Literal["scratch", "probe", "ft", "ft_aug"] = Field(
        description="scratch: new weights; probe: the checkpoint's encoder as it is; ft: all learns; ft_aug: with chunk drop"
    )
    checkpoint: str | None = Field(
        None,
        description="pretraining run or checkpoint; one in a store is copied to this machine once, and the copy goes after "
        "a week without use. For scratch it only gives the shape",
    )
    model: ModelConfig = Field(
        ModelConfig(), description="scratch: the model's shape, if no checkpoint gives it, and first weights"
    )
    head: HeadConfig = Field(HeadConfig(), description="the linear layer and what it sees")
    drop: DropConfig = Field(DropConfig(), description="token-chunk drop, used by ft_aug alone")
    optim: FinetuneOptimConfig = Field(FinetuneOptimConfig(lr=1e-4), description="optimizer and schedule")
    train: FinetuneTrainConfig = Field(FinetuneTrainConfig(), description="length and batches")
    zero: ZeroConfig = Field(ZeroConfig(stage=0), description="DeepSpeed ZeRO")
    output: FinetuneOutputConfig = Field(description="where the run lies")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")
    seed: int = Field(0, description="fixes split, new weights, order, crops and drops")

    @model_validator(mode="after")
    def _first_weights_agree(self) -> "FinetuneConfig":
        if self.arm != "scratch" and self.checkpoint is None:
            raise ValueError(f"checkpoint is required for arm={self.arm}")
        if self.arm != "scratch" and self.model.init_from is not None:
            raise ValueError("checkpoint and model.init_from are two first weights; model.init_from is for arm=scratch")
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> "FinetuneConfig":
        if self.zero.stage == 3:
            raise ValueError(
                "zero.stage=3 shards weights over ranks, and fine-tuning runs on one process; take 0, 1 or 2"
            )
        return self

    @model_validator(mode="after")
    def _test_folder_is_used(self) -> "FinetuneConfig":
        if self.data.test_url is not None and self.task.protocol != "official":
            raise ValueError(f"data.test_url is for task.protocol=official; {self.task.protocol} divides data.url")
        return self
