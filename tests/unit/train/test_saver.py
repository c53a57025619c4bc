"""Saving, on a real engine of one process, beside uploads that are slow or fail."""

from pathlib import Path

import pytest
from checkpoints import FACTS, steps
from test_loop import OPTIM, Line
from test_uploads import blocked, here, slow, there, url  # noqa: F401

from megascale.stopping import StopSignal
from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.engine import Engine
from megascale.train.saver import Saver
from megascale.train.uploads import Uploads
from megascale.train.zero import ZeroConfig

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def beside(here, there) -> Uploads:  # noqa: F811
    return Uploads(here, url(there), 1, None)


@pytest.fixture
def saver(here, beside) -> Saver:  # noqa: F811
    engine = Engine(Line(), OPTIM, ZeroConfig(stage=0), 4, 1, 7)
    return Saver(engine, here, CheckpointConfig(keep_last=1), FACTS, 4, beside)


def test_save_begins_once_the_one_before_it_is_uploaded(saver, beside, there, slow, monkeypatch):  # noqa: F811
    uploaded = []
    real = checkpoint.begin

    def begin(folder: Path) -> None:
        uploaded.append(steps(checkpoint.committed(there)))
        slow.clear()
        real(folder)

    monkeypatch.setattr(checkpoint, "begin", begin)
    slow.set()
    for step in (1, 2, 3):
        saver(step, {"valid/loss": 9.0 - step})
        slow.set()
    beside.finish()
    assert uploaded == [[], [1], [2]]
    assert steps(checkpoint.committed(there)) == [3]


def test_saves_go_on_while_uploads_fail(saver, beside, here, there, capsys):  # noqa: F811
    blocked(there)
    for step in (1, 2):
        saver(step, {})
    beside.join_unless_stopping()
    assert capsys.readouterr().err.count("upload failed") == 2
    assert steps(checkpoint.committed(here)) == [2]
    there.unlink()
    saver(3, {})
    beside.finish()
    assert steps(checkpoint.committed(there)) == [3]


def test_stopped_job_saves_beside_an_upload_and_deletes_nothing_under_it(saver, beside, here, there, slow):  # noqa: F811
    slow.set()
    saver(1, {})
    beside.finish()
    slow.clear()
    saver(2, {})
    with StopSignal() as stop:
        stop._note(15, None)
        saver(3, {})
        assert beside.busy
        assert steps(checkpoint.committed(here)) == [2, 3]
    slow.set()
    beside.finish()
    assert steps(checkpoint.committed(there)) == [3]
