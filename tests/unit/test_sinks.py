"""TensorBoard and wandb get what metrics.jsonl gets, and neither can stop or hold up a run. wandb is the real one."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megascale.log import MetricLog, read_metrics

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "01234567"  # no one's


def run(script: str, folder: Path, timeout: float = 120, **environment: str) -> str:
    """Run a script that logs to wandb in a process of its own, since wandb leaves handlers for its process's end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env={**clean, "WANDB_API_KEY": KEY, "RANK": "0", "WANDB_ERROR_REPORTING": "false", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


LOG = """
import sys, time
from pathlib import Path
from megascale.log import MetricLog
from megascale.sinks import WandbSink
start = int(sys.argv[2]) if len(sys.argv) > 2 else 0
log = MetricLog(Path(sys.argv[1]) / "metrics.jsonl", start, wandb_project="test", name="run")
"""


def assert_said_once(printed: str) -> None:
    (line,) = (line for line in printed.splitlines() if not line.startswith("wandb: "))  # those are its own
    assert line.startswith("wandb stopped taking metrics (")


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format after a header of 7 bytes, which counts in the first block."""
    data, place, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if 32_768 - place % 32_768 < 7:  # no room for a header: the block ends with zeros
            place += 32_768 - place % 32_768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def wandb_rows(folder: Path) -> list[dict[str, float]]:
    """Metrics in the offline files of a folder, as `wandb sync` would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in sorted((folder / "wandb").glob("*run-*/*.wandb")):
        for data in records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def test_tensorboard_holds_every_metric_of_every_step(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.write(1, {"train/loss": 2.5, "train/acc_q0": 0.25})
    assert events(tmp_path, "train/loss") == [(1, 2.5)], "readable while the run goes on"
    log.write(2, {"train/loss": 2.0})
    log.close()
    assert events(tmp_path, "train/loss") == [(1, 2.5), (2, 2.0)]
    assert events(tmp_path, "train/acc_q0") == [(1, 0.25)]


def test_tensorboard_of_a_resumed_run_shows_no_step_twice(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl", tensorboard=True)
    for step in range(1, 6):
        log.write(step, {"train/loss": float(step)})
    log.close()
    time.sleep(1.1)  # event files are named, and read in order, by the second
    resumed = MetricLog(tmp_path / "metrics.jsonl", resume_step=3, tensorboard=True)
    resumed.write(4, {"train/loss": 40.0})
    resumed.close()
    assert events(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_only_rank_zero_opens_sinks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = MetricLog(tmp_path / "metrics.jsonl", tensorboard=True, wandb_project="test")
    log.write(1, {"train/loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_sink_that_cannot_be_opened_is_said_once_and_the_rest_goes_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = MetricLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.write(1, {"train/loss": 1.0})
    log.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard is not available (FileExistsError")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_wandb_offline_keeps_the_metrics_in_the_run_folder(tmp_path):
    script = LOG + (
        'log.write(1, {"train/loss": 2.5})\n'
        'log.write(1, {"valid/loss": 3.0})\n'
        'log.write(2, {"train/loss": 2.0})\n'
        "log.close()\n"
    )
    printed = run(script, tmp_path, WANDB_MODE="offline")
    assert printed == ""
    assert wandb_rows(tmp_path) == [{"train/loss": 2.5, "valid/loss": 3.0}, {"train/loss": 2.0}]


def test_restart_goes_on_in_the_same_wandb_run(tmp_path):
    for i in range(2):
        script = LOG + f'log.write({i + 1}, {{"train/loss": {i}.5}})\nlog.close()'
        run(script, tmp_path, WANDB_MODE="offline")
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    (name,) = {file.name for file in files}
    assert name == f"run-{(tmp_path / 'wandb_id.txt').read_text().strip()}.wandb"
    assert sorted(row["train/loss"] for row in wandb_rows(tmp_path)) == [0.5, 1.5]


def test_dead_wandb_server_neither_stops_nor_holds_up_the_run(tmp_path):
    with socket.socket() as probe:  # a port that nobody listens at
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = LOG.replace("log = ", "WandbSink.INIT_SECONDS = 3\nWandbSink.FINISH_SECONDS = 5.0\nlog = ") + (
        "for step in range(1, 4):\n"
        '    log.write(step, {"train/loss": 1.0})\n'
        "began = time.monotonic()\n"
        "log.close()\n"
        'assert time.monotonic() - began < 20, "the bound is 5 s; the rest is for a busy machine"\n'
    )
    printed = run(script, tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_MODE="online")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert_said_once(printed)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_wandb_service_that_dies_or_hangs_in_mid_run_does_not_stop_logging(tmp_path, how):
    script = LOG.replace("log = ", "WandbSink.FINISH_SECONDS = 5.0\nlog = ") + (
        "import psutil\n"
        'log.write(1, {"train/loss": 1.0})\n'
        "service = []\n"
        "while not service or log._sinks['wandb']._rows.qsize():\n"
        "    time.sleep(0.05)\n"
        "    service = [c for c in psutil.Process().children() if c.name().startswith('wandb-core')]\n"
        f"service[0].send_signal({int(how)})\n"
        "for step in range(2, 40):\n"
        '    log.write(step, {"train/loss": 1.0})\n'
        "    time.sleep(0.02)\n"
        "log.close()\n"
    )
    printed = run(script, tmp_path, WANDB_MODE="offline")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 40))
    assert_said_once(printed)
