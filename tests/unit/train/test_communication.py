"""Communication on paper, held against what DeepSpeed says it sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.train.communication import Cluster, sent_bytes, step_time

ROOT = Path(__file__).resolve().parents[3]
COUNT = """
import json, sys
import deepspeed, torch
from megascale.train.engine import Engine, init_distributed
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig

torch.set_num_threads(1)
rank, ranks = init_distributed()
logger = deepspeed.comm.comm.comms_logger

class Layers(torch.nn.Sequential):
    def forward(self, x_BD):
        return super().forward(x_BD)

counts = []
for stage in range(4):
    for accumulation in (1, 3):
        torch.manual_seed(0)
        model = Layers(*[torch.nn.Linear(512, 512, bias=False) for _ in range(4)])
        zero = ZeroConfig(stage=stage, deepspeed_json=sys.argv[1])
        engine = Engine(model, OptimConfig(), zero, 4, accumulation, 10)
        batches = [{"x_BD": torch.randn(4, 512)} for _ in range(accumulation)]
        for step in range(2):
            logger.comms_dict.clear()  # the first update also brings the ranks into step
            engine.train_step(step, batches, lambda y_BD, batch: (y_BD.square().mean(), {}))
        told = {op: sum(size * each[0] for size, each in sizes.items()) for op, sizes in logger.comms_dict.items()}
        counts.append([stage, accumulation, told])
if rank == 0:
    print("COUNTS", json.dumps([4 * 512 * 512, counts]))
torch.distributed.destroy_process_group()
"""


def test_bytes_are_those_that_deepspeed_logs(tmp_path):
    """Its log has what a collective is called with: the whole of an all-reduce or a reduce-scatter, a rank's part of an
    all-gather."""
    (tmp_path / "ds.json").write_text(json.dumps({"comms_logger": {"enabled": True, "prof_all": True}}))
    (tmp_path / "count.py").write_text(COUNT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [*launcher, str(tmp_path / "count.py"), str(tmp_path / "ds.json")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith("COUNTS "))
    num_weights, counts = json.loads(told.removeprefix("COUNTS "))
    assert len(counts) == 8
    for stage, accumulation, sizes in counts:
        one_way = (2 * sizes.get("all_reduce", 0) + sizes.get("reduce_scatter_tensor", 0)) / 2 + sizes.get(
            "all_gather_into_tensor", 0
        )
        expected = sent_bytes(num_weights, stage, "fp32", 2, accumulation)
        assert one_way == pytest.approx(expected, rel=1e-3), (stage, accumulation, sizes)


CLUSTER = Cluster(
    peak_tflops=1000,
    mfu=0.5,
    memory_gb_per_second=1000,
    gpus_per_node=8,
    node_gb_per_second=400,
    network_gb_per_second=200,
    latency_seconds=1e-3,
)


def test_one_rank_sends_nothing_and_bf16_half_of_fp32():
    assert all(sent_bytes(1000, stage, "fp32", 1, 4) == 0 for stage in range(4))
    assert sent_bytes(1000, 1, "bf16", 8, 1) == sent_bytes(1000, 1, "fp32", 8, 1) / 2 == 3 * 2 * 1000 * 7 / 8


def test_a_ring_over_nodes_is_as_fast_as_the_network_and_as_late_as_its_depth():
    inside, outside = (step_time(1e12, 10**9, 1, "bf16", ranks, 1, CLUSTER) for ranks in (8, 32))
    assert inside.compute == outside.compute == pytest.approx(1e12 / 500e12)
    assert inside.communication == pytest.approx(3 * 2e9 * 7 / 8 / 400e9)
    assert outside.communication == pytest.approx(3 * 2e9 * 31 / 32 / 200e9 + 3 * 2 * 1e-3)
    assert inside.optimizer == pytest.approx(4 * outside.optimizer) == pytest.approx(28e9 / 8 / 1e12)


def test_stage_0_updates_every_weight_on_every_rank():
    assert step_time(1, 10**9, 0, "fp32", 16, 1, CLUSTER).optimizer == pytest.approx(28e9 / 1e12)


def test_gathering_twice_is_not_counted():
    with pytest.raises(ValueError, match="2000000000 weights"):
        sent_bytes(2 * 10**9, 3, "bf16", 2, 1)
