"""The Transformer block: what it computes, against plain arithmetic; rotary positions that depend on distance alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model import layers
from megascale.model.layers import Attention, Block, Blocks, attend, initialise, rotary, rotate

WIDTH, HEADS, THETA = 32, 4, 250_000.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build_block() -> Block:
    block = Block(WIDTH, HEADS, 48)
    for parameter in block.parameters():  # large enough that attention is far from uniform
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())) * 0.4)
    return block


def naive_rotate(x_BTNH: Tensor, positions_BT: Tensor) -> Tensor:
    """Pair (i, i + H/2) as one complex number, turned by position x theta^(-2i/H), in float64."""
    half = x_BTNH.shape[-1] // 2
    z = torch.complex(x_BTNH[..., :half].double(), x_BTNH[..., half:].double())
    frequencies = torch.tensor([THETA ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angles = positions_BT.double()[:, :, None, None] * frequencies
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


def naive_attention(attention: Attention, x_BTD: Tensor, positions_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """One query, one head, one clip at a time, in float64."""
    out = torch.zeros(x_BTD.shape, dtype=torch.float64)
    heads = [F.linear(x_BTD, p.weight).unflatten(-1, (HEADS, -1)) for p in (attention.q_proj, attention.k_proj)]
    q, k = (naive_rotate(h, positions_BT) for h in heads)
    v = F.linear(x_BTD, attention.v_proj.weight).unflatten(-1, (HEADS, -1)).double()
    for b in range(x_BTD.shape[0]):
        real = valid_BT[b]
        for t in range(x_BTD.shape[1]):
            mixed = []
            for n in range(HEADS):
                scores = k[b, real, n] @ q[b, t, n] / math.sqrt(WIDTH // HEADS)
                mixed.append(scores.softmax(dim=0) @ v[b, real, n])
            out[b, t] = attention.o_proj.weight.double() @ torch.cat(mixed)
    return out


def naive_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight


@pytest.mark.parametrize("padded", [False, True])
def test_block_computes_what_plain_arithmetic_does(padded):
    block = build_block()
    x_BTD = 0.01 * torch.randn(2, 7, WIDTH, generator=generator())  # so small that the norm's epsilon counts
    positions_BT = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 9, 10, 11, 12, 500]])
    valid_BT = torch.ones(2, 7, dtype=torch.bool)
    valid_BT[0, 4:] = not padded
    cos, sin = rotary(positions_BT, WIDTH // HEADS, THETA)
    got = block(x_BTD, cos, sin, valid_BT if padded else None)
    mid = x_BTD + naive_attention(block.attention, naive_norm(x_BTD, block.attention_norm), positions_BT, valid_BT)
    normed = naive_norm(mid.float(), block.mlp_norm)
    gate = normed @ block.mlp.gate_proj.weight.T
    up = normed @ block.mlp.up_proj.weight.T
    expected = mid + (gate * torch.sigmoid(gate) * up) @ block.mlp.down_proj.weight.T
    # fp32 against fp64: outputs of size 10, angles of size 500, so 500 x 6e-8 relative at worst
    assert torch.allclose(got.double(), expected, atol=5e-4)


def test_pairs_attend_as_plain_arithmetic_does():
    attention = build_block().attention
    x_BTD = torch.randn(5, 2, WIDTH, generator=generator())
    positions_BT = torch.arange(2).expand(5, 2)
    got = attention(x_BTD, *rotary(positions_BT, WIDTH // HEADS, THETA), None)
    expected = naive_attention(attention, x_BTD, positions_BT, torch.ones(5, 2, dtype=torch.bool))
    assert torch.allclose(got.double(), expected, atol=1e-5)  # fp32 against fp64, outputs of size 1


@pytest.mark.parametrize("length", [2, 7])
@pytest.mark.parametrize("asked", [[0], [9, 3, 4], list(range(14)), []])
def test_asked_positions_get_what_they_would_among_all(length, asked):
    blocks = Blocks([build_block(), build_block()])
    x_BTD = torch.randn(14 // length, length, WIDTH, generator=generator(), requires_grad=True)
    cos_sin = rotary(torch.arange(length)[None], WIDTH // HEADS, THETA)
    asked_M = torch.tensor(asked, dtype=torch.int64)
    few_MD, all_BTD = blocks(x_BTD, *cos_sin, None, asked_M), blocks(x_BTD, *cos_sin, None)
    assert few_MD.shape == (len(asked), WIDTH)
    # products of other sizes round in another order; outputs are of size 10 to 100
    assert torch.allclose(few_MD, all_BTD.flatten(0, 1)[asked_M], rtol=1e-4, atol=1e-4)
    (few,) = torch.autograd.grad(few_MD.square().sum(), x_BTD)
    (among_all,) = torch.autograd.grad(all_BTD.flatten(0, 1)[asked_M].square().sum(), x_BTD)
    assert torch.allclose(few, among_all, rtol=1e-4, atol=1e-5 * float(among_all.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_attention_over_more_sequences_than_cuda_takes_is_cut(monkeypatch, padded):
    q, k, v = torch.randn(3, 10, 3, HEADS, 8, generator=generator())
    valid_BT = torch.rand(10, 3, generator=generator()) < 0.7
    valid_BT[:, 0] = True
    whole = attend(q, k, v, valid_BT if padded else None)
    sizes, fused = [], F.scaled_dot_product_attention

    def spy(q_BNTH: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(q_BNTH))
        return fused(q_BNTH, *rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    assert layers._MAX_SDPA_BATCH == 65_535, "what a CUDA grid's second and third dimension hold"
    monkeypatch.setattr(layers, "_MAX_SDPA_BATCH", 4)
    assert torch.equal(attend(q, k, v, valid_BT if padded else None), whole)
    assert sizes == [4, 4, 2]


def test_rotary_angles_are_fp32_whatever_the_model_is():
    positions_BT = torch.arange(2250)[None]
    cos, sin = rotary(positions_BT, 64, THETA)
    assert (cos.dtype, cos.shape) == (torch.float32, (1, 2250, 1, 64))
    # neighbours stay apart at frame 2250: in bf16 positions above 256 already collide
    turned = rotate(torch.ones(1, 2250, 1, 64, dtype=torch.bfloat16), cos, sin)
    assert turned.dtype == torch.bfloat16
    assert (torch.stack([cos, sin])[:, :, 1:] - torch.stack([cos, sin])[:, :, :-1]).abs().amax(
        dim=(0, 1, 3, 4)
    ).min() > 0.5


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = torch.randn(2, 5, HEADS, 8, generator=generator())
    cos, sin = rotary(torch.arange(5).expand(2, 5), 8, THETA)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, 0], x[:, 0])
    # an fp32 rotation: a few roundings of 6e-8
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_attention_depends_on_distances_not_on_places():
    block = build_block()
    x_BTD = torch.randn(1, 12, WIDTH, generator=generator())

    def output(positions_T: Tensor) -> Tensor:
        return block(x_BTD, *rotary(positions_T[None], WIDTH // HEADS, THETA), None)

    positions_T = torch.arange(12)
    base = output(positions_T)
    for shift in (1, 100, 700):
        # angles up to 712 are rounded at 6e-8 x 712 = 4e-5; outputs are of size 10, and most of it the residual
        assert torch.allclose(output(positions_T + shift), base, atol=1e-4)
    with_gap = output(torch.where(positions_T < 6, positions_T, positions_T + 3))
    assert (with_gap - base).abs().max() > 0.05, "a gap of three frames is seen"


def test_attention_sees_both_ways():
    block = build_block()
    x_BTD = torch.randn(1, 6, WIDTH, generator=generator())
    cos, sin = rotary(torch.arange(6)[None], WIDTH // HEADS, THETA)
    base = block(x_BTD, cos, sin, None)
    for changed in (0, 5):
        other = x_BTD.clone()
        other[0, changed] += 1
        assert ((block(other, cos, sin, None) - base).abs().amax(dim=-1) > 1e-3).all(), "every frame sees the change"


def test_clips_of_a_batch_do_not_see_each_other():
    block = build_block()
    x_BTD = torch.randn(2, 6, WIDTH, generator=generator())
    cos, sin = rotary(torch.arange(6)[None], WIDTH // HEADS, THETA)
    other = x_BTD.clone()
    other[1] += 1
    assert torch.equal(block(x_BTD, cos, sin, None)[0], block(other, cos, sin, None)[0])


def test_weights_are_drawn_from_the_generator_alone_and_sized_by_depth():
    blocks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(blocks))
        blocks.append(Block(256, 4, 512))
        initialise(blocks[-1], num_layers=8, generator=generator(seed))
    weights = [torch.cat([p.flatten() for p in block.parameters()]) for block in blocks]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for name, parameter in blocks[0].named_parameters():
        parameter = parameter.detach()
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(256))
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        # the spread of 65,536 normal draws is known to 0.3%
        assert abs(float(parameter.std()) / expected - 1) < 0.02
        assert abs(float(parameter.mean())) < 0.02 * expected


def test_biases_start_at_zero():
    layer = nn.Linear(4, 3)
    initialise(layer, 1, generator())
    assert torch.equal(layer.bias, torch.zeros(3))
