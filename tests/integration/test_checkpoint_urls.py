"""Checkpoints on S3: uploaded beside training, listed, verified, refused when damaged, fetched onto a new machine."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from checkpoints import FACTS, WEIGHTS, save, steps
from conftest import ENVIRONMENT, ROOT, command, deepspeed, run, torchrun
from fault_proxy import FaultProxy
from s3_servers import Server, keys_in_environment, keys_that_may, moto
from test_pretrain import SMOKE, assert_equal_weights, weights
from test_tokenize import wait_for

from megascale import retry, storage
from megascale.errors import CheckpointError, StorageError
from megascale.log import read_metrics
from megascale.train import checkpoint
from megascale.train.manifest import list_checkpoints
from megascale.train.uploads import Uploads, fetch_newest, sync


@pytest.fixture(scope="module")
def bucket() -> Iterator[Server]:
    with keys_in_environment(), moto() as started:
        yield started


@pytest.fixture
def store(server) -> Server:
    storage.configure(storage.StorageConfig(endpoint_url=server.endpoint))
    return server


def megascale(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megascale", "checkpoints", *arguments]


def in_bucket(server: Server, prefix: str) -> dict[str, bytes]:
    fs = server.filesystem()
    return {name.removeprefix(f"bucket/{prefix}/"): fs.cat_file(name) for name in fs.find(f"bucket/{prefix}")}


def on_disk(checkpoints: Path) -> dict[str, bytes]:
    """The files of every checkpoint; DeepSpeed leaves a script beside them."""
    files = [p for p in checkpoints.glob("step-*/**/*") if p.is_file()]
    return {p.relative_to(checkpoints).as_posix(): p.read_bytes() for p in files}


def flip(url: str) -> None:
    data = bytearray(storage.read_bytes(url))
    data[len(data) // 2] ^= 1
    storage.publish_bytes(url, bytes(data))


def test_uploaded_listed_verified_and_refused_by_name_once_a_byte_is_flipped(store, tmp_path):
    here = tmp_path / "checkpoints"
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 4.0)):
        save(here, step, loss, weights=step)
    sync(here, "s3://bucket/run", 2, None)
    shutil.rmtree(here / "step-00000001")
    assert in_bucket(store, "run/checkpoints") == on_disk(here)

    at = ["s3://bucket/run", "--endpoint-url", store.endpoint]
    listed = run(megascale("list", *at)).splitlines()
    assert [line.split()[0] for line in listed[1:]] == ["step-00000002", "step-00000003", "step-00000004"]
    assert listed[1].endswith("committed, best") and listed[3].endswith("committed, newest")
    assert run(megascale("verify", *at)).count("whole") == 3
    best, facts = checkpoint.read_model("s3://bucket/run")
    assert facts == FACTS and (best["norm.weight"] == 2 * WEIGHTS["norm.weight"]).all()

    damaged = "s3://bucket/run/checkpoints/step-00000002/model/model.safetensors"
    flip(damaged)
    printed = run(megascale("verify", *at), exit_code=2)
    assert f"{damaged}: its sha256 is not the one in manifest.json" in printed
    assert "CheckpointError: s3://bucket/run: 1 file is damaged or missing" in printed
    for url in ("s3://bucket/run", "s3://bucket/run/checkpoints/step-00000002/", damaged.rpartition("/")[0]):
        with pytest.raises(CheckpointError, match=f"^{damaged}: its sha256"):
            checkpoint.read_model(url)
    run(megascale("verify", "s3://bucket/run/checkpoints/step-00000003", *at[1:]))
    assert "1 of 3 checkpoints deleted" in run(megascale("prune", *at, "--keep-last", "1"))
    assert [each.step for each in list_checkpoints("s3://bucket/run")] == [2, 4]


def test_keys_that_may_not_delete_upload_and_are_told_what_stays(bucket, monkeypatch, tmp_path, capsys):
    """S3 answers such a deletion with 200 and a list of what it refused."""
    for step in (1, 2, 3):
        save(tmp_path, step)
        if step == 2:
            sync(tmp_path, "s3://bucket/kept", 2, None)
    with keys_that_may(bucket, ["s3:PutObject", "s3:ListBucket", "s3:GetObject"], monkeypatch):
        sync(tmp_path, "s3://bucket/kept", 1, None)
        refused = "s3://bucket/kept/checkpoints/step-00000001/manifest.json: permission denied"
        assert f"what is no longer kept stays there: {refused}" in capsys.readouterr().err
        printed = run(
            megascale("prune", "s3://bucket/kept", "--keep-last", "1", "--endpoint-url", bucket.endpoint), exit_code=2
        )
        assert f"StorageError: {refused}" in printed and "checkpoints deleted" not in printed
        assert [each.step for each in list_checkpoints("s3://bucket/kept") if each.manifest] == [1, 2, 3]
    sync(tmp_path, "s3://bucket/kept", 1, None)
    assert [each.step for each in list_checkpoints("s3://bucket/kept")] == [3]


def test_only_what_the_model_needs_is_read(store, tmp_path):
    save(tmp_path, 1)
    sync(tmp_path, "s3://bucket/needed", 1, None)
    folder = "s3://bucket/needed/checkpoints/step-00000001"
    for name in ("zero/optim_states.pt", "rank-00000.safetensors"):
        storage.delete(f"{folder}/{name}")
    assert checkpoint.read_model(folder)[1] == FACTS
    storage.delete(f"{folder}/model/config.json")
    with pytest.raises(CheckpointError, match=f"^{folder}/model/config.json: missing from a committed checkpoint$"):
        checkpoint.read_model(folder)
    storage.delete(f"{folder}/manifest.json")
    for url, message in (
        ("s3://bucket/needed", "a run without a committed checkpoint$"),
        (folder, "no manifest; not a checkpoint"),
        ("s3://bucket/nothing", "no checkpoint here: config.json is missing$"),
    ):
        with pytest.raises(CheckpointError, match=f"^{url}: {message}"):
            checkpoint.read_model(url)


def test_bare_model_folder_is_read_from_a_bucket(store, tmp_path):
    checkpoint.write_model(tmp_path / "model", WEIGHTS, FACTS)
    store.upload(tmp_path / "model", "bare")
    found, facts = checkpoint.read_model("s3://bucket/bare")
    assert facts == FACTS and (found["head.bias"] == WEIGHTS["head.bias"]).all()


def test_big_file_goes_in_parts_and_comes_back_the_same(store, tmp_path):
    folder = checkpoint.step_folder(tmp_path / "here", 1)
    checkpoint.begin(folder)
    with (folder / "big.pt").open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(101 << 20)  # above the size from which a file is sent in parts
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    checkpoint.commit(folder, 1, 16, 1, None)
    sync(tmp_path / "here", "s3://bucket/big", 1, None)
    fetched = fetch_newest("s3://bucket/big", tmp_path / "new machine")
    assert fetched is not None
    assert checkpoint.verify(fetched) == checkpoint.verify(folder)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "_PAUSE_SECONDS", 0.01)


def test_upload_and_fetch_outlive_a_bad_moment(server, impatient, tmp_path):
    with FaultProxy(server.endpoint, share=0.15, kinds=("500", "503", "cut")) as proxy:
        storage.configure(storage.StorageConfig(endpoint_url=proxy.url))
        for step in (1, 2):
            save(tmp_path / "here", step, valid_loss=float(step))
        sync(tmp_path / "here", "s3://bucket/faults", 1, None)
        assert fetch_newest("s3://bucket/faults", tmp_path / "there") is not None
        assert sum(count for kind, count in proxy.done.items() if kind != "good") >= 5, proxy.done
    assert steps(checkpoint.committed(tmp_path / "there")) == [2]
    checkpoint.verify(checkpoint.step_folder(tmp_path / "there", 2))
    assert in_bucket(server, "faults/checkpoints") == on_disk(tmp_path / "here")


def test_endpoint_that_is_dead_is_told_and_what_it_missed_is_brought_when_it_is_back(
    bucket, impatient, tmp_path, capsys
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    storage.configure(storage.StorageConfig(endpoint_url=nobody))
    here = tmp_path / "checkpoints"
    beside = Uploads(here, "s3://bucket/dead", 2, None)
    for step in (1, 2):
        save(here, step)
        beside.start()
        beside.join_unless_stopping()
    assert capsys.readouterr().err.count("upload failed, and is tried again with the next checkpoint") == 2
    with pytest.raises(StorageError, match=f"all is safe in {here}, and the same command uploads it"):
        beside.finish()
    storage.configure(storage.StorageConfig(endpoint_url=bucket.endpoint))
    save(here, 3)
    beside.start()
    beside.finish()
    assert steps(checkpoint.committed(here)) == [1, 2, 3]
    assert [each.step for each in list_checkpoints("s3://bucket/dead")] == [2, 3]


# --------------------------------------------------------------------------------------------------------- whole jobs


def pretrain(tokens: Path, output: Path, *overrides: str) -> list[str]:
    return command("pretrain.py", SMOKE, f"data.url={tokens}", f"output.url={output}", *overrides)


def test_run_goes_on_from_its_url_on_a_machine_that_has_nothing(tokens, bucket, tmp_path):
    there = ["checkpoint.upload_url=s3://bucket/job", f"storage.endpoint_url={bucket.endpoint}"]
    printed = run(pretrain(tokens, tmp_path / "first", *there))
    assert printed.count("uploaded in") == 2
    assert {k: v for k, v in in_bucket(bucket, "job").items() if k != "config.yaml"} == {
        f"checkpoints/{k}": v for k, v in on_disk(tmp_path / "first" / "checkpoints").items()
    }
    shape = [f"data.url={tokens}", "checkpoint=s3://bucket/job", f"output.url={tmp_path / 'tuned'}", there[1]]
    assert "M parameters" in run(command("finetune.py", "configs/finetune/smoke.yaml", *shape, "--dry-run"))

    bucket.filesystem().rm("bucket/job/checkpoints/step-00000006", recursive=True)
    refused = run(pretrain(tokens, tmp_path / "other", *there, "seed=1"), exit_code=2)
    assert "seed=1: the run in s3://bucket/job was started with 0; choose another checkpoint.upload_url" in refused
    assert not (tmp_path / "other").exists()

    printed = run(pretrain(tokens, tmp_path / "second", *there))
    fetched = tmp_path / "second" / "checkpoints" / "step-00000003"
    assert f"{fetched}: fetching " in printed and " from s3://bucket/job/checkpoints/step-00000003\n" in printed
    assert f"going on from {fetched} (step 3 of 6)" in printed
    assert_equal_weights(weights(tmp_path / "second", 6), weights(tmp_path / "first", 6))
    storage.configure(storage.StorageConfig(endpoint_url=bucket.endpoint))
    assert [each.step for each in list_checkpoints("s3://bucket/job")] == [3, 6]

    flip("s3://bucket/job/checkpoints/step-00000006/mp_rank_00_model_states.pt")
    printed = run(pretrain(tokens, tmp_path / "third", *there), exit_code=2)
    assert "s3://bucket/job/checkpoints/step-00000006/mp_rank_00_model_states.pt: its sha256 is not the one" in printed


def test_last_upload_that_fails_ends_with_2_and_the_same_command_repairs_it(tokens, tmp_path):
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "checkpoints").write_text("a file in the way of every upload")
    line = pretrain(tokens, tmp_path / "run", f"checkpoint.upload_url={there}")
    printed = run(line, exit_code=2)
    assert printed.count("upload failed, and is tried again") == 2  # after each save
    assert "StorageError: " in printed and "the same command uploads it" in printed and "Traceback" not in printed
    assert (tmp_path / "run" / "result.json").exists()
    saved = checkpoint.committed(tmp_path / "run" / "checkpoints")
    assert steps(saved) == [3, 6]
    assert "the same command uploads it" in run(line, exit_code=2)  # also of a run that is done
    (there / "checkpoints").unlink()
    printed = run(line)
    assert "already done" in printed and printed.count("uploaded in") == 2
    assert on_disk(there / "checkpoints") == on_disk(tmp_path / "run" / "checkpoints")
    assert "uploaded in" not in run(line)


def test_sigterm_saves_and_uploads_what_was_saved(tokens, tmp_path, start):
    there = tmp_path / "elsewhere"
    endless = ["train.steps=100000", "checkpoint.every=50000", "train.validate_every=50000"]
    driver = start(pretrain(tokens, tmp_path / "run", f"checkpoint.upload_url={there}", *endless))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 3, driver)
    driver.terminate()
    assert driver.wait(timeout=60) == 75
    assert len(checkpoint.committed(tmp_path / "run" / "checkpoints")) == 1
    assert on_disk(there / "checkpoints") == on_disk(tmp_path / "run" / "checkpoints")


def test_every_rank_waits_for_the_last_upload(tokens, tmp_path, monkeypatch):
    """Of several nodes, a launcher leaves one on its own some minutes after the others have ended."""
    monkeypatch.setitem(ENVIRONMENT, "MEGASCALE_EXIT_CODES", str(tmp_path / "codes"))
    there = tmp_path / "elsewhere"
    line = pretrain(tokens, tmp_path / "run", f"checkpoint.upload_url={there}")[2:]
    for again in (False, True):
        printed = run(torchrun(2, write_far_program(tmp_path, 0.3), *line))
        assert ("already done" in printed) == again
        uploaded = (there / "checkpoints" / "step-00000006" / "manifest.json").stat().st_mtime
        assert all((tmp_path / "codes" / f"rank-0000{rank}").stat().st_mtime >= uploaded for rank in range(2))
        shutil.rmtree(there)


def write_far_program(folder: Path, seconds: float) -> Path:
    """Write pretraining whose store takes so long for each file."""
    program = folder / "far.py"
    program.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megascale import cli, storage\n"
        "true = storage.upload\n"
        f"storage.upload = lambda path, url: (time.sleep({seconds}), true(path, url))\n"
        "sys.exit(cli.pretrain())\n"
    )
    return program


@pytest.mark.parametrize("seconds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_sigterm_lets_every_rank_wait_for_the_upload(tokens, tmp_path, start, seconds):
    """A launcher that sees one rank end sends SIGTERM to the others, also to the one that uploads (8 files and the
    manifest), and 30 seconds later kills it."""
    program, there = write_far_program(tmp_path, seconds), tmp_path / "elsewhere"
    endless = ["train.steps=100000", "checkpoint.every=50000", "train.validate_every=50000"]
    line = pretrain(tokens, tmp_path / "run", f"checkpoint.upload_url={there}", *endless)[2:]
    driver = start(deepspeed(2, str(program), *line))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) > 3, driver)
    ranks = psutil.Process(driver.pid).children(recursive=True)
    driver.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    assert len(checkpoint.committed(tmp_path / "run" / "checkpoints")) == 1
    assert on_disk(there / "checkpoints") == on_disk(tmp_path / "run" / "checkpoints")
