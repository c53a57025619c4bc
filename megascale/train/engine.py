"""DeepSpeed behind a few calls; the only file here that imports it."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns in every process that it found none

import deepspeed
from pydantic import Field, model_validator
from torch import Tensor, nn

from megascale.config import Section
from megascale.errors import CheckpointError
from megascale.train.schedule import OptimConfig, lr_factor

Batch = dict[str, Tensor]
LossFn = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = Field(1, description="what is sharded: 1 optimizer, 2 and gradients, 3 and weights")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 keeps fp32 master weights, and needs stage 1 or above; slow on most CPUs"
    )

    @model_validator(mode="after")
    def _bf16_has_master_weights(self) -> "ZeroConfig":
        if self.precision == "bf16" and self.stage == 0:
            raise ValueError(
                "precision=bf16 with stage=0 would keep no fp32 weights to add small updates to; take stage 1"
            )
        return self


def init_distributed() -> tuple[int, int]:
    """Join the process group the launcher describes (DeepSpeed, torchrun), or make one of a single process.

    Returns:
        rank and world size.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # this CPU-only operator serves inference alone, and building it needs a compiler and over a minute at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single, MASTER_PORT=str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    """Wait until every rank is here."""
    torch.distributed.barrier()


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank; every rank must call it."""
    if torch.distributed.get_world_size() == 1:
        return flag
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value.item())


class Engine:
    """A model with its optimizer, sharded by ZeRO."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        zero: ZeroConfig,
        micro_batch: int,
        accumulation: int,
        num_steps: int,
    ) -> None:
        """
        Args:
            model: forward(**batch) returns what the loss function takes; entries named `targets_…` are for the loss alone.
            optim: AdamW and its schedule.
            zero: what is sharded, and the precision.
            micro_batch: clips per rank and forward pass.
            accumulation: forward passes per update.
            num_steps: length of the schedule.
        """
        self._optim, self._num_steps, self._accumulation = optim, num_steps, accumulation
        self.settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {"stage": zero.stage},
            "bf16": {"enabled": zero.precision == "bf16"},
            "steps_per_print": 2**62,  # our own loop reports
        }
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=self.settings)
        self.device = self._engine.device

    @property
    def module(self) -> nn.Module:
        """The model itself; under ZeRO-3 its weights are gathered layer by layer in forward."""
        return self._engine.module

    def train_step(self, step: int, micro_batches: list[Batch], loss_fn: LossFn) -> dict[str, Tensor]:
        """Do one update on this rank's share of a global batch.

        Returns:
            Sums over the micro-batches of what the loss function reported, and `lr` and `updates`.
        """
        assert len(micro_batches) == self._accumulation, "the loader cuts what the engine expects"
        lr = self._optim.lr * lr_factor(step, self._num_steps, self._optim)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            batch = self.to_device(batch)
            inputs = {name: value for name, value in batch.items() if not name.startswith("targets_")}
            loss, report = loss_fn(self._engine(**inputs), batch)
            self._engine.backward(loss)
            self._engine.step()
            for name, value in report.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        # one value per update: dividing by `updates` gives its mean
        sums |= {"lr": torch.tensor(lr, device=self.device), "updates": torch.ones((), device=self.device)}
        return sums

    def to_device(self, batch: Batch) -> Batch:
        """Move a batch to the model's device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Any:
        """Run the model without gradients."""
        self._engine.eval()
        try:
            return self._engine(**self.to_device(batch))
        finally:
            self._engine.train()

    def full_weights(self) -> dict[str, Tensor]:
        """Return every weight, whole, fp32, on the CPU. Every rank must call it; rank 0 gets them, others nothing."""
        weights = {}
        for name, parameter in self._engine.module.named_parameters():
            value = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if value is None:  # fp32 under ZeRO-0 keeps no copy beside the weight itself
                value = parameter.detach()
            if torch.distributed.get_rank() == 0:
                weights[name] = value.float().cpu().clone()
        return weights

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files of this rank into `folder`; every rank must call it."""
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=False
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at the same world size. The caller has verified the files' hashes: this unpickles."""
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load")
