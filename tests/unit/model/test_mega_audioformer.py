"""The model: its exact size, and what each token may see."""

import pytest
import torch
from pydantic import ValidationError
from tiny_model import TINY, Batch, build, draw_batch, generator, seen
from torch import Tensor

from megascale.model.config import ModelConfig
from megascale.model.mega_audioformer import (
    AudioClassifier,
    GlobalEncoder,
    LocalEncoder,
    MaskedTokenOutput,
    MegaAudioFormer,
    count_parameters,
    mean_over_frames,
    pool_frames,
    pooled_width,
    prepare_training,
)


def with_codes(batch: Batch, where_BTQ: Tensor) -> Batch:
    """The same batch with every code at these places changed."""
    return batch | {"codes_BTQ": torch.where(where_BTQ, (batch["codes_BTQ"] + 501) % 1024, batch["codes_BTQ"])}


# ------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_paper_model_has_exactly_these_weights(num_codebooks):
    with torch.device("meta"):
        wide, local = GlobalEncoder(ModelConfig(), num_codebooks), LocalEncoder(ModelConfig(), num_codebooks)
    layers = 12 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768)  # q k v o, SwiGLU, two norms
    assert layers == 113_264_640
    assert count_parameters(wide.blocks) == layers
    tables = num_codebooks * 1024 * (768 // num_codebooks)
    assert count_parameters(wide) == layers + tables + 768 + 768**2 + 768  # tables, masks, patch_proj, norm
    local_layers = 2 * (4 * 256**2 + 3 * 256 * 1024 + 2 * 256)
    local_ends = 2 * num_codebooks * 1024 * 256 + num_codebooks * 256 + (768 // num_codebooks) * 256 + 256
    assert count_parameters(local) == local_layers + local_ends  # tables and heads, masks, slot_proj, norm
    assert (wide.config.layers, wide.config.heads, wide.blocks[0].mlp.up_proj.weight.shape) == (12, 12, (3072, 768))


def test_shapes_are_what_the_names_say():
    batch = draw_batch(num_codebooks=4, lengths=(9, 9))
    model = build(4)
    x_BTD, h_AL = seen(model, batch)
    assert x_BTD.shape == (2, 9, 32)
    assert h_AL.shape == (2 * 4 * 3, 16), "masked tokens alone"
    out = model(**batch)
    assert isinstance(out, MaskedTokenOutput)
    assert (out.loss_Q.shape, out.correct_Q.shape) == ((4,), (4,))
    assert out.count_Q.tolist() == [6] * 4
    assert AudioClassifier(TINY, 4, 5, generator())(batch["codes_BTQ"]).shape == (2, 5)


def test_width_that_codebooks_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"^model.width=768 must be a multiple of the 5 codebooks$"):
        GlobalEncoder(ModelConfig(), 5)


@pytest.mark.parametrize("sizes", [{"width": 770}, {"width": 780, "heads": 12}, {"local_width": 30}])
def test_width_that_heads_do_not_divide_evenly_is_refused(sizes):
    name, width = next(iter(sizes.items()))
    with pytest.raises(ValidationError, match=rf"{name}={width} must split into \d+ heads of an even width"):
        ModelConfig(**sizes)


def test_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(models))
        models.append(MegaAudioFormer(TINY, 2, generator(seed)).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    drawn = [name for name in models[0] if "norm" not in name]
    assert not any(torch.equal(models[0][name], models[2][name]) for name in drawn)


# -------------------------------------------------------------------------------------------------- what tokens see


@pytest.mark.parametrize("num_codebooks", [2, 16])
@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 7, 3)])
def test_masked_tokens_are_predicted_without_a_look_at_their_codes(num_codebooks, lengths):
    model, batch = build(num_codebooks), draw_batch(num_codebooks, lengths)
    before, after = seen(model, batch), seen(model, with_codes(batch, batch["masked_BTQ"]))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(model(**batch).loss_Q, model(**with_codes(batch, batch["masked_BTQ"])).loss_Q)


def test_one_unmasked_code_is_seen_by_every_frame_of_its_clip_and_no_other():
    model, batch = build(), draw_batch()
    b, t, q = (~batch["masked_BTQ"]).nonzero()[40].tolist()
    place = torch.zeros_like(batch["masked_BTQ"])
    place[b, t, q] = True
    changed_BT = (seen(model, batch)[0] != seen(model, with_codes(batch, place))[0]).any(dim=-1)
    assert changed_BT[b].all()
    assert changed_BT.sum() == 12


def test_local_encoder_sees_the_unmasked_codes_of_its_own_frame_alone():
    local = build(4).local_encoder
    x_PD = torch.randn(3, 32, generator=generator())
    codes_PQ = torch.randint(1024, (3, 4), generator=generator())
    masked_PQ = torch.tensor([[True, False, True, False]]).expand(3, 4)
    before = local(x_PD, codes_PQ, masked_PQ)
    assert torch.equal(before, local(x_PD, torch.where(masked_PQ, 7, codes_PQ), masked_PQ))
    other_PQ = codes_PQ.clone()
    other_PQ[1, 3] += 1
    changed_PQ = (before != local(x_PD, other_PQ, masked_PQ)).any(dim=-1)
    assert changed_PQ.tolist() == [[False] * 4, [True] * 4, [False] * 4]


def test_local_tokens_get_their_own_slot_of_the_frame():
    local = build(4).local_encoder
    for block in local.blocks:  # without the blocks, slot q can reach token q alone
        for parameter in block.parameters():
            parameter.data.zero_()
    x_PD = torch.randn(1, 32, generator=generator())
    other_PD = x_PD.clone()
    other_PD[0, 8:16] += 1  # slot 1 of four, 8 wide
    codes_PQ, masked_PQ = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
    changed_PQ = (local(x_PD, codes_PQ, masked_PQ) != local(other_PD, codes_PQ, masked_PQ)).any(dim=-1)
    assert changed_PQ.tolist() == [[False, True, False, False]]


def test_codebooks_have_tables_of_their_own():
    encoder = build(2).global_encoder
    codes_BTQ = torch.tensor([[[3, 9]]])
    assert not torch.equal(encoder(codes_BTQ), encoder(codes_BTQ.flip(-1)))
    embedded = encoder.embedding(codes_BTQ, None)
    assert torch.equal(embedded[0, 0], encoder.embedding.table.weight[[3, 1024 + 9]])


def test_dropped_chunk_is_seen_through_its_gap():
    encoder, codes_BTQ = build().global_encoder, draw_batch()["codes_BTQ"]
    positions_BT = torch.arange(12).expand(3, 12)
    x_BTD = encoder(codes_BTQ, None, positions_BT)
    assert torch.equal(encoder(codes_BTQ), x_BTD), "without positions, frames count from 0"
    # a normed output is of size 1; angles are rounded at 100 x 6e-8, and twelve of them add up in two layers
    assert torch.allclose(encoder(codes_BTQ, None, positions_BT + 100), x_BTD, atol=2e-4)
    with_gap = encoder(codes_BTQ, None, positions_BT + 5 * (positions_BT >= 6))
    assert (with_gap - x_BTD).abs().max() > 0.02


def test_padding_changes_no_real_frame_and_no_classification():
    lengths = (12, 7, 3)
    batch = draw_batch(lengths=lengths)
    padding_BTQ = ~batch["valid_BT"][..., None].expand_as(batch["codes_BTQ"])
    classifier = AudioClassifier(TINY, 2, 5, generator())
    inputs = {name: batch[name] for name in ("codes_BTQ", "positions_BT", "valid_BT")}
    noisy = with_codes(inputs, padding_BTQ)
    assert torch.equal(classifier(**inputs), classifier(**noisy)), "what padding holds is never seen"
    model = build()
    before, after = seen(model, batch), seen(model, with_codes(batch, padding_BTQ))
    assert torch.equal(before[0][batch["valid_BT"]], after[0][batch["valid_BT"]])
    assert torch.equal(before[1], after[1])
    # sums of another length are rounded in another order: a few times 1e-7 on outputs of size 1
    for b, length in enumerate(lengths):
        alone = {name: value[b : b + 1, :length] for name, value in batch.items() if name != "valid_BT"}
        assert torch.allclose(seen(model, alone)[0][0], before[0][b, :length], atol=1e-4)
        logits_BC = classifier(alone["codes_BTQ"], alone["positions_BT"])
        assert torch.allclose(logits_BC[0], classifier(**inputs)[b], atol=1e-5)


def test_classifier_is_a_linear_layer_on_the_mean_over_frames():
    classifier = AudioClassifier(TINY, 2, 5, generator())
    batch = draw_batch(lengths=(12, 7))
    inputs = {name: batch[name] for name in ("codes_BTQ", "positions_BT", "valid_BT")}
    x_BTD = classifier.global_encoder(batch["codes_BTQ"], None, batch["positions_BT"], batch["valid_BT"])
    mean_BD = torch.stack([x_BTD[0].mean(dim=0), x_BTD[1, :7].mean(dim=0)])
    expected_BC = mean_BD @ classifier.head.weight.T + classifier.head.bias
    assert torch.allclose(classifier(**inputs), expected_BC, atol=1e-6)  # fp32 sums in another order
    assert not any("local" in name for name, _ in classifier.named_modules())
    assert count_parameters(classifier) == count_parameters(classifier.global_encoder) + 32 * 5 + 5


def test_pooling_takes_mean_and_deviation_of_real_frames_alone_and_a_still_feature_has_a_gradient():
    x_BTD = torch.randn(2, 9, 4, generator=generator(), requires_grad=True)
    valid_BT = torch.arange(9) < torch.tensor([[9], [5]])
    pooled_BK = pool_frames(x_BTD, "mean_std", valid_BT)
    assert pooled_BK.shape == (2, pooled_width(4, "mean_std")) and pooled_width(4, "mean") == 4
    for b, frames in enumerate((9, 5)):
        seen_TD = x_BTD[b, :frames]
        expected_K = torch.cat([seen_TD.mean(dim=0), seen_TD.std(dim=0, correction=0)])
        assert torch.allclose(pooled_BK[b], expected_K, atol=1e-5)  # 1e-6 is added to the variance
    assert torch.equal(pool_frames(x_BTD, "mean", valid_BT), mean_over_frames(x_BTD, valid_BT))
    still_BTD = torch.ones(1, 3, 2, requires_grad=True)
    pool_frames(still_BTD, "mean_std").sum().backward()
    assert still_BTD.grad is not None and bool(torch.isfinite(still_BTD.grad).all())


def gradients(model: MegaAudioFormer, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss_Q.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputation_changes_no_gradient_and_keeps_less():
    model, batch, kept = build(), draw_batch(lengths=(40,) * 4), {}
    for recompute in (False, True):
        prepare_training(model, recompute, compile=False)
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss_Q.mean()
        del loss
        kept[recompute] = (sum(saved), gradients(model, batch))
    assert kept[True][1].keys() == kept[False][1].keys()
    assert all(torch.equal(kept[True][1][name], kept[False][1][name]) for name in kept[True][1])
    assert kept[True][0] < kept[False][0] / 2


@pytest.mark.slow  # a C++ compiler at work
@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_compiled_blocks_give_the_same_gradients_under_the_same_names(num_codebooks):
    """Also where chunks were dropped, clips are padded, and nothing is trained, and no block gives up being compiled."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=limit):  # put back at the end
        plain, compiled = build(num_codebooks), build(num_codebooks)
        prepare_training(compiled, recompute=False, compile=True)
        for lengths in ((40,) * 4, (33,) * 4, (28,) * 4, (40, 31, 7), (35, 12), (40,)):
            batch = draw_batch(num_codebooks, lengths)
            ours, theirs = gradients(compiled, batch), gradients(plain, batch)
            assert ours.keys() == theirs.keys()
            for name in ours:
                # fused kernels sum in another order
                torch.testing.assert_close(
                    ours[name], theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max())
                )
            with torch.no_grad():
                torch.testing.assert_close(compiled(**batch).loss_Q, plain(**batch).loss_Q, rtol=1e-4, atol=1e-6)
