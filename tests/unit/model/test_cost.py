"""The count of operations is torch's own, product by product; kept activations are those that autograd keeps."""

import itertools

import pytest
import torch
from tiny_model import TINY, Batch, build, draw_batch, generator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megascale.model.config import ModelConfig
from megascale.model.cost import Work, activation_bytes, forward_flops, training_flops
from megascale.model.mega_audioformer import MegaAudioFormer, prepare_training


def work_of(batch: Batch) -> Work:
    masked_BTQ = batch["masked_BTQ"]
    clips, frames, _ = masked_BTQ.shape
    return Work(clips * frames, clips * frames**2, float(masked_BTQ.any(dim=-1).sum()), float(masked_BTQ.sum()))


def counted(model: MegaAudioFormer, batch: Batch, backward: bool) -> int:
    # fused kernels recompute the scores in backward, and torch does not count the CPU's at all
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_Q = model(**batch).loss_Q
        if backward:
            loss_Q.mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_codebooks", [2, 16])
@pytest.mark.parametrize("lengths", [(12, 12, 12), (40,), (12, 7, 3)])
def test_operations_are_those_that_torch_counts(num_codebooks, lengths):
    batch = draw_batch(num_codebooks, lengths)
    work, model = work_of(batch), build(num_codebooks)
    assert 0 < work.local_frames < work.frames or num_codebooks == 16
    # attention between two codebooks is no matrix product to torch: 2 x 2 scores, each 2 L multiplications and additions
    uncounted = TINY.local_layers * work.local_frames * 4 * 4 * TINY.local_width if num_codebooks == 2 else 0
    # equal, not close: both count 2 m k n of every product, in whole numbers that a float holds exactly
    assert forward_flops(TINY, num_codebooks, work) - uncounted == counted(model, batch, False)
    assert training_flops(TINY, num_codebooks, work) - 3 * uncounted == counted(model, batch, True)


def test_operations_of_the_papers_model_are_known():
    """One 10 s clip of the paper's model: 12 x 768 over 750 frames is about 0.6 TFLOP forward and backward; without a masked
    frame the last block makes keys and values alone."""
    frames = 750
    work = Work(frames, frames**2, 0, 0)
    block = 4 * 768**2 + 3 * 768 * 3072
    by_hand = 3 * 2 * (frames * (768**2 + 11 * block + 2 * 768**2) + 12 * 2 * 768 * frames**2)
    assert training_flops(ModelConfig(), 2, work) == by_hand
    assert by_hand / 1e12 == pytest.approx(0.537, abs=0.001)  # printed to three places


def kept_bytes(model: MegaAudioFormer, batch: Batch) -> int:
    """Bytes of everything that autograd keeps, but for the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch)
    assert output.loss_Q.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_estimated_activations_are_those_that_autograd_keeps(num_codebooks):
    batch = draw_batch(num_codebooks, (60, 60))
    work = work_of(batch)
    estimate = activation_bytes(TINY, num_codebooks, work, 4)
    estimate -= work.masked_tokens * 1024 * (4 + 4)  # logits and their gradient live for a moment
    # the CPU's norms are not fused, and keep what they normalised beside their input
    estimate += 4 * (work.frames * (2 * TINY.layers - 1) + work.local_frames * 2) * TINY.width
    estimate += 4 * work.local_frames * num_codebooks * (2 * TINY.local_layers - 1) * TINY.local_width
    estimate += 4 * work.masked_tokens * 2 * TINY.local_width
    # beyond the estimate: each norm's scale, attention's sums, rotations, masks and targets: one number or so a position,
    # which is much only beside widths as small as these
    assert estimate <= kept_bytes(build(num_codebooks), batch) <= 1.15 * estimate


def test_recomputing_keeps_one_block_and_the_inputs_of_all():
    frames = 750
    work = Work(frames, frames**2, 0, 0)
    whole, recomputed = (activation_bytes(ModelConfig(), 2, work, 2, recompute) for recompute in (False, True))
    block = 8 * 768 + 4 * 3072
    assert whole == 2 * frames * (11 * block + 6 * 768 + 768)
    assert recomputed == 2 * frames * (12 * 768 + block + 768)


def test_recomputing_keeps_one_block_of_the_local_encoder_too():
    """At Q = 16 nearly all frames go through it, and a block of it keeps more than a global one."""
    frames, tokens = 750, 16 * 742
    work = Work(frames, frames**2, 742, tokens // 4)
    block, local_block = 8 * 768 + 4 * 3072, 8 * 256 + 4 * 1024
    kept = frames * (12 + 1) * 768 + 742 * 2 * 768 + tokens * 2 * 256 + work.masked_tokens * 2 * 256
    recomputed = activation_bytes(ModelConfig(), 16, work, 2, recompute=True)
    assert tokens * local_block > frames * block
    assert recomputed == 2 * (kept + tokens * local_block) + work.masked_tokens * 1024 * (2 + 4 + 4)


def peak_bytes(model: MegaAudioFormer, batch: Batch) -> int:
    """The most that tensors take during forward and backward beyond what is there before; gradients are."""
    model(**batch).loss_Q.mean().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(**batch).loss_Q.mean().backward()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("num_codebooks", [2, 16])
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_forward_and_backward_is_what_the_estimate_says(num_codebooks, recompute):
    config = ModelConfig(
        layers=4, width=192, heads=3, mlp_width=768, local_width=64, local_heads=2, local_mlp_width=256
    )
    model, batch = MegaAudioFormer(config, num_codebooks, generator()), draw_batch(num_codebooks, (200,) * 4)
    prepare_training(model, recompute, compile=False)
    estimate = activation_bytes(config, num_codebooks, work_of(batch), 4, recompute)
    # what backward holds for a moment comes on top, and the norms, which CPUs don't fuse; logits are partly gone before the
    # first block is computed again
    assert estimate / 1.25 <= peak_bytes(model, batch) <= 1.12 * estimate
