"""Watching a run in a store: what is read of its checkpoints."""

import tempfile
from collections import Counter
from pathlib import Path

from stores import HookedStore, hooked_copy
from support import write_paced_tokens, write_pretrained

from megascale.config import validate
from megascale.downstream import watch
from megascale.downstream.pool import CellJob
from megascale.downstream.watch_config import WatchConfig
from megascale.tasks import finetune
from megascale.tasks.finetune_data import check_clips
from megascale.train import checkpoint


def write_run(folder: Path) -> None:
    """A run of one checkpoint."""
    step = checkpoint.step_folder(folder / "checkpoints", 1)
    checkpoint.begin(step)
    write_pretrained(step / "model", 2)
    checkpoint.commit(step, 1, 16, 1, 2.0)
    (folder / "config.yaml").write_text("seed: 0\n")


def test_checkpoint_in_a_store_is_read_once_to_be_checked_for_every_task_and_copied(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write_paced_tokens(tmp_path / "tokens", 16)
    write_run(tmp_path / "run")
    task = {"url": str(tmp_path / "tokens"), "task": {"label": "class", "protocol": "official"}}
    counts: Counter[str] = Counter()
    with hooked_copy(tmp_path / "run") as url:
        HookedStore.hook = lambda name: counts.update([name])
        tree = {"run": url, "output": {"url": str(tmp_path / "out")}, "tasks": {"one": task, "two": task}}
        config = validate(WatchConfig, "watch", tree | {"seeds": [0, 1]})
        job = CellJob(finetune.FinetuneConfig, finetune.check, check_clips, finetune.run)
        assert "1 checkpoints so far" in watch.describe_plan(config, job)
        watch._copy_model(f"{url}/checkpoints/step-00000001", tmp_path / "copy")
    assert counts["model.safetensors"] == 1
