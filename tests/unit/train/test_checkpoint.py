"""Checkpoints: what has no manifest does not exist, what was changed is refused by name, and the best is never lost."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import FACTS, FILES, WEIGHTS, save, steps
from support import largest_file

from megascale import storage
from megascale.errors import CheckpointError, StorageError
from megascale.train import checkpoint
from megascale.train.manifest import prune, retained


def test_manifest_names_every_file_and_keeps_what_was_consumed(tmp_path):
    manifest = checkpoint.verify(save(tmp_path, 1000, valid_loss=3.25))
    assert sorted(manifest.files) == FILES
    assert (manifest.step, manifest.consumed_samples, manifest.world_size, manifest.valid_loss) == (
        1000,
        16_000,
        2,
        3.25,
    )
    assert checkpoint.step_folder(tmp_path, 1000).name == "step-00001000"


def test_folder_without_a_manifest_does_not_exist(tmp_path):
    save(tmp_path, 1, valid_loss=2.0)
    unfinished = save(tmp_path, 2, valid_loss=1.0)
    (unfinished / "manifest.json").unlink()
    assert steps(checkpoint.committed(tmp_path)) == [1]
    assert checkpoint.best(tmp_path) == checkpoint.step_folder(tmp_path, 1)
    for read in (checkpoint.verify, checkpoint.read_manifest, lambda folder: checkpoint.read_model(str(folder))):
        with pytest.raises(CheckpointError, match=f"^{unfinished}: no manifest; .* its save was not completed$"):
            read(unfinished)


def test_manifest_is_written_after_everything_else_and_at_once(tmp_path, monkeypatch):
    published = []

    def publish(url: str, data: bytes, create_only: bool = False) -> bool:
        folder = checkpoint.step_folder(tmp_path, 1)
        published.append((Path(url).name, sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))))
        return real(url, data, create_only)

    real = storage.publish_bytes
    monkeypatch.setattr(storage, "publish_bytes", publish)
    save(tmp_path, 1)
    name, present = published[-1]
    assert name == "manifest.json"
    assert present == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_byte_changed_anywhere_is_refused_by_name(tmp_path, name):
    path = save(tmp_path, 3) / name
    whole = path.read_bytes()
    for place in {0, len(whole) - 1, *range(0, len(whole), len(whole) // 50 + 1)}:
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"^{path}: its sha256 is not the one in manifest.json"):
            checkpoint.verify(path.parents[len(Path(name).parts) - 1])


@pytest.mark.parametrize("name", FILES)
def test_missing_and_cut_files_are_refused_by_name(tmp_path, name):
    path = save(tmp_path, 3) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"^{path}: its sha256"):
        checkpoint.read_model(str(tmp_path / "step-00000003"))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"^{path}: missing from a committed checkpoint$"):
        checkpoint.read_model(str(tmp_path / "step-00000003"))


def test_every_cut_of_a_manifest_is_refused_by_name(tmp_path):
    path = save(tmp_path, 3) / "manifest.json"
    whole = path.read_bytes()
    for data in [*(whole[:size] for size in range(0, len(whole), 61)), b"[]", b"null", b"\xff\xfe", b'{"step": 3}']:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"^{path}: broken: "):
            checkpoint.read_manifest(path.parent)


def test_a_byte_changed_anywhere_in_a_manifest_is_refused_by_name(tmp_path):
    """A step, a loss or a world size that is another one would else be believed."""
    path = save(tmp_path, 3, valid_loss=2.5) / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flipped in (1, whole[place] ^ 0x20):  # the second makes a space of it
            data = bytearray(whole)
            data[place] ^= flipped
            if data != whole:
                path.write_bytes(data)
                with pytest.raises(CheckpointError, match=f"^{path}: broken: "):
                    checkpoint.read_manifest(path.parent)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "./a", "a/", "a\\..\\x", "a\0b", "manifest.json"],
)
def test_manifest_that_names_a_file_outside_the_folder_is_refused_by_name(tmp_path, name):
    """What is fetched is written where the manifest says."""
    path = save(tmp_path / "from", 3) / "manifest.json"
    tree = json.loads(path.read_bytes())
    tree["files"][name] = "00" * 32
    path.write_text(json.dumps(tree))
    message = f"^{re.escape(f'{path}: broken: {name!r} is no path of a file in the folder')}$"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(path.parent)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.fetch(str(path.parent), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_file_that_no_manifest_names_is_refused_where_deepspeed_would_unpickle_it(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "notes.txt").write_text("loaded by nothing")
    checkpoint.verify(folder)
    planted = folder / "mp_rank_+_model_states.pt"
    planted.write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(planted))}: not named in manifest.json, and DeepSpeed"):
        checkpoint.verify(folder)


def test_every_byte_is_on_the_disk_before_the_manifest_appears(tmp_path, monkeypatch):
    """What a power cut leaves is what was synced: each file, and each folder, whose entries are bytes of its own."""
    synced: list[tuple[Path, bool]] = []
    manifest = checkpoint.step_folder(tmp_path, 3) / "manifest.json"

    def fsync(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), manifest.exists()))
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    folder = save(tmp_path, 3)
    before = {path for path, committed in synced if not committed}
    assert before >= {folder / name for name in FILES} | {folder, folder / "model", folder / "zero", tmp_path}
    assert (folder, True) in synced  # the manifest's own name, before an older checkpoint may be deleted


def test_random_state_comes_back_for_each_rank(tmp_path):
    folder = checkpoint.step_folder(tmp_path, 5)
    checkpoint.begin(folder)
    expected = []
    for rank in range(2):
        torch.manual_seed(rank)
        checkpoint.save_rank_state(folder, rank, 80)
        expected.append(torch.rand(3))
    checkpoint.commit(folder, 5, 80, 2, None)
    for rank in (1, 0):
        checkpoint.load_rank_state(folder, rank)
        assert torch.equal(torch.rand(3), expected[rank])


def test_rank_that_consumed_other_samples_than_the_manifest_says_is_refused(tmp_path):
    folder = save(tmp_path, 5)
    checkpoint.save_rank_state(folder, 1, 64)
    checkpoint.load_rank_state(folder, 0)
    with pytest.raises(
        CheckpointError, match=r"rank-00001.safetensors: saved after 64 samples, manifest.json says 80$"
    ):
        checkpoint.load_rank_state(folder, 1)


def test_best_has_the_lowest_loss_and_is_the_newest_where_none_was_validated(tmp_path):
    assert checkpoint.best(tmp_path / "none") is None
    for step in (1, 2):
        save(tmp_path, step)
    assert checkpoint.best(tmp_path) == checkpoint.step_folder(tmp_path, 2)
    for step, loss in ((3, 2.5), (4, 0.0), (5, 0.5), (6, None)):
        save(tmp_path, step, loss)
    assert checkpoint.best(tmp_path) == checkpoint.step_folder(tmp_path, 4)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_checkpoint_of_a_diverged_run_is_saved_and_never_the_best(tmp_path, loss):
    save(tmp_path, 1, 2.5)
    assert checkpoint.verify(save(tmp_path, 2, loss)).valid_loss is None
    assert checkpoint.best(tmp_path) == checkpoint.step_folder(tmp_path, 1)


def test_retention_keeps_the_newest_every_nth_and_the_best():
    losses = {step: 10.0 - step / 1000 for step in range(1000, 6000, 1000)} | {2500: 0.5, 6000: None, 7000: 8.0}
    assert retained(losses, 1, None) == {2500, 7000}
    assert retained(losses, 2, None) == {2500, 6000, 7000}
    assert retained(losses, 1, 2000) == {2000, 2500, 4000, 6000, 7000}
    assert retained({1: None, 2: None}, 1, None) == {2}
    assert retained({1: 3.0, 2: 3.0, 3: 4.0}, 1, None) == {1, 3}  # of equals, the first
    assert retained({}, 1, 5) == set()


def test_prune_keeps_every_nth_for_good(tmp_path):
    for step in range(1, 10):
        save(tmp_path, step, valid_loss=5.0 if step == 2 else 6.0)
        prune(str(tmp_path), 1, 3)
    assert steps(checkpoint.committed(tmp_path)) == [2, 3, 6, 9]


def test_prune_leaves_one_whose_manifest_is_damaged(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (checkpoint.step_folder(tmp_path, 1) / "manifest.json").write_bytes(b"{")
    prune(str(tmp_path), 1, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_without_a_committed_one_nothing_is_pruned(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "manifest.json").unlink()
    prune(str(tmp_path), 1, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    kept = []
    for step, loss in enumerate([5.0, 3.0, 4.0, None, 6.0, 2.0, 7.0], start=1):
        save(tmp_path, step, loss)
        prune(str(tmp_path), 2, None)
        kept.append(steps(checkpoint.committed(tmp_path)))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]
    for folder in checkpoint.committed(tmp_path):
        checkpoint.verify(folder)


def test_prune_sweeps_up_half_written_older_saves_but_not_a_newer_one(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, 1.0 + step)
    for step in (4, 8):
        (checkpoint.step_folder(tmp_path, step) / "manifest.json").unlink()
    (tmp_path / "notes").mkdir()
    prune(str(tmp_path), 2, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("delete", ["prune", "begin"])
def test_deletion_cut_short_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch, delete):
    for step in (1, 2):
        save(tmp_path, step)

    def crash(folder: Path) -> None:
        (Path(folder) / "model" / "config.json").unlink()
        raise OSError("the machine went down")

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(StorageError, match=r"step-00000001: the machine went down$"):
        if delete == "prune":
            prune(str(tmp_path), 1, None)
        else:
            checkpoint.begin(checkpoint.step_folder(tmp_path, 1))
    assert steps(checkpoint.committed(tmp_path)) == [2]


def test_save_begins_in_an_empty_folder(tmp_path):
    folder = save(tmp_path, 4)
    checkpoint.begin(folder)
    assert list(folder.iterdir()) == []


def test_averages_are_read_verified(tmp_path):
    folder = checkpoint.step_folder(tmp_path, 1)
    checkpoint.begin(folder)
    for part, factor in (("model", 1), (checkpoint.EMA, 3)):
        checkpoint.write_model(folder / part, {name: factor * value for name, value in WEIGHTS.items()}, FACTS)
    checkpoint.commit(folder, 1, 16, 2, None)
    averages, _ = checkpoint.read_model(str(folder / checkpoint.EMA))
    assert checkpoint.find_model(str(folder)).sha256 != checkpoint.find_model(str(folder / checkpoint.EMA)).sha256
    assert all(torch.equal(averages[name], 3 * WEIGHTS[name]) for name in WEIGHTS)
    path = folder / checkpoint.EMA / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^{path}: its sha256 is not the one"):
        checkpoint.read_model(str(folder / checkpoint.EMA))


def test_folder_of_another_name_is_no_checkpoint_of_the_run(tmp_path):
    shutil.copytree(save(tmp_path, 3), tmp_path / "step-backup")
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000003"]


# --------------------------------------------------------------------------------------------------------------- the disk


def test_full_disk_is_one_line_that_names_the_file(tmp_path):
    folder = tmp_path / "model"
    with largest_file(64), pytest.raises(StorageError, match=f"^{folder}/model.safetensors: cannot write: ") as failure:
        checkpoint.write_model(folder, WEIGHTS, FACTS)
    assert "File too large" in str(failure.value) and "\n" not in str(failure.value)
    with largest_file(64), pytest.raises(StorageError, match=f"^{tmp_path}/rank-00000.safetensors: cannot write: "):
        checkpoint.save_rank_state(tmp_path, 0, 16)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/model.safetensors: cannot write: File exists$"):
        checkpoint.write_model(tmp_path / "file", WEIGHTS, FACTS)
