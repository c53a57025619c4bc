"""DeepSpeed behind a few calls; the only file here that imports it."""

import atexit
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns in every process that it found none

import deepspeed
from torch import Tensor, nn

from megascale.errors import CheckpointError, ConfigError, MegascaleError, StorageError
from megascale.ports import free_port
from megascale.train.schedule import OptimConfig, lr_factor
from megascale.train.zero import ZeroConfig, deepspeed_settings

# ranks wait for one that hashes, converts, fetches or uploads a checkpoint; ten minutes, the default, can be too short
_PATIENCE_SECONDS = 3600

T = TypeVar("T")
Batch = dict[str, Tensor]
LossFn = Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]


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
        os.environ.update(single, MASTER_PORT=str(free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_initialized():
        atexit.register(_leave_gloo)
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=_PATIENCE_SECONDS))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _leave_gloo() -> None:
    """Join gloo's threads while Python is whole: one that still held an operation's tensors was seen to end a job by
    SIGABRT in place of its exit code (pytorch issue 190489). It waits for no other rank; NCCL's would."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def make_deterministic() -> None:
    """Let every operator give the same bits each time, on CUDA as well; call it before anything runs there.

    One that cannot is told of in a warning.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # nothing here reads any, and it costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ConfigError if DeepSpeed does not take its config."""
    try:
        deepspeed.DeepSpeedConfig(dict(settings))
    except (ValueError, TypeError, AssertionError, deepspeed.DeepSpeedConfigError) as failure:
        reason = " ".join(str(failure).split())
        raise ConfigError(f"DeepSpeed refuses its config: {reason}") from None


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


def on_first_rank(call: Callable[[], T]) -> T:
    """Call on rank 0 alone, and return its result, or raise its MegascaleError, on every rank."""
    told: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = call()
        except MegascaleError as failure:
            failure.on_every_rank = True
            told[1] = failure
    torch.distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return cast(T, told[0])


class NonFiniteError(Exception):
    """A loss or gradient is NaN or infinite; nothing was updated, on any rank.

    `losses`: this rank's loss of each micro-batch.
    """

    def __init__(self, losses: list[float]) -> None:
        super().__init__(f"losses {losses}")
        self.losses = losses


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
        ema_decay: float | None = None,
        universal: bool = False,
        rate_share: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        """
        Args:
            model: forward(**batch) returns what the loss function takes; entries named `targets_…` are for the loss alone.
                Weights that need no gradient now stay as they are.
            optim: AdamW and its schedule.
            zero: what is sharded, and the precision.
            micro_batch: clips per rank and forward pass.
            accumulation: forward passes per update.
            num_steps: length of the schedule, in updates.
            ema_decay: keep an exponential moving average of the weights, too.
            universal: whether `load` will get a checkpoint that `convert` made.
            rate_share: the share of the learning rate that the weight of this name gets.

        Raises:
            ConfigError: the user's DeepSpeed JSON does not fit.
        """
        self._optim, self.stage, self._num_steps, self._accumulation = optim, zero.stage, num_steps, accumulation
        self.universal = universal and zero.stage > 0  # ZeRO-0 keeps everything on every rank: nothing to convert
        self.settings = deepspeed_settings(
            optim, zero, micro_batch, accumulation, sum(p.numel() for p in model.parameters()), self.universal
        )
        groups, self._shares = _parameter_groups(model, optim.weight_decay, rate_share)
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=self.settings)
        self.device = self._engine.device
        self._decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        self.on_part: Callable[[str], None] = lambda part: None  # told at the end of each part of a step, for timing
        self._ema_decay = ema_decay
        self._ema = self._copies() if ema_decay is not None else []

    @property
    def module(self) -> nn.Module:
        """The model itself; under ZeRO-3 its weights are gathered layer by layer in forward."""
        return self._engine.module

    def train_step(self, step: int, micro_batches: list[Batch], loss_fn: LossFn) -> dict[str, Tensor]:
        """Do one update on this rank's share of a global batch.

        Returns:
            Sums over the micro-batches of what the loss function reported, and `lr`, `grad_norm` (before clipping) and
            `updates`.

        Raises:
            NonFiniteError: on every rank, before the update.
        """
        assert len(micro_batches) == self._accumulation, "the loader cuts what the engine expects"
        lr = self._optim.lr * lr_factor(step, self._num_steps, self._optim)
        for group, share in zip(self._optimizer.param_groups, self._shares, strict=True):
            group["lr"] = lr * share
        sums: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for batch in micro_batches:
            batch = self.to_device(batch)
            inputs = {name: value for name, value in batch.items() if not name.startswith("targets_")}
            loss, report = loss_fn(self._engine(**inputs), batch)
            losses.append(loss.detach())
            self.on_part("forward")
            # a loss that is not finite makes every gradient NaN, so that the norm tells of it, on all ranks
            self._engine.backward(loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan))
            self.on_part("backward")
            if len(losses) == self._accumulation:
                grad_norm = self._update(losses)
            else:
                self._engine.step()
            self.on_part("optimizer")
            for name, value in report.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        # one value per update: dividing by `updates` gives its mean
        once = {"lr": lr, "grad_norm": grad_norm, "updates": 1.0}
        return sums | {name: torch.tensor(value, device=self.device) for name, value in once.items()}

    def _update(self, losses: list[Tensor]) -> float:
        if self.stage == 0:  # DeepSpeed looks at the norm before it updates under ZeRO alone
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                raise NonFiniteError([float(loss) for loss in losses])
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            if not math.isfinite(norm):
                raise NonFiniteError([float(loss) for loss in losses])
        if self._ema_decay is not None:
            for average, partition in zip(self._ema, self._partitions(), strict=True):
                average.lerp_(partition, 1.0 - self._ema_decay)
        return norm

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

    def full_ema(self) -> dict[str, Tensor] | None:
        """Return the weights' moving averages as `full_weights` returns weights; None if none are kept."""
        if self._ema_decay is None:
            return None
        with self._kept_weights():
            self._write_partitions(self._ema)
            return self.full_weights()

    def load_ema(self, weights: dict[str, Tensor]) -> None:
        """Go on from moving averages that `full_ema` returned; every rank must call it with all of them."""
        with self._kept_weights(), torch.no_grad():
            for name, parameter in self._engine.module.named_parameters():
                if self.stage == 0:
                    parameter.copy_(weights[name])
                else:
                    deepspeed.utils.safe_set_full_fp32_param(parameter, weights[name].to(self.device))
            self._ema = self._copies()

    def _partitions(self) -> list[Tensor]:
        """Return this rank's share of the fp32 weights, as DeepSpeed keeps it."""
        if self.stage == 0:
            return [parameter.data for parameter in self._engine.module.parameters()]
        optimizer = self._engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        return [partition.data for partition in flat]

    def _copies(self) -> list[Tensor]:
        return [partition.clone() for partition in self._partitions()]

    def _write_partitions(self, values: list[Tensor]) -> None:
        for partition, value in zip(self._partitions(), values, strict=True):
            partition.copy_(value)

    @contextmanager
    def _kept_weights(self) -> Iterator[None]:
        """Put the fp32 weights back at the end of the block, bit by bit."""
        kept = self._copies()
        try:
            yield
        finally:
            self._write_partitions(kept)

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files of this rank into `folder`; every rank must call it. Raises StorageError: a full disk."""
        try:
            self._engine.save_checkpoint(
                str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=False
            )
        except (OSError, RuntimeError) as failure:
            # torch's writer tells of its file, and not of the disk's reason; any other RuntimeError is a fault of ours
            if isinstance(failure, RuntimeError) and "inline_container" not in str(failure):
                raise
            free_gb = shutil.disk_usage(folder.parent).free / 1e9
            raise StorageError(
                f"{folder}: cannot write ({free_gb:.2g} GB are free): {failure}".splitlines()[0]
            ) from None

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at the same world size, or what `convert` made of it, at any.

        The caller has verified the files' hashes: this unpickles.
        """
        path, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load")
        if self.universal:
            self._mend_universal()

    def _mend_universal(self) -> None:
        """Set right what DeepSpeed 0.19 leaves wrong after it has loaded a universal checkpoint."""
        optimizer = self._engine.optimizer
        # every group gets the settings of the first, and norms would begin to decay
        for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
            group["weight_decay"] = decay
        # under ZeRO-3 all groups share one step counter, which each of them would count up; fused AdamW wants it beside
        # the weights
        for partition, state in optimizer.optimizer.state.items():
            state["step"] = state["step"].to(partition.device, copy=True)


def _parameter_groups(
    model: nn.Module, weight_decay: float, rate_share: Callable[[str], float]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return AdamW's groups, and each one's share of the learning rate; matrices decay, norms and biases do not."""
    by_share: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_share.setdefault(rate_share(name), []).append(parameter)
    groups, shares = [], []
    for share, parameters in by_share.items():
        matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        for members, decay in ((matrices, weight_decay), (others, 0.0)):
            if members:
                groups.append({"params": members, "weight_decay": decay})
                shares.append(share)
    return groups, shares


def convert(folder: Path, target: Path) -> None:
    """Make a universal checkpoint, which any number of ranks can load, of a verified one; one process alone calls it.

    Raises:
        CheckpointError: DeepSpeed's converter failed.
    """
    shutil.rmtree(target, ignore_errors=True)
    arguments = ["--input_folder", str(folder), "--output_folder", str(target), "--inject_missing_state"]
    # another process: the converter forks workers, which a process that talks to other ranks must not
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise CheckpointError(f"{folder}: cannot be converted for another number of ranks: {last}")
