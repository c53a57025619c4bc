"""The plan's expectations are what masks and drops really come to, and its table what the parts say."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megascale.config import load_config
from megascale.data.transforms import DropConfig, MaskConfig, draw_drop_share, draw_masks, removed_frames
from megascale.model.config import ModelConfig
from megascale.model.cost import Work, activation_bytes, training_flops
from megascale.model.mega_audioformer import MegaAudioFormer
from megascale.seeding import clip_seeds
from megascale.tasks.plan import Plan, activation_gib, clip_work, cost_lines, make_plan, mean_flops
from megascale.tasks.pretrain_config import PretrainConfig
from megascale.tokens import codebooks_for
from megascale.train.memory import state_bytes

ROOT = Path(__file__).parents[3]
SMALL = ModelConfig(layers=2, width=32, heads=2, mlp_width=48, local_layers=1, local_width=16, local_heads=1)


def plan(**changes: object) -> Plan:
    settings = {
        "model": SMALL, "num_codebooks": 2, "num_frames": 60, "mask": MaskConfig(), "drop": DropConfig(),
        "num_weights": 3_000_000, "num_global_weights": 2_000_000, "precision": "bf16", "micro_batch": 4,
        "num_clips": 1000, "mfu": 0.5, "peak_tflops": 100.0,
    }  # fmt: skip
    return Plan(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["token", "frame", "span"])
@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_work_of_a_clip_is_that_of_drawn_masks_in_the_mean(kind, num_codebooks):
    mask, seeds_B = MaskConfig(kind=kind), clip_seeds(torch.arange(300), 0, "test")
    drawn = draw_masks(seeds_B, np.full(300, 50), num_codebooks, mask).numpy()
    work = clip_work(50, num_codebooks, mask)
    assert {int(masked_TQ.sum()) for masked_TQ in drawn} == {work.masked_tokens}
    held = [masked_TQ.any(axis=1).sum() for masked_TQ in drawn]
    # five standard errors of a mean of 300; frame and span draw no chance at all
    assert work.local_frames == pytest.approx(np.mean(held), abs=5 * np.std(held) / math.sqrt(300) + 1e-9)


@pytest.mark.parametrize(
    "drop", [DropConfig(), DropConfig(p=1, min_share=0.2, max_share=0.2), DropConfig(p=0.9, max_share=0.99)]
)
def test_operations_of_a_clip_are_those_of_drawn_drops_in_the_mean(drop):
    planned, rng = plan(drop=drop), np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        frames = 60 - int(removed_frames(np.array([60]), draw_drop_share(drop, rng))[0])
        drawn.append(training_flops(SMALL, 2, clip_work(frames, 2, MaskConfig())))
    # five standard errors of a mean of 2000; one in a million for a share that is fixed, where only sums are rounded
    error = 5 * np.std(drawn) / math.sqrt(2000) + 1e-6 * np.mean(drawn)
    assert mean_flops(planned) == pytest.approx(np.mean(drawn), abs=error)


def test_without_drop_a_clip_is_whole():
    planned = plan(drop=DropConfig(p=0))
    assert mean_flops(planned) == training_flops(SMALL, 2, clip_work(60, 2, MaskConfig()))


def test_table_has_every_stage_for_this_run_and_for_eight_gpus():
    planned = plan()
    lines = cost_lines(planned, stage=2, ranks=2)
    assert lines[0] == "3.0M parameters: 2.0M in the global encoder, 1.0M in the local one"
    rows = [line.split() for line in lines if re.match(r"\s+[28]\s", line)]
    assert [(row[0], row[1]) for row in rows] == [(g, s) for g in "28" for s in "123"], "bf16 knows no stage 0"
    assert [row[-3:] == ["<-", "this", "run"] for row in rows] == [False, True, False, False, False, False]
    clip = clip_work(60, 2, MaskConfig())
    activations = activation_bytes(SMALL, 2, Work(*(4 * value for value in clip)), 2)
    for row in rows:
        state = state_bytes(3_000_000, int(row[1]), "bf16", int(row[0]))
        expected = (*state, activations, state.total + activations)
        assert row[2:8] == [f"{value / 2**30:.2f}" for value in expected]
    assert len([line for line in cost_lines(plan(precision="fp32"), 0, 1) if re.match(r"\s+[18]\s", line)]) == 8


def test_hours_are_operations_over_peak_and_mfu():
    planned = plan(num_clips=10**11)
    hours = mean_flops(planned) * 10**11 / (100e12 * 0.5) / 3600
    assert hours > 8
    assert cost_lines(planned, 1, 4)[-1].endswith(
        f"at MFU 50% (log.plan_mfu) of 100 TFLOP/s (log.peak_tflops): about "
        f"{hours:.3g} h on 1, {hours / 4:.3g} h on 4, {hours / 8:.3g} h on 8"
    )


def test_plan_without_a_gpu_is_for_a_known_one(monkeypatch):
    monkeypatch.setattr("megascale.tasks.plan.device_name", lambda: None)
    assert "989.4 TFLOP/s (one H100 SXM, as no GPU is here)" in cost_lines(plan(peak_tflops=None), 1, 1)[-1]


def test_unknown_gpu_gives_no_hours_but_says_what_to_set(monkeypatch):
    monkeypatch.setattr("megascale.tasks.plan.device_name", lambda: "Some GPU")
    last = cost_lines(plan(peak_tflops=None), 1, 1)[-1]
    assert last.endswith("no peak is known of Some GPU: set log.peak_tflops for an estimate of hours")


def gib_of_a_gpu(recipe: str, gpus: int, *overrides: str) -> float:
    """What a recipe takes on each of so many GPUs, GiB."""
    path = str(ROOT / "configs" / "pretrain" / recipe)
    config = load_config(PretrainConfig, "pretrain", path, ["data.url=tokens", *overrides])
    num_codebooks = codebooks_for(config.data.bitrate_kbps)
    planned = make_plan(config, MegaAudioFormer(config.model, num_codebooks, torch.Generator()), gpus)
    state = state_bytes(planned.num_weights, config.zero.stage, planned.precision, gpus)
    return state.total / 2**30 + activation_gib(planned)


@pytest.mark.parametrize("recipe", ["paper_1k5.yaml", "paper_12k.yaml"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_papers_recipes_fit_a_gpu_of_80_gb_and_leave_room_for_the_allocator(recipe, gpus):
    assert gib_of_a_gpu(recipe, gpus) < 0.4 * 80e9 / 2**30


def test_clips_of_30_seconds_fit_with_recomputation_and_not_without():
    """Twice the recipe's micro-batch."""
    longer = ("data.clip_seconds=30", "train.micro_batch=128")
    assert gib_of_a_gpu("paper_1k5.yaml", 8, *longer) > 80e9 / 2**30
    assert gib_of_a_gpu("paper_1k5.yaml", 8, *longer, "train.activation_checkpointing=true") < 0.4 * 80e9 / 2**30
