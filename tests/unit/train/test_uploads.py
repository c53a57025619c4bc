"""Copies elsewhere: whole or not there, kept by the same rules, never in the way of training; and fetched back verified.

Elsewhere is another folder here; S3 is tested with servers, in tests/integration.
"""

import threading
from pathlib import Path

import pytest
from checkpoints import FILES, save, steps

from megascale import storage
from megascale.errors import CheckpointError, Stopped, StorageError
from megascale.stopping import StopSignal
from megascale.train import checkpoint, uploads
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.uploads import Uploads, fetch_newest, sync, uploading


def listing(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def here(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def there(tmp_path) -> Path:
    return tmp_path / "elsewhere" / "checkpoints"


def url(there: Path) -> str:
    return str(there.parent)


def test_upload_gives_the_same_files_and_the_manifest_comes_last(here, there, monkeypatch):
    order = []
    real = storage.upload
    monkeypatch.setattr(storage, "upload", lambda path, to: (order.append(path.name), real(path, to)))
    folder = save(here, 3, valid_loss=1.0)
    sync(here, url(there), 2, None)
    assert listing(there) == listing(here)
    assert order[-1] == "manifest.json" and len(order) == len(FILES) + 1
    assert checkpoint.verify(there / folder.name) == checkpoint.verify(folder)
    sync(here, url(there), 2, None)
    assert len(order) == len(FILES) + 1  # what is there is not sent again


def test_the_same_is_kept_there_as_here(here, there):
    for step, loss in enumerate([5.0, 3.0, 4.0, None, 6.0, 7.0, 8.0], start=1):
        save(here, step, loss)
        checkpoint.manifests.prune(str(here), 2, 4)
        sync(here, url(there), 2, 4)
        assert steps(checkpoint.committed(there)) == steps(checkpoint.committed(here))
    assert steps(checkpoint.committed(there)) == [2, 4, 6, 7]


def test_nothing_is_uploaded_in_order_to_be_pruned(here, there, monkeypatch):
    """A machine that fetched the newest knows nothing of the better one that stayed at the URL."""
    save(there, 1, 1.0)
    for step, loss in ((2, 2.0), (3, 3.0), (4, 4.0)):
        save(here, step, loss)
    sent = []
    real = uploads.upload
    monkeypatch.setattr(uploads, "upload", lambda folder, to: (sent.append(folder.name), real(folder, to)))
    sync(here, url(there), 1, None)
    assert sent == ["step-00000004"]
    assert steps(checkpoint.committed(there)) == [1, 4]


def test_upload_cut_short_is_no_checkpoint_and_is_made_whole_by_the_next(here, there, monkeypatch):
    folder = save(here, 3)
    real = storage.upload

    def cut(path: Path, to: str) -> None:
        if path.name == "optim_states.pt":
            raise StorageError(f"{to}: the network is down")
        real(path, to)

    monkeypatch.setattr(storage, "upload", cut)
    with pytest.raises(StorageError, match="the network is down"):
        sync(here, url(there), 1, None)
    assert (there / folder.name / "model" / "config.json").exists()
    assert checkpoint.committed(there) == []
    monkeypatch.setattr(storage, "upload", real)
    sync(here, url(there), 1, None)
    assert listing(there) == listing(here)


def test_upload_over_another_of_the_same_step_takes_its_manifest_away_first(here, there, monkeypatch):
    save(there, 3, weights=2.0)
    save(here, 3, weights=1.0)
    seen = []
    real = storage.upload

    def watch(path: Path, to: str) -> None:
        seen.append(bool(checkpoint.committed(there)))
        real(path, to)

    monkeypatch.setattr(storage, "upload", watch)
    sync(here, url(there), 1, None)
    assert not any(seen)
    assert listing(there) == listing(here)


def test_file_that_arrives_shorter_is_told_and_not_committed(here, there, monkeypatch):
    save(here, 3)
    monkeypatch.setattr(storage, "upload", lambda path, to: storage.publish_bytes(to, path.read_bytes()[:-1]))
    with pytest.raises(StorageError, match=r"config.json: \d+ bytes arrived of \d+$"):
        sync(here, url(there), 1, None)
    assert checkpoint.committed(there) == []


def test_newest_is_fetched_to_an_empty_folder_whole_and_verified(here, there):
    for step in (1, 2):
        save(there, step, valid_loss=step)
    (save(there, 3) / "manifest.json").unlink()
    folder = fetch_newest(url(there), here)
    assert folder == checkpoint.step_folder(here, 2)
    assert listing(folder) == listing(there / folder.name)
    assert steps(checkpoint.committed(here)) == [2]


def test_what_is_newer_here_is_not_fetched_over(here, there):
    save(there, 2)
    newest = save(here, 3)
    assert fetch_newest(url(there), here) is None
    assert steps(checkpoint.committed(here)) == [3]
    save(there, 4)
    assert fetch_newest(url(there), here) == checkpoint.step_folder(here, 4)
    assert newest.is_dir()


def test_nothing_there_is_nothing_fetched(here, there):
    assert fetch_newest(url(there), here) is None
    assert not here.exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_damaged_copy_is_refused_by_name_and_leaves_no_checkpoint_here(here, there, name, fault):
    path = save(there, 3) / name
    if fault == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{path}: (its sha256|missing)"):
        fetch_newest(url(there), here)
    assert checkpoint.committed(here) == []


# -------------------------------------------------------------------------------------------------- beside training


def blocked(there: Path) -> Path:
    """Something in the way of every upload."""
    there.parent.mkdir()
    there.write_text("a file where a folder should be")
    return there


def test_failed_upload_is_one_line_and_the_next_one_brings_what_is_missing(here, there, capsys):
    blocked(there)
    beside = Uploads(here, url(there), 2, None)
    save(here, 1, valid_loss=1.0)
    beside.start()
    beside.join_unless_stopping()
    told = capsys.readouterr().err
    assert told.startswith("upload failed, and is tried again with the next checkpoint: StorageError: ")
    assert told.count("\n") == 1
    there.unlink()
    save(here, 2, valid_loss=2.0)
    beside.start()
    beside.finish()
    assert steps(checkpoint.committed(there)) == [1, 2]


def test_last_upload_that_fails_ends_the_block_with_an_error_and_the_next_start_repairs_it(here, there):
    blocked(there)
    config = CheckpointConfig(upload_url=url(there))
    folder = save(here, 1)
    with pytest.raises(StorageError, match=f"all is safe in {here}, and the same command uploads it"):
        uploads.upload_missing(here, config)
    checkpoint.verify(folder)
    there.unlink()
    uploads.upload_missing(here, config)
    assert listing(there) == listing(here)


@pytest.mark.usefixtures("process_group")
def test_only_rank_0_uploads_and_only_where_there_is_a_url(here, there):
    for config, rank in ((CheckpointConfig(), 0), (CheckpointConfig(upload_url=url(there)), 1)):
        with uploading(here, config, rank) as beside:
            assert beside is None


def test_fault_of_the_code_is_not_taken_for_a_store_on_a_bad_day(here, there, monkeypatch):
    monkeypatch.setattr(uploads, "sync", lambda *_: 1 / 0)
    beside = Uploads(here, url(there), 2, None)
    beside.start()
    with pytest.raises(ZeroDivisionError):
        beside.join_unless_stopping()


@pytest.fixture
def slow(monkeypatch):
    """Uploads that last until the test lets them end."""
    let_go = threading.Event()
    real = uploads.sync

    def wait(*arguments) -> None:
        let_go.wait(60)
        real(*arguments)

    monkeypatch.setattr(uploads, "sync", wait)
    yield let_go
    let_go.set()


def test_save_waits_for_the_upload_before_it(here, there, slow):
    beside = Uploads(here, url(there), 2, None)
    save(here, 1)
    beside.start()
    threading.Timer(0.5, slow.set).start()
    beside.join_unless_stopping()
    assert steps(checkpoint.committed(there)) == [1]


def test_stop_before_the_ranks_have_joined_waits_for_nobody(here, there):
    with pytest.raises(Stopped, match="early"), uploading(here, CheckpointConfig(upload_url=url(there)), 0):
        raise Stopped("early")


@pytest.mark.usefixtures("process_group")
def test_job_asked_to_stop_saves_at_once_and_waits_no_longer_than_a_preempted_machine_has(
    here, there, slow, monkeypatch, capsys
):
    monkeypatch.setattr(uploads, "_GRACE_SECONDS", 0.3)
    with (
        pytest.raises(Stopped, match="asked"),
        uploading(here, CheckpointConfig(upload_url=url(there)), 0) as beside,
        StopSignal() as stop,
    ):
        save(here, 1)
        beside.start()
        stop._note(15, None)
        beside.join_unless_stopping()
        assert beside.busy
        save(here, 2)
        beside.start()
        asked = Stopped("asked")
        asked.together = True
        raise asked
    assert "the upload is not finished; the next start goes on with it" in capsys.readouterr().err
    slow.set()
    beside.finish()
    assert steps(checkpoint.committed(there)) == [1, 2]
