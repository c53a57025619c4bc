"""`megascale export`: what it writes, and what ends it with 2."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kept_models import write_run

from megascale import __main__ as command

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys, monkeypatch) -> Iterator[Call]:
    monkeypatch.setattr(command, "stop_on_signal", lambda: None)

    def run(*arguments: object) -> tuple[int, str]:
        code = command.main([str(a) for a in arguments])
        return code, "".join(capsys.readouterr())

    yield run


def test_export_writes_the_best_checkpoint_and_says_what(call, tmp_path):
    run = write_run(tmp_path / "run")
    code, printed = call("export", run, tmp_path / "out")
    assert code == 0 and f"{tmp_path / 'out'}: README.md, config.json, model.safetensors" in printed
    kept = run / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept.read_bytes()


def test_export_leaves_a_folder_with_something_in_it_alone(call, tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    assert call("export", run, tmp_path / "out")[0] == 0  # an empty one is as good as none
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, printed = call("export", run, tmp_path / "out")
    assert code == 2 and "is not empty; choose another" in printed
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def bad_calls(folder: Path) -> list[tuple[list[object], str]]:
    run, out = folder / "run", folder / "out"
    return [
        (["export", run], "FOLDER or --push-to-hub NAME says where to"),
        (["export", run, "--push-to-hub", "a/b/c"], "a/b/c: no id of a repo"),
        (["export", folder / "nowhere", out], "nowhere: no such folder"),
        (["export", "https://me:secret@host/run", out], "has credentials in it"),
    ]


def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(call, tmp_path):
    write_run(tmp_path / "run")
    before = set(tmp_path.iterdir())
    for arguments, said in bad_calls(tmp_path):
        code, printed = call(*arguments)
        assert code == 2 and said in printed and "secret" not in printed
        assert len(printed.strip().splitlines()) == 1
    assert set(tmp_path.iterdir()) == before
