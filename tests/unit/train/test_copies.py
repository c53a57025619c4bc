"""A checkpoint in a store that many jobs read is copied to their machine once, and no copy is trusted unseen."""

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import FACTS, WEIGHTS, save
from stores import HookedStore, hooked_copy

from megascale import storage
from megascale.errors import CheckpointError, StorageError
from megascale.train import checkpoint

STEP = "hooked://folder/checkpoints/step-00000001"


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def fetched(tmp_path, temporary) -> Iterator[Counter[str]]:
    """How often each file was read from a store that holds a run of one checkpoint, at hooked://folder."""
    save(tmp_path / "run" / "checkpoints", 1)
    counts: Counter[str] = Counter()
    with hooked_copy(tmp_path / "run"):
        HookedStore.hook = lambda name: counts.update([name])
        yield counts


def kept(temporary: Path) -> list[Path]:
    return [path.parent for path in temporary.glob("megascale-*/models/*/model")]


def test_copy_is_made_once_for_every_name_of_a_checkpoint_and_used_by_all(fetched, temporary):
    for url in ("hooked://folder", STEP, f"{STEP}/", f"{STEP}/model"):
        weights, facts = checkpoint.read_model(url, keep=True)
        assert facts == FACTS and all((weights[name] == WEIGHTS[name]).all() for name in WEIGHTS)
    checkpoint.read_model(STEP)  # who leaves no copy uses one that is there
    assert fetched["model.safetensors"] == fetched["config.json"] == 1
    assert len(kept(temporary)) == 1


def test_nothing_is_left_unless_asked_for(fetched, temporary):
    for _ in range(2):
        checkpoint.read_model(STEP)
    assert fetched["model.safetensors"] == 2
    assert list(temporary.iterdir()) == []


def test_jobs_that_start_at_the_same_time_fetch_once(fetched, temporary):
    together, found = threading.Barrier(4), []

    def count(name: str) -> None:
        fetched.update([name])
        time.sleep(0.2)  # long enough that the others would fetch, too

    def read() -> None:
        together.wait()
        found.append(checkpoint.read_model(STEP, keep=True)[1])

    HookedStore.hook = count
    jobs = [threading.Thread(target=read) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert found == [FACTS] * 4
    assert fetched["model.safetensors"] == 1


def test_checkpoint_written_anew_at_the_same_url_is_fetched(fetched, tmp_path):
    checkpoint.read_model(STEP, keep=True)
    for file in save(tmp_path / "again", 1, weights=3.0).rglob("*"):
        if file.is_file():
            storage.publish_bytes(f"{STEP}/{file.relative_to(tmp_path / 'again' / 'step-00000001')}", file.read_bytes())
    weights, _ = checkpoint.read_model(STEP, keep=True)
    assert (weights["head.bias"] == 3 * WEIGHTS["head.bias"]).all()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_copy_is_fetched_again(fetched, temporary, damage):
    checkpoint.read_model(STEP, keep=True)
    path = kept(temporary)[0] / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    weights, _ = checkpoint.read_model(STEP, keep=True)
    assert (weights["head.bias"] == WEIGHTS["head.bias"]).all()
    assert fetched["model.safetensors"] == 2


def test_damaged_checkpoint_is_refused_and_leaves_no_copy(fetched, temporary):
    data = bytearray(storage.read_bytes(f"{STEP}/model/model.safetensors"))
    data[-1] ^= 1
    storage.publish_bytes(f"{STEP}/model/model.safetensors", bytes(data))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"^{STEP}/model/model.safetensors: its sha256 is not the one"):
            checkpoint.read_model(STEP, keep=True)
    assert kept(temporary) == []
    assert {path.suffix for path in temporary.glob("megascale-*/models/*")} == {".lock"}


def test_folder_without_a_manifest_is_read_each_time(fetched, temporary, tmp_path):
    """There is nothing to know it by: it may be another one by now."""
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000001" / "model", tmp_path / "bare")
    with hooked_copy(tmp_path / "bare") as bare:
        HookedStore.hook = lambda name: fetched.update([name])
        for _ in range(2):
            assert checkpoint.read_model(bare, keep=True)[1] == FACTS
    assert fetched["model.safetensors"] == 2
    assert list(temporary.iterdir()) == []


def test_local_checkpoint_is_read_where_it_lies(temporary, tmp_path):
    assert checkpoint.read_model(str(save(tmp_path, 1)), keep=True)[1] == FACTS
    assert list(temporary.iterdir()) == []


def test_copy_that_nobody_used_for_a_week_goes_when_another_is_made(fetched, temporary, tmp_path):
    checkpoint.read_model(STEP, keep=True)
    old = kept(temporary)[0]
    for age_days, is_left in ((6, True), (8, False)):
        then = time.time() - age_days * 86_400
        os.utime(old, (then, then))
        HookedStore.store.clear()
        for file in save(tmp_path / "other", 1, weights=age_days).rglob("*"):
            if file.is_file():
                name = file.relative_to(tmp_path / "other").as_posix()
                storage.publish_bytes(f"hooked://folder/checkpoints/{name}", file.read_bytes())
        checkpoint.read_model(STEP, keep=True)
        assert old.exists() == is_left


def test_copy_in_use_does_not_grow_old(fetched, temporary):
    checkpoint.read_model(STEP, keep=True)
    old = kept(temporary)[0]
    os.utime(old, (1, 1))
    checkpoint.read_model(STEP)
    assert old.stat().st_mtime > 1


def test_disk_that_cannot_hold_a_copy_is_one_line(fetched, temporary):
    (temporary / f"megascale-{os.getuid()}").write_bytes(b"a file where the folder would be")
    with pytest.raises(StorageError, match="cannot keep a copy there: "):
        checkpoint.read_model(STEP, keep=True)
