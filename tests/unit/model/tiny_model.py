"""A model small enough for tests, and batches for it."""

import torch
from torch import Tensor

from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import MegaAudioFormer

TINY = ModelConfig(
    layers=2, width=32, heads=2, mlp_width=48, local_layers=2, local_width=16, local_heads=2, local_mlp_width=24
)
Batch = dict[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(num_codebooks: int = 2) -> MegaAudioFormer:
    """A model whose weights are ten times the initial ones, so that every token matters to every other."""
    model = MegaAudioFormer(TINY, num_codebooks, generator())
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    return model


def draw_batch(num_codebooks: int = 2, lengths: tuple[int, ...] = (12, 12, 12), seed: int = 1) -> Batch:
    """Random clips with a gap; each hides a third of its frames in each codebook, and padding holds random codes."""
    rng, frames = generator(seed), max(lengths)
    masked_BTQ = torch.zeros(len(lengths), frames, num_codebooks, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for q in range(num_codebooks):
            masked_BTQ[b, torch.randperm(length, generator=rng)[: max(1, length // 3)], q] = True
    batch = {
        "codes_BTQ": torch.randint(1024, (len(lengths), frames, num_codebooks), generator=rng),
        "masked_BTQ": masked_BTQ,
        "positions_BT": (torch.arange(frames) + 5 * (torch.arange(frames) > 1)).repeat(len(lengths), 1),
    }
    if min(lengths) < frames:
        batch["valid_BT"] = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return batch


def seen(model: MegaAudioFormer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what the global encoder puts out for every frame, and the local one for masked tokens, when the model runs."""
    caught = []
    hook = model.local_encoder.register_forward_hook(lambda *call: caught.append(call[2].detach()))
    model(**batch)
    hook.remove()
    inputs = (batch["codes_BTQ"], batch["masked_BTQ"], batch["positions_BT"], batch.get("valid_BT"))
    return model.global_encoder(*inputs).detach(), caught[0]
