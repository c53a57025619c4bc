"""Running sums: exact, over steps and over ranks, and what was added is left alone."""

import subprocess
import sys

import torch

from megascale.train.metrics import Sums, max_over_ranks


def test_sums_add_up_by_name_and_start_again_when_taken():
    sums = Sums()
    for step in range(1, 5):
        sums.add({"loss_Q": torch.tensor([1.0, 2.0]) * step, "count": torch.tensor(step)})
    taken = sums.take()
    assert torch.equal(taken["loss_Q"], torch.tensor([10.0, 20.0]).double())
    assert torch.equal(taken["count"], torch.tensor(10.0).double())
    assert sums.take() == {}
    sums.add({"count": torch.tensor(3)})
    assert sums.take()["count"] == 3


def test_small_values_are_not_lost_beside_large_sums():
    sums = Sums()
    sums.add({"loss": torch.tensor(2.0**24)})
    for _ in range(100):
        sums.add({"loss": torch.tensor(1.0)})  # fp32 would stay at 2^24
    assert sums.take()["loss"] == 2**24 + 100


def test_what_was_added_is_neither_changed_nor_followed():
    sums, value = Sums(), torch.ones(2, dtype=torch.float64)
    sums.add({"a": value})
    value += 5
    sums.add({"a": value})
    assert torch.equal(value, torch.full((2,), 6.0).double())
    assert torch.equal(sums.take()["a"], torch.full((2,), 7.0).double())


def test_sums_keep_no_graph():
    sums = Sums()
    sums.add({"loss": torch.ones(2, requires_grad=True) * 2})
    assert not sums.take()["loss"].requires_grad


def test_largest_value_of_one_process_is_its_own():
    assert max_over_ranks(0.1) == 0.1


TWO_RANKS = """
import sys, torch
from megascale.train.metrics import Sums, max_over_ranks
rank = int(sys.argv[1])
store = torch.distributed.FileStore(sys.argv[2], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
sums, names = Sums(), ["a", "b"] if rank == 0 else ["b", "a"]
for round in (1, 2):
    value = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
    sums.add({name: value * (1 if name == "a" else 100) * round for name in names})
    taken = sums.take()
    assert torch.equal(taken["a"], torch.tensor([3.0, 30.0]).double() * round), taken
    assert torch.equal(taken["b"], torch.tensor([300.0, 3000.0]).double() * round), taken
assert max_over_ranks(5.0 - rank) == 5.0
assert max_over_ranks(5.0 + rank) == 6.0
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else gloo's threads may abort the process as it ends
"""


def test_sums_and_maxima_are_taken_over_all_ranks_whatever_the_order_of_names(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
