"""DeepSpeed's config, made of ours: what is sharded, the precision, where the optimizer works, and a user's own JSON."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from megascale.config import Section
from megascale.errors import ConfigError
from megascale.train.memory import REDUCE_BUCKET
from megascale.train.schedule import OptimConfig


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = Field(1, description="what is sharded: 1 optimizer, 2 and gradients, 3 and weights")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 keeps fp32 master weights, and needs stage 1 or above; slow on most CPUs"
    )
    offload_optimizer: bool = Field(
        False, description="keep AdamW's state and do its work on the CPU; stage 1 or above"
    )
    deepspeed_json: str | None = Field(
        None, description="a DeepSpeed config of your own (JSON), merged in; not for what has a key here"
    )

    @model_validator(mode="after")
    def _stage_fits(self) -> "ZeroConfig":
        if self.precision == "bf16" and self.stage == 0:
            raise ValueError(
                "precision=bf16 with stage=0 would keep no fp32 weights to add small updates to; take stage 1"
            )
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer=true needs stage 1 or above")
        return self


# what the run's own config decides, by DeepSpeed's names: a user's JSON may repeat it, not contradict it
_OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16.enabled": "zero.precision",
    "bf16.check_grad_overflow": "the stop at what is not finite",
    "fp16": "zero.precision",
    "amp": "zero.precision",
    "torch_autocast": "zero.precision",
    "data_types": "zero.precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload_optimizer",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
    "checkpoint": "the number of ranks",
}


def deepspeed_settings(
    optim: OptimConfig, zero: ZeroConfig, micro_batch: int, accumulation: int, num_weights: int, universal: bool = False
) -> dict[str, Any]:
    """Return the config that DeepSpeed gets: what ours says, and the user's own JSON.

    Args:
        optim, zero: AdamW, and what is sharded.
        micro_batch, accumulation: clips per rank and forward pass, and forward passes per update.
        num_weights: of the whole model.
        universal: whether the checkpoint to be loaded is a universal one.

    Raises:
        ConfigError: the user's JSON cannot be read, or contradicts a key of ours.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_norm,
        # DeepSpeed allocates this buffer whole, however small the model is
        "zero_optimization": {"stage": zero.stage, "reduce_bucket_size": min(REDUCE_BUCKET, num_weights)},
        "bf16": {"enabled": zero.precision == "bf16", "check_grad_overflow": True},
        "steps_per_print": 2**62,  # our own loop reports
    }
    if zero.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        settings["zero_force_ds_cpu_optimizer"] = (
            False  # torch's own AdamW has a fused CPU kernel, and needs no compiler
        )
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    if zero.deepspeed_json is not None:
        where = f"zero.deepspeed_json={zero.deepspeed_json}"
        settings = _merged(settings, _read_json(zero.deepspeed_json, where), where)
    return settings


def _read_json(path: str, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise ConfigError(f"{where}: cannot be read: {failure.strerror}") from None
    except ValueError as failure:
        raise ConfigError(f"{where}: not valid JSON: {failure}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: a DeepSpeed config is a mapping, this is a {type(tree).__name__}")
    return tree


def _merged(ours: dict[str, Any], theirs: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict) and name not in _OWNED:
            merged[key] = _merged(ours.get(key, {}), value, where, f"{name}.")
        elif (name in _OWNED or isinstance(ours.get(key), dict)) and value != ours.get(key):
            if name not in _OWNED:
                raise ConfigError(f"{where}: {name} is a mapping, this is a {type(value).__name__}")
            raise ConfigError(f"{where}: {name} belongs to {_OWNED[name]} here; leave it out")
        else:
            merged[key] = value
    return merged
