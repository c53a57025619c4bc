"""DeepSpeed's config: what ours says goes in, a user's own JSON is merged, and what contradicts is named."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from megascale.errors import ConfigError
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig, deepspeed_settings


def settings(path: Path | None = None, **zero: object) -> dict:
    config = ZeroConfig(deepspeed_json=None if path is None else str(path), **zero)
    return deepspeed_settings(OptimConfig(clip_norm=0.5), config, micro_batch=4, accumulation=3, num_weights=100)


def own(folder: Path, content: object) -> Path:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_our_config_becomes_deepspeeds():
    made = settings(stage=2, precision="bf16", offload_optimizer=True)
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["bf16"]["enabled"] is True
    assert "offload_optimizer" not in settings(stage=2)["zero_optimization"]


def test_a_users_json_is_merged_at_every_depth(tmp_path):
    own_zero = {"reduce_bucket_size": 1000, "overlap_comm": False}
    path = own(tmp_path, {"zero_optimization": own_zero, "wall_clock_breakdown": True})
    made = settings(path, stage=2)
    assert made["zero_optimization"] == {"stage": 2, **own_zero}
    assert made["wall_clock_breakdown"] is True
    assert made["gradient_clipping"] == 0.5


def test_a_users_json_may_repeat_what_ours_says(tmp_path):
    path = own(tmp_path, {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "bf16": {"enabled": False}})
    assert settings(path, stage=2) == settings(stage=2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping belongs to optim.clip_norm here; leave it out"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage belongs to zero.stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "zero.offload_optimizer here; leave it out"),
        ({"optimizer": {"type": "Adam"}}, "optimizer belongs to optim here; leave it out"),
        ({"fp16": {"enabled": True}}, "fp16 belongs to zero.precision here; leave it out"),
        (
            {"bf16": {"check_grad_overflow": False}},
            "bf16.check_grad_overflow belongs to the stop at what is not finite here",
        ),
        ({"bf16": None}, "bf16 is a mapping, this is a NoneType"),
        ({"zero_optimization": True}, "zero_optimization is a mapping, this is a bool"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero.offload_optimizer here; leave it out"),
        ({"amp": {"enabled": True}}, "amp belongs to zero.precision here; leave it out"),
        ({"bf16": {"enabled": True}}, "bf16.enabled belongs to zero.precision here; leave it out"),
        ("{", "not valid JSON"),
        ([1], "a DeepSpeed config is a mapping, this is a list"),
    ],
)
def test_a_json_that_contradicts_or_is_broken_is_named(tmp_path, content, told):
    path = own(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        settings(path, stage=2)
    assert str(raised.value).startswith(f"zero.deepspeed_json={path}: ")
    assert told in str(raised.value)


def test_a_json_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"zero\.deepspeed_json=gone\.json: cannot be read: No such file"):
        settings(Path("gone.json"))


def test_stage_0_takes_neither_bf16_nor_offload():
    with pytest.raises(ValidationError, match="precision=bf16 with stage=0"):
        ZeroConfig(stage=0, precision="bf16")
    with pytest.raises(ValidationError, match="offload_optimizer=true needs stage 1"):
        ZeroConfig(stage=0, offload_optimizer=True)
