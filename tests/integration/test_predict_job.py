"""Prediction as a user runs it: from a fine-tuned run, on disks and S3, streaming, and when its reader goes away."""

import csv
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from classifiers import draw_codes, write_classifier, write_stream
from conftest import ENVIRONMENT, ROOT, command, run
from support import write_token_folder


def lines_of(*arguments: object, exit_code: int = 0) -> list[dict]:
    """Run the script; return what it printed to stdout, which holds JSON lines alone."""
    done = subprocess.run(
        command("predict.py", *map(str, arguments)),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def finetuned(tokens, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finetuned") / "run"
    overrides = [f"data.url={tokens}", f"output.url={output}", "arm=scratch", "checkpoint=null", "train.epochs=1"]
    small = [f"model.{name}" for name in ("layers=1", "width=32", "heads=2", "mlp_width=48")]
    run(command("finetune.py", "configs/finetune/smoke.yaml", *overrides, *small))
    return output


def test_answers_are_those_that_fine_tuning_wrote_down(tokens, finetuned):
    lines = {line["key"]: line for line in lines_of(finetuned, tokens, "--window", "whole")}
    assert len(lines) == 40
    rows = list(csv.DictReader((finetuned / "predictions.csv").open()))
    assert len(rows) == 8
    for row in rows:
        line = lines[row["recording"].replace("recording", "clip")]  # one clip each
        assert line["label"] == row["predicted"]
        for name, share in line["probabilities"].items():
            assert share == pytest.approx(float(row[name]), abs=6e-5)  # four decimals there


def test_a_bucket_gives_the_answers_of_a_local_disk(server, tokens, finetuned, tmp_path):
    for i in range(3):
        write_stream(tmp_path / "clips" / f"{i}.ecdc", draw_codes(75, seed=i))
    (tmp_path / "clips" / "cut.ecdc").write_bytes((tmp_path / "clips" / "0.ecdc").read_bytes()[:-9])
    for folder, prefix in ((tokens, "tokens"), (finetuned, "run"), (tmp_path / "clips", "clips")):
        server.upload(folder, prefix)
    local = lines_of(finetuned, tmp_path / "clips", tokens, "--embeddings", tmp_path / "here.npz", exit_code=3)
    remote = lines_of(
        "s3://bucket/run", "s3://bucket/clips", "s3://bucket/tokens", "--endpoint-url", server.endpoint,
        "--embeddings", "s3://bucket/out/there.npz", exit_code=3,
    )  # fmt: skip
    assert len(local) == 44
    for line in local:
        for key in ("source", "error"):
            text = line.get(key, "").replace(str(tmp_path / "clips"), "s3://bucket/clips")
            line |= {key: text.replace(str(tokens), "s3://bucket/tokens")} if key in line else {}
    assert remote == local
    with server.filesystem().open("bucket/out/there.npz") as file:
        there = np.load(file)["embedding"]
    assert np.array_equal(there, np.load(tmp_path / "here.npz")["embedding"])
    (one,) = lines_of("s3://bucket/run/model", "s3://bucket/clips/1.ecdc", "--endpoint-url", server.endpoint)
    assert one == remote[1]


def test_stdin_is_answered_line_by_line_as_it_comes(tmp_path):
    write_classifier(tmp_path / "model")
    clips = [write_stream(tmp_path / f"{i}.ecdc", draw_codes(20, seed=i)) for i in range(3)]
    process = subprocess.Popen(
        command("predict.py", str(tmp_path / "model"), "-"), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    watchdog = threading.Timer(60, process.kill)  # else a missing answer would be waited for
    watchdog.start()
    try:
        for clip in [*clips, tmp_path / "gone.ecdc", clips[0]]:
            process.stdin.write(f"{clip}\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())  # before the next one is asked
            assert line["source"] == str(clip)
            assert ("error" in line) == (clip.name == "gone.ecdc")
        process.stdin.close()
        assert process.wait(timeout=60) == 3
        assert process.stderr.read().startswith("4 clips labelled on stdout; 1 could not be read")
    finally:
        watchdog.cancel()
        process.kill()
        for stream in (process.stdout, process.stderr):
            stream.close()


def test_a_stop_ends_with_75_and_a_reader_that_goes_away_with_2(tmp_path, start):
    write_classifier(tmp_path / "model")
    clip = write_stream(tmp_path / "clip.ecdc", draw_codes(20))
    waits = subprocess.Popen(
        command("predict.py", str(tmp_path / "model"), "-"), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    waits.stdin.write(f"{clip}\n")
    waits.stdin.flush()
    waits.stdout.readline()
    waits.terminate()
    assert waits.communicate(timeout=60)[1] == "Stopped: 1 clips are answered for; the same command begins anew\n"
    assert waits.returncode == 75

    write_token_folder(tmp_path / "tokens", 3000, frames=2, clips_per_shard=1000)
    line = command("predict.py", str(tmp_path / "model"), str(tmp_path / "tokens"), "--batch", "1")
    reads = subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reads.stdout.readline()
    reads.stdout.close()
    assert reads.wait(timeout=60) == 2
    err = reads.stderr.read()
    reads.stderr.close()
    assert err.startswith("StorageError: stdout: its reader is gone after ") and err.count("\n") == 1
