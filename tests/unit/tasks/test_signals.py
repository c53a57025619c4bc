"""A run's metrics follow from what its steps report."""

import pytest
import torch
from torch import Tensor

from megascale.model.config import ModelConfig
from megascale.model.cost import Work, training_flops
from megascale.model.mega_audioformer import MegaAudioFormer
from megascale.tasks.masked import masked_loss
from megascale.tasks.signals import Signals, note
from megascale.train.metrics import Sums

SMALL = ModelConfig(
    layers=2, width=32, heads=2, mlp_width=48, local_layers=1, local_width=16, local_heads=1, local_mlp_width=24
)
UNIGRAM_Q = torch.tensor([5.0, 6.0], dtype=torch.float64)


def signals(ranks: int = 1, peak_tflops: float | None = 1.0, **others: object) -> Signals:
    return Signals(SMALL, UNIGRAM_Q, ranks, peak_tflops, spike_stds=6.0, start=100, **others)  # type: ignore[arg-type]


def reported(clips: int = 3, frames: int = 40, updates: int = 4, loss: float | None = None) -> dict[str, Tensor]:
    """Sums of a real model's steps; clip 0 is one frame shorter than the rest."""
    rng = torch.Generator().manual_seed(0)
    model = MegaAudioFormer(SMALL, 2, rng)
    masked_BTQ = torch.zeros(clips, frames, 2, dtype=torch.bool)
    masked_BTQ[:, :10, 0] = masked_BTQ[:, 5:15, 1] = True  # 15 frames hold 20 masked tokens
    valid_BT = torch.ones(clips, frames, dtype=torch.bool)
    valid_BT[0, -1] = False
    batch = {
        "codes_BTQ": torch.randint(1024, (clips, frames, 2), generator=rng),
        "masked_BTQ": masked_BTQ,
        "positions_BT": torch.arange(frames).repeat(clips, 1),
        "valid_BT": valid_BT,
    }
    sums = Sums()
    with torch.no_grad():
        _, report = masked_loss(model(**batch), batch)
    if loss is not None:
        report["loss_Q"] = torch.full((2,), loss)
    for _ in range(updates):
        sums.add(report | {"lr": torch.tensor(3e-4), "updates": torch.ones(()), "grad_norm": torch.tensor(0.8)})
    return sums.take()


def test_rates_count_every_clip_once_and_seconds_of_training():
    metrics = signals().summarise(reported(), seconds=2.0)
    assert metrics["train/clips"] == 12
    assert metrics["train/clips_per_second"] == 6
    # without the frame that was padding
    assert metrics["train/audio_hours_per_second"] == pytest.approx(4 * (3 * 40 - 1) / 75 / 3600 / 2)
    assert metrics["train/peak_memory_gib"] > 0.05, "torch alone takes more"


def test_mfu_is_operations_of_one_rank_over_its_peak():
    work = Work(frames=12 * 40, frame_pairs=12 * 40**2, local_frames=12 * 15, masked_tokens=12 * 20)
    flops = training_flops(SMALL, 2, work)
    one, two = (signals(ranks, peak_tflops=0.5).summarise(reported(), 2.0) for ranks in (1, 2))
    assert one["train/mfu"] == pytest.approx(flops / 2.0 / 0.5e12)
    assert two["train/mfu"] == pytest.approx(one["train/mfu"] / 2)


def test_mfu_is_left_out_where_no_peak_is_known():
    metrics = signals(peak_tflops=None).summarise(reported(), 2.0)
    assert "train/mfu" not in metrics
    assert "MFU" not in note(metrics | {"train/data_wait_share": 0.0})


def test_losses_stand_beside_the_unigram_baseline():
    metrics = signals().summarise(reported(), 1.0)
    for q, unigram in enumerate((5.0, 6.0)):
        assert metrics[f"train/loss_minus_unigram_q{q}"] == pytest.approx(metrics[f"train/loss_q{q}"] - unigram)
        assert 0 <= metrics[f"train/acc_q{q}"] <= 1
    assert metrics["train/unigram_loss"] == 5.5
    assert metrics["train/loss_minus_unigram"] == pytest.approx(metrics["train/loss"] - 5.5)
    assert metrics["train/loss"] == pytest.approx((metrics["train/loss_q0"] + metrics["train/loss_q1"]) / 2)


def test_values_of_updates_are_averaged():
    metrics = signals().summarise(reported(updates=5), 1.0)
    assert metrics["train/lr"] == pytest.approx(3e-4)
    assert metrics["train/grad_norm"] == pytest.approx(0.8)
    sums = reported()
    del sums["grad_norm"]
    assert "train/grad_norm" not in signals().summarise(sums, 1.0)


def test_spike_is_one_line_with_its_step_and_a_metric(capsys):
    watched = signals(ranks=2)
    flags = [watched.summarise(reported(loss=4.0), 1.0)["train/loss_spike"] for _ in range(10)]
    assert flags == [0.0] * 10
    assert capsys.readouterr().err == ""
    assert watched.summarise(reported(loss=5.0), 1.0)["train/loss_spike"] == 1.0
    # 11 reports of 4 sums over 2 ranks are 22 updates, and 100 came before
    assert capsys.readouterr().err == (
        "loss spike at step 122: 5.000, where the last reports' mean is 4.000 (standard deviation 0.004)\n"
    )


def test_resumed_run_knows_the_losses_before_it():
    assert signals(past_losses=[4.0] * 10).summarise(reported(loss=5.0), 1.0)["train/loss_spike"] == 1.0
    assert signals(past_losses=[4.0] * 9).summarise(reported(loss=5.0), 1.0)["train/loss_spike"] == 0.0


def test_line_is_tidy():
    metrics = {
        "train/loss": 3.2144, "train/unigram_loss": 5.91, "train/acc_q0": 0.4119, "train/lr": 2.9e-4,
        "train/grad_norm": 0.82, "train/clips_per_second": 118.2, "train/mfu": 0.412, "train/data_wait_share": 0.004,
    }  # fmt: skip
    line = note(metrics)
    assert line == "loss 3.214 (unigram 5.9)  q0 0.412  lr 2.9e-04  |g| 0.82  118 clips/s  MFU 41%  wait 0%"
    assert len("pretraining 1.5 kbps   42%  42000/100000 steps  1d13h left  " + line) <= 150


@pytest.mark.parametrize(("rate", "text"), [(0.034, "0.03"), (1.26, "1.26"), (31.27, "31.3"), (12345.6, "12346")])
def test_rate_is_shown_with_as_many_digits_as_it_is_worth(rate, text):
    metrics = {name: 0.0 for name in ("train/loss", "train/unigram_loss", "train/acc_q0", "train/lr")}
    assert f"  {text} clips/s" in note(metrics | {"train/clips_per_second": rate, "train/data_wait_share": 0.0})
