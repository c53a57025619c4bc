"""What a pretraining run tells about itself: metrics from what the steps report, and the progress line. Q codebooks."""

import math
from collections.abc import Sequence

from torch import Tensor

from megascale.log import say
from megascale.model.config import ModelConfig
from megascale.model.cost import Work, training_flops
from megascale.tokens import FRAMES_PER_SECOND
from megascale.train.device import peak_memory_gib
from megascale.train.metrics import max_over_ranks
from megascale.train.spikes import SpikeDetector


class Signals:
    """Turns sums over all ranks into metrics; every rank must call it alike."""

    def __init__(
        self,
        model: ModelConfig,
        unigram_loss_Q: Tensor,
        ranks: int,
        peak_tflops: float | None,
        spike_stds: float,
        start: int,
        past_losses: Sequence[float] = (),
    ) -> None:
        """
        Args:
            model: the model's shape, for counting its operations.
            unigram_loss_Q: what a baseline loses that knows only how often each code occurs, nats.
            ranks: number of processes, each with a device of its own.
            peak_tflops: of one device; None leaves MFU out.
            spike_stds: see `SpikeDetector`.
            start: updates done before.
            past_losses: what was reported before a resume, oldest first.
        """
        self._model, self._unigram_Q, self._ranks, self._peak_tflops = model, unigram_loss_Q, ranks, peak_tflops
        self._spikes = SpikeDetector(spike_stds)
        self._step = start
        for loss in past_losses:
            self._spikes.update(loss)

    def summarise(self, sums: dict[str, Tensor], seconds: float) -> dict[str, float]:
        """Return metrics of the updates since the last report.

        Args:
            sums: over all ranks, what `masked_loss` and the engine reported.
            seconds: of training that they took.
        """
        self._step += round(float(sums["updates"]) / self._ranks)
        metrics = self._losses(sums) | {"train/lr": float(sums["lr"] / sums["updates"])}
        if "grad_norm" in sums:
            metrics["train/grad_norm"] = float(sums["grad_norm"] / sums["updates"])
        seconds = max(seconds, 1e-9)
        metrics |= {
            "train/clips": float(sums["clips"]),
            "train/clips_per_second": float(sums["clips"]) / seconds,
            "train/audio_hours_per_second": float(sums["audio_frames"]) / FRAMES_PER_SECOND / 3600 / seconds,
            "train/peak_memory_gib": max_over_ranks(peak_memory_gib()),
        }
        if self._peak_tflops is not None:
            work = Work(*(float(sums[name]) for name in Work._fields))
            flops = training_flops(self._model, len(self._unigram_Q), work) / self._ranks
            metrics["train/mfu"] = flops / seconds / (self._peak_tflops * 1e12)
        return metrics | self._spike(metrics["train/loss"])

    def _losses(self, sums: dict[str, Tensor]) -> dict[str, float]:
        loss_Q = sums["loss_Q"] / sums["micro_batches"]
        found = {
            "loss": loss_Q,
            "loss_minus_unigram": loss_Q - self._unigram_Q,
            "acc": sums["correct_Q"] / sums["count_Q"],
        }
        metrics = {f"train/{name}": float(value_Q.mean()) for name, value_Q in found.items()}
        metrics["train/unigram_loss"] = float(self._unigram_Q.mean())
        for name, value_Q in found.items():
            metrics |= {f"train/{name}_q{q}": float(value) for q, value in enumerate(value_Q)}
        return metrics

    def _spike(self, loss: float) -> dict[str, float]:
        spike = self._spikes.update(loss)
        if spike is not None:
            say(
                f"loss spike at step {self._step}: {spike.loss:.3f}, where the last reports' mean is {spike.mean:.3f} "
                f"(standard deviation {spike.std:.3f})"
            )
        return {"train/loss_spike": float(spike is not None)}


def note(metrics: dict[str, float]) -> str:
    """Return what the progress line says beside progress and time left."""
    parts = [
        f"loss {metrics['train/loss']:.3f} (unigram {metrics['train/unigram_loss']:.1f})",
        f"q0 {metrics['train/acc_q0']:.3f}",
        f"lr {metrics['train/lr']:.1e}",
    ]
    if "train/grad_norm" in metrics:
        parts.append(f"|g| {metrics['train/grad_norm']:.2f}")
    parts.append(f"{_rate(metrics['train/clips_per_second'])} clips/s")
    if "train/mfu" in metrics:
        parts.append(f"MFU {metrics['train/mfu']:.0%}")
    parts.append(f"wait {metrics['train/data_wait_share']:.0%}")
    return "  ".join(parts)


def _rate(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.{max(0, 2 - int(math.log10(max(value, 1))))}f}"
