"""Running sums of what a step reports, averaged over ranks only when they are read."""

import torch
from torch import Tensor


class Sums:
    """Adds up named tensors; every rank must add the same names."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add tensors to the running sums, without waiting for the device."""
        for name, value in values.items():
            dtype = torch.float64 if value.device.type == "cpu" else torch.float32
            # a copy: `take` sums over ranks in place
            value = value.detach().to(dtype, copy=True)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, Tensor]:
        """Return the sums over all ranks, on the CPU, and start again from nothing."""
        sums, self._sums = self._sums, {}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for name in sorted(sums):
                torch.distributed.all_reduce(sums[name])
        return {name: value.cpu() for name, value in sums.items()}


def max_over_ranks(value: float) -> float:
    """Return the largest of every rank's value; every rank must call it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest = torch.tensor(value, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)
