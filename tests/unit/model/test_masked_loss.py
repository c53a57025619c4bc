"""The masked-token loss: equal to a plain computation, and the same however a global batch is cut."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import Batch, build, draw_batch, seen
from torch import Tensor

from megascale.model.mega_audioformer import MegaAudioFormer


def naive_output(model: MegaAudioFormer, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Every frame, every token, all logits; then cross-entropy at masked tokens, the mean of each clip, over clips."""
    codes_BTQ, masked_BTQ = batch["codes_BTQ"], batch["masked_BTQ"]
    num_codebooks = codes_BTQ.shape[-1]
    x_BTD = model.global_encoder(codes_BTQ, masked_BTQ, batch["positions_BT"], batch.get("valid_BT"))
    losses, correct = [], []
    for q in range(num_codebooks):
        of_clips, right = [], 0
        for b in range(len(codes_BTQ)):
            h_TQL = model.local_encoder(x_BTD[b], codes_BTQ[b], masked_BTQ[b])
            logits_TV = h_TQL[:, q] @ model.local_encoder.heads_QVL[q].T
            loss_T = F.cross_entropy(logits_TV, codes_BTQ[b, :, q], reduction="none")
            of_clips.append(loss_T[masked_BTQ[b, :, q]].mean())
            right += int(((logits_TV.argmax(dim=-1) == codes_BTQ[b, :, q]) & masked_BTQ[b, :, q]).sum())
        losses.append(torch.stack(of_clips).mean())
        correct.append(right)
    return torch.stack(losses), torch.tensor(correct), masked_BTQ.sum(dim=(0, 1))


@pytest.mark.parametrize("num_codebooks", [2, 16])
@pytest.mark.parametrize("lengths", [(12, 12, 12), (12, 7, 3), (1,), (2, 3)])
def test_loss_is_the_plain_one(num_codebooks, lengths):
    model, batch = build(num_codebooks), draw_batch(num_codebooks, lengths)
    if lengths == (12, 12, 12):  # make some predictions right: let every target be what the model predicts for it
        x_BTD, _ = seen(model, batch)
        h_PQL = model.local_encoder(
            x_BTD.flatten(0, 1), batch["codes_BTQ"].flatten(0, 1), batch["masked_BTQ"].flatten(0, 1)
        )
        best_BTQ = torch.einsum("pql,qvl->pqv", h_PQL, model.local_encoder.heads_QVL).argmax(-1).view(3, 12, -1)
        chosen = batch["masked_BTQ"] & (torch.arange(12) % 2 == 0)[:, None]
        batch["codes_BTQ"] = torch.where(chosen, best_BTQ, batch["codes_BTQ"])
    out = model(**batch)
    loss_Q, correct_Q, count_Q = naive_output(model, batch)
    assert torch.allclose(out.loss_Q, loss_Q, rtol=1e-5)  # fp32 sums in another order
    assert torch.equal(out.correct_Q, correct_Q)
    assert torch.equal(out.count_Q, count_Q)
    if lengths == (12, 12, 12):
        assert (out.correct_Q > 2).all()


@pytest.mark.parametrize("num_codebooks", [2, 4, 16])
@pytest.mark.parametrize("lengths", [(30, 30), (12, 7, 3)])
def test_gradients_are_the_plain_ones(num_codebooks, lengths):
    lean, plain = build(num_codebooks), build(num_codebooks)
    batch = draw_batch(num_codebooks, lengths)
    lean(**batch).loss_Q.mean().backward()
    naive_output(plain, batch)[0].mean().backward()
    for (name, ours), theirs in zip(lean.named_parameters(), plain.parameters(), strict=True):
        # fp32 sums in another order
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()), msg=name
        )


@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_products_are_computed_for_what_the_loss_needs_alone(num_codebooks):
    """Rows that each product gets: frames with a masked token after the last global attention, masked tokens after the
    last local one."""
    model, batch = build(num_codebooks), draw_batch(num_codebooks, (12, 12))
    batch["masked_BTQ"][:] = False
    for q in range(num_codebooks):  # half of the frames hold none, also at Q = 16
        batch["masked_BTQ"][:, [1 + q % 3, 4 + q % 3], q] = True
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: rows.update({name: y.numel() // y.shape[-1]}))
    model(**batch)
    masked_BTQ = batch["masked_BTQ"]
    frames, tokens = int(masked_BTQ.any(dim=-1).sum()), int(masked_BTQ.sum())
    assert frames < 24 and tokens < frames * num_codebooks
    lean = tuple(
        f"blocks.1.{part}" for part in ("attention.q_proj", "attention.o_proj", "mlp.gate", "mlp.up", "mlp.down")
    )
    assert len(rows) == 1 + 2 * 7 + 1 + 2 * 7
    for name, count in rows.items():
        scale, _, part = name.partition(".")
        every, asked = (24, frames) if scale == "global_encoder" else (frames * num_codebooks, tokens)
        assert count == (asked if part.startswith(lean) else every), name


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (12, 3, 7, 5)])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_gradient_of_a_batch_does_not_depend_on_how_it_is_cut(lengths, micro_batch):
    """DeepSpeed averages over equal micro-batches and ranks; clips of other lengths hide other numbers of tokens."""
    batch = draw_batch(lengths=lengths)

    def gradients(size: int) -> dict[str, Tensor]:
        model = build()
        parts = range(0, 4, size)
        for i in parts:
            (
                model(**{name: value[i : i + size] for name, value in batch.items()}).loss_Q.mean() / len(parts)
            ).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole, cut = gradients(4), gradients(micro_batch)
    for name in whole:
        assert whole[name].abs().max() > 0, f"{name} is trained"
        # fp32 sums in another order, relative to the largest entry
        assert (whole[name] - cut[name]).abs().max() < 1e-5 * whole[name].abs().max()


def test_every_clip_weighs_the_same_however_many_tokens_it_hides():
    model, batch = build(), draw_batch(lengths=(12, 3))
    parts = [model(**{name: value[b : b + 1] for name, value in batch.items()}).loss_Q for b in range(2)]
    assert torch.allclose(model(**batch).loss_Q, (parts[0] + parts[1]) / 2, rtol=1e-5)  # fp32 sums in another order


def test_codes_under_the_mask_get_no_gradient():
    model, batch = build(), draw_batch(lengths=(6,))
    batch["codes_BTQ"][:] = 5
    batch["codes_BTQ"][batch["masked_BTQ"]] = 9
    model(**batch).loss_Q.sum().backward()
    for embedding in (model.global_encoder.embedding, model.local_encoder.embedding):
        rows = embedding.table.weight.grad.abs().sum(dim=1).nonzero()[:, 0].tolist()
        assert rows == [5, 1024 + 5]


def test_loss_of_a_bf16_model_is_near_and_summed_in_fp32():
    batch = draw_batch(lengths=(12, 7))
    exact, rough = build()(**batch).loss_Q, build().bfloat16()(**batch).loss_Q
    assert rough.dtype == torch.float32
    # bf16 keeps 8 bits: activations are off by up to 1% after two layers, losses here are 7 to 12
    assert torch.allclose(rough, exact, rtol=0.03)
    model = build().bfloat16()
    model.local_encoder.heads_QVL.data.zero_()
    # logits of zero cost ln 1024 = 6.93147; in bf16 that would be 6.9375
    assert torch.allclose(model(**batch).loss_Q, torch.tensor(1024.0).log(), rtol=1e-6)
