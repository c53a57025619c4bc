"""The table's job, before it starts anything."""

import json

import pytest

from megascale.config import validate
from megascale.downstream import table1
from megascale.downstream.pool import CellJob
from megascale.downstream.table1_config import Table1Config
from megascale.errors import MegascaleError
from megascale.table_baselines import score_baselines
from megascale.tasks import finetune
from megascale.tasks.finetune import FinetuneConfig


@pytest.mark.parametrize(("working_dir", "url", "kept"), [("gcs://_ray_pkg_0.zip", "runs/t", False), (None, "t", True)])
def test_relative_output_is_refused_only_in_rays_copy_of_the_working_directory(
    tmp_path, monkeypatch, working_dir, url, kept
):
    """As `ray job submit` tells its job. What is not refused goes on to the token folders, of which there are none."""
    monkeypatch.chdir(tmp_path)
    environment = {"working_dir": working_dir} if working_dir else {}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": environment}))
    data = dict.fromkeys(("gtzan", "nsynth", "music_speech"), str(tmp_path / "none"))
    job = CellJob(FinetuneConfig, finetune.check, finetune.run)
    lost = f"^table1.output.url={url}: lies in Ray's copy of the working directory, which Ray deletes; "
    for output, refused in ((url, not kept), (str(tmp_path / "t"), False)):
        tree = {"data": data, "checkpoints": {"1k5": "none", "12k": "none"}, "output": {"url": output}}
        with pytest.raises(MegascaleError, match=lost if refused else "none"):
            table1.run(validate(Table1Config, "table1", tree), job, score_baselines)
    assert list(tmp_path.iterdir()) == []
