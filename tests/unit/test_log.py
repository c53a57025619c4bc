"""Logging: one rank speaks, lines stay few, and every step's metrics stand in the file once."""

import json
import math
import os
import pty
import re
import sys
import time

import pytest

from megascale.log import MetricLog, Progress, duration, rank, read_metrics, say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (47.4, "47s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.6, "1h00m"),
        (7800, "2h10m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (3 * 86_400 + 4 * 3600, "3d04h"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_duration_reads_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_only_rank_zero_speaks(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    assert rank() == 0
    say("hello")
    monkeypatch.setenv("RANK", "1")
    say("not this")
    Progress("work", 2).close()
    log = MetricLog(tmp_path / "run" / "metrics.jsonl")
    log.write(1, {"train/loss": 1.0})
    log.close()
    captured = capsys.readouterr()
    assert captured.err == "hello\n"
    assert captured.out == "", "stdout belongs to results"
    assert list(tmp_path.iterdir()) == []


def test_progress_in_a_log_file_stays_short(capsys):
    progress = Progress("encoding", 1000, unit="clips")
    for done in range(1001):
        progress.update(done)
    progress.close("3 bad")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "a thousand quick updates are one line"
    assert lines[0].startswith("encoding  100%  1000/1000 clips  ")
    assert lines[0].endswith("s taken  3 bad")


def test_last_line_has_the_newest_note(capsys):
    progress = Progress("encoding", 2)
    progress.update(1, "one")
    progress.update(2, "two")
    progress.close()
    assert capsys.readouterr().err.endswith("taken  two\n")


def test_progress_tells_time_left_from_what_this_run_did(capsys):
    began = time.monotonic()
    progress = Progress("encoding", 120, done=90)
    time.sleep(0.2)
    least = time.monotonic() - began - 0.01  # the object's clock started a moment after ours
    progress.update(91)
    progress.close()
    most = time.monotonic() - began
    line = re.fullmatch(r"encoding   76%  91/120  (\d+)s left\n", capsys.readouterr().err)
    assert line is not None
    assert round(29 * least) <= int(line[1]) <= round(29 * most), "29 clips are left, and one took this long"


def test_progress_before_anything_is_done_does_not_guess(capsys):
    Progress("encoding", 100, done=90).close()
    assert capsys.readouterr().err == "encoding   90%  90/100  ? left\n"


def test_progress_of_nothing_does_not_fail(capsys):
    Progress("encoding", 0).close()
    assert "0/0" in capsys.readouterr().err


def test_progress_without_a_title_is_silent(capsys):
    progress = Progress("", 10)
    progress.update(5)
    progress.close()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_rewrites_its_line(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("encoding", 10)
        progress.update(5, note="a long note")
        progress.update(10)
        progress.close()
        monkeypatch.undo()
        text = ""
        while not text.endswith("\n"):  # a terminal hands over what it has
            text += os.read(reader, 4096).decode()
    os.close(reader)
    first, last = text.strip("\r\n").split("\r")
    assert "5/10" in first
    assert first.endswith("a long note")
    assert last.rstrip().endswith("taken")
    assert len(last) == len(first), "a shorter line covers the longer one before it"
    assert text.count("\n") == 1


def test_line_said_over_a_progress_line_does_not_mix_with_it(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress("encoding", 10)
        progress.update(5, note="a long note")
        say("loss spike")
        monkeypatch.undo()
        text = ""
        while not text.endswith("\n"):  # a terminal hands over what it has
            text += os.read(reader, 4096).decode()
    os.close(reader)
    assert text.rstrip("\r\n").endswith("a long note\r\x1b[Kloss spike")  # back to the start, erase, then speak


def test_metrics_are_one_json_object_a_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricLog(path)
    log.write(1, {"train/loss": 2.5, "valid/acc_q0": 0.25})
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.5, "valid/acc_q0": 0.25}], (
        "readable while the run goes on"
    )
    log.write(2, {"train/loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resumed_run_repeats_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    for step in range(1, 6):
        log.write(step, {"train/loss": float(step)})
    log.close()
    resumed = MetricLog(path, resume_step=3)
    for step in range(4, 7):
        resumed.write(step, {"train/loss": 10.0 * step})
    resumed.close()
    assert [(row["step"], row["train/loss"]) for row in read_metrics(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0),
    ]  # fmt: skip


def test_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        log = MetricLog(path)
        log.write(1, {"train/loss": 1.0})
        log.close()
    assert len(read_metrics(path)) == 1


def test_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.25}\n'
    for size in range(len(whole)):
        path.write_text(whole[:size])
        rows = read_metrics(path)
        assert len(rows) == whole[: size + 1].count("\n")
        assert [row["step"] for row in rows] == [1, 2][: len(rows)]
    log = MetricLog(path, resume_step=1)
    log.write(2, {"train/loss": 0.125})
    log.close()
    assert [row["train/loss"] for row in read_metrics(path)] == [0.5, 0.125]


def test_missing_metrics_are_no_rows(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
