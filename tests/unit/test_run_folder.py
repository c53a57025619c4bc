"""A run's folder: another config is refused by the key that differs, and a result is whole or an error."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from megascale import run_folder
from megascale.config import Section
from megascale.errors import ConfigError, DataError, FolderInUse, MegascaleError, StorageError

MAY_CHANGE = ("log.", "train.micro_batch")


class TrainConfig(Section):
    steps: int = Field(10, description="updates")
    micro_batch: int = Field(2, description="memory")
    micro_batches: int = Field(2, description="shares the beginning of a key that may change")


class LogConfig(Section):
    every: int = Field(10, description="updates")
    project: str | None = Field(None, description="name")


class JobConfig(Section):
    train: TrainConfig = Field(TrainConfig(), description="length")
    log: LogConfig = Field(LogConfig(), description="reports")
    lr: float = Field(3e-5, description="rate")
    sizes: list[int] = Field([1, 2], description="a list")
    free: dict[str, Any] = Field({}, description="a mapping")
    name: str | None = Field(None, description="a word")


def started(folder: Path, config: JobConfig | None = None) -> Path:
    run_folder.write_config(folder, config or JobConfig())
    return folder


def check(folder: Path, **changes: Any) -> None:
    run_folder.check_config(folder, JobConfig.model_validate(changes), "pretrain", MAY_CHANGE)


def message(folder: Path, error: type[MegascaleError] = ConfigError, **changes: Any) -> str:
    with pytest.raises(error) as failure:
        check(folder, **changes)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_folder_without_a_run_takes_any_config(tmp_path):
    check(tmp_path, lr=1.0)
    check(tmp_path / "none")
    assert list(tmp_path.iterdir()) == [], "checking writes nothing"


@pytest.mark.parametrize("config", [{}, {"lr": 1e-7}, {"name": "true"}, {"sizes": []}, {"free": {"a": {"b": 1.5}}}])
def test_same_config_goes_on(tmp_path, config):
    check(started(tmp_path, JobConfig.model_validate(config)), **config)


def test_changed_key_is_named_with_both_values(tmp_path):
    assert message(started(tmp_path), train={"steps": 20}) == (
        f"pretrain.train.steps=20: the run in {tmp_path} was started with 10; "
        "choose another output.url, or delete that folder"
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"lr": 1e-4}, "lr=0.0001"),
        ({"sizes": [1, 2, 3]}, "sizes=[1, 2, 3]"),
        ({"free": {"a": 1}}, "free.a=1"),
        ({"name": "x"}, "name=x"),
        ({"train": {"micro_batches": 4}}, "train.micro_batches=4"),
        ({"lr": 1e-4, "name": "x", "log": {"every": 1}}, "lr=0.0001"),
    ],
)
def test_any_change_of_what_is_computed_is_refused(tmp_path, changes, key):
    assert message(started(tmp_path), **changes).startswith(f"pretrain.{key}: ")


def test_key_that_is_gone_is_named(tmp_path):
    config = JobConfig(free={"a": 1})
    assert message(started(tmp_path, config)).startswith("pretrain.free.a=None: ")


@pytest.mark.parametrize("changes", [{"log": {"every": 1, "project": "p"}}, {"train": {"micro_batch": 8}}])
def test_keys_that_change_no_result_may_change(tmp_path, changes):
    check(started(tmp_path), **changes)


@pytest.mark.parametrize("text", ["a: [", "- a", "word", "", "\x01"])
def test_broken_config_of_a_run_is_named(tmp_path, text):
    (tmp_path / run_folder.CONFIG).write_text(text, encoding="utf-8")
    assert message(tmp_path, DataError).startswith(f"{tmp_path / 'config.yaml'}: broken")


def test_result_is_read_back_and_its_absence_is_no_result(tmp_path):
    assert run_folder.read_result(tmp_path) is None
    result = {"accuracy": 0.5, "classes": ["a", "ü"], "confusion": [[1, 0], [0, 1]], "checkpoint": None}
    run_folder.write_result(tmp_path / "deep" / "run", result)
    assert run_folder.read_result(tmp_path / "deep" / "run") == result


@pytest.mark.parametrize("data", [b"", b'{"accuracy": 0.', b"[1, 2]", b'[["a", 1]]', b"null", b"5", b"\xff\xfe\x00{"])
def test_broken_result_is_named(tmp_path, data):
    (tmp_path / run_folder.RESULT).write_bytes(data)
    with pytest.raises(DataError) as failure:
        run_folder.read_result(tmp_path)
    assert str(failure.value) == f"{tmp_path / 'result.json'}: broken; delete it to run again"


def test_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    refused = pytest.raises(StorageError, match=f"^{tmp_path}/.lock: cannot be written, or locked: Is a directory$")
    with refused, run_folder.lock(tmp_path):
        pass


def test_folder_is_held_by_one_process_until_its_block_ends(tmp_path):
    again = pytest.raises(FolderInUse, match="another process is at work")
    with run_folder.lock(tmp_path / "run"), again, run_folder.lock(tmp_path / "run"):
        pass
    with run_folder.lock(tmp_path / "run"):
        pass


def test_config_of_a_run_at_any_url_is_checked_and_the_key_that_chose_it_is_named(tmp_path):
    url = f"memory:/{tmp_path}"
    run_folder.check_config_at(url, JobConfig(), "pretrain", MAY_CHANGE, "copy.url")
    run_folder.write_config_at(url, JobConfig())
    run_folder.check_config_at(url, JobConfig(), "pretrain", MAY_CHANGE, "copy.url")
    with pytest.raises(ConfigError, match=r"lr=1.0: the run in memory://.* with 3e-05; choose another copy.url, or"):
        run_folder.check_config_at(url, JobConfig(lr=1.0), "pretrain", MAY_CHANGE, "copy.url")
