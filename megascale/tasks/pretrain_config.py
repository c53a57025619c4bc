"""What `launch/pretrain.py` can be told."""

from pydantic import Field, field_validator

from megascale.config import Section
from megascale.data.loader import DataConfig
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.model.config import ModelConfig
from megascale.storage import StorageConfig
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig


class TrainConfig(Section):
    """Length and batches."""

    steps: int = Field(ge=1, description="updates")
    global_batch: int = Field(ge=1, description="clips per update, over all ranks")
    micro_batch: int = Field(
        ge=1, description="clips per rank and forward pass; fewer where a rank's share asks for it"
    )
    activation_checkpointing: bool = Field(
        False, description="keep what lies between blocks alone, and compute the rest again in the backward pass"
    )
    deterministic: bool = Field(
        True,
        description="only operators that give the same bits each time; without, a GPU may be faster and not resume exactly",
    )
    compile: bool = Field(False, description="torch.compile each Transformer block; needs a C++ compiler on CPUs")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="also keep the weights' exponential moving average, in model_ema/; null: off"
    )
    validate_every: int = Field(1000, ge=1, description="updates between validations; the last is always validated")
    valid_clips: int = Field(1024, ge=1, description="at most so many held-out clips are validated")


class LogConfig(Section):
    """What is reported where."""

    every: int = Field(10, ge=1, description="updates between lines of metrics.jsonl")
    profile_steps: tuple[int, int] | None = Field(
        None, description="first and last update, from 1, to record with torch.profiler, in RUN/profile/"
    )
    tensorboard: bool = Field(True, description="also log to RUN/tensorboard")
    wandb_project: str | None = Field(None, description="also log to this wandb project (extra megascale[wandb])")
    spike_stds: float = Field(
        6.0, gt=0, description="a loss so many standard deviations above its recent mean is called a spike"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device, for MFU; null: by the GPU's name, and no MFU on a CPU"
    )
    plan_mfu: float = Field(0.4, gt=0, le=1, description="what --dry-run takes for MFU when it estimates hours")

    @field_validator("profile_steps")
    @classmethod
    def _is_a_window(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise ValueError("must be first and last update, from 1")
        return steps


class RunOutputConfig(Section):
    """Where the run lies."""

    url: str = Field(description="run folder, on a local or shared disk")


class PretrainConfig(Section):
    """Everything `launch/pretrain.py` needs."""

    data: DataConfig = Field(description="which tokens")
    output: RunOutputConfig = Field(description="where the run lies")
    model: ModelConfig = Field(ModelConfig(), description="the model's shape and first weights")
    mask: MaskConfig = Field(MaskConfig(), description="which tokens are hidden")
    drop: DropConfig = Field(DropConfig(), description="token-chunk drop")
    optim: OptimConfig = Field(OptimConfig(), description="optimizer and schedule")
    train: TrainConfig = Field(description="length and batches")
    zero: ZeroConfig = Field(ZeroConfig(), description="DeepSpeed ZeRO")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when to save, what to keep")
    log: LogConfig = Field(LogConfig(), description="what is reported where")
    storage: StorageConfig = Field(StorageConfig(), description="object stores")
    seed: int = Field(0, description="fixes weights, order, crops, drops and masks")
