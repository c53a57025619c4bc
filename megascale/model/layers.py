"""The Transformer block both encoders are made of: pre-norm, RMSNorm, rotary positions, SwiGLU, no biases.

B batch, T positions, D width, N heads, H head width, M asked positions of the whole batch. Block by block this is
EuroBERT-210m's encoder, so layers of a pretrained language model can be loaded one to one.

What was measured and left as it is, one CPU thread (AVX2), forward and backward: one product for q, k and v, or for gate
and up, over weights joined on the fly is within 1% of separate ones; so are a hand-written gradient of SwiGLU, and of
`rotate` (1.4 times as fast, but 0.2% of a step). Rotation by complex numbers takes twice as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-5
INIT_STD = 0.02
# CUDA's fused kernels count the batch in a grid dimension that ends here; beyond, 'invalid configuration argument'
# (pytorch#142228), and the frames of a micro-batch can be more
_MAX_SDPA_BATCH = 65_535


def rotary(positions_BT: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each (B, T, 1, H), float32. (arXiv:2104.09864, section 3.2.2)"""
    exponents = torch.arange(0, head_width, 2, device=positions_BT.device, dtype=torch.float32) / head_width
    # fp32 whatever the model's dtype: bf16 has 8 bits of mantissa, and positions run to thousands
    angles = positions_BT[..., None].float() * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of a head by its position's angle, so that q . k depends on distance alone."""
    first, second = x_BTNH.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BTNH * cos + turned * sin).to(x_BTNH.dtype)


def attend(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Return softmax(q . k / sqrt(H)) v, bidirectional, (B, T, N, H); valid_BT, True = may be attended to."""
    if q_BTNH.shape[1] == 2 and valid_BT is None:
        return _attend_pair(q_BTNH, k_BTNH, v_BTNH)
    inputs = [x_BTNH.transpose(1, 2) for x_BTNH in (q_BTNH, k_BTNH, v_BTNH)]
    if valid_BT is not None:
        inputs.append(valid_BT[:, None, None])
    pieces = zip(*(x.split(_MAX_SDPA_BATCH) for x in inputs), strict=True)
    y_BNTH = [F.scaled_dot_product_attention(*piece) for piece in pieces]
    return (y_BNTH[0] if len(y_BNTH) == 1 else torch.cat(y_BNTH)).transpose(1, 2)


def _attend_pair(q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor) -> Tensor:
    """Attention over two positions: a softmax of two scores is the sigmoid of their difference.

    Forward and backward on one CPU thread, 656 frames, 4 heads of 64: 2.3 times as fast as SDPA, compiled 4 times; scores and
    softmax written out 1.7 times, compiled 3.9. Over more positions SDPA wins: written out, 4 take 1.4 times as long, 16
    take 19 times, and compiled 1.07 times. (Measured again with 248 frames, compiled was faster: 1.8 times at 4 positions, 1.4
    at 8, 1.1 at 16. It is not used there yet.)
    """
    k_first, k_second = k_BTNH.unbind(1)
    v_first, v_second = v_BTNH.unbind(1)
    score_BTN1 = (q_BTNH * (k_first - k_second)[:, None]).sum(dim=-1, keepdim=True) * q_BTNH.shape[-1] ** -0.5
    return v_second[:, None] + score_BTN1.sigmoid() * (v_first - v_second)[:, None]


def take(x_BTD: Tensor, asked_M: Tensor | None) -> Tensor:
    """Return x_MD at the asked positions, each counted as b T + t; all of x_BTD if None is given."""
    return x_BTD if asked_M is None else x_BTD.flatten(0, 1).index_select(0, asked_M)


class Attention(nn.Module):
    """Bidirectional self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None, asked_M: Tensor | None = None
    ) -> Tensor:
        q_BTD, k_BTD, v_BTD = self.q_proj(take(x_BTD, asked_M)), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if asked_M is not None:
            # scores are little beside projections: queries that nobody asked for are zeros, and keys and values need not be
            # gathered for each query
            q_BTD = torch.zeros_like(k_BTD).flatten(0, 1).index_copy(0, asked_M, q_BTD).view_as(k_BTD)
        q_BTNH, k_BTNH, v_BTNH = (x.unflatten(-1, (self.heads, -1)) for x in (q_BTD, k_BTD, v_BTD))
        y_BTNH = attend(rotate(q_BTNH, cos, sin), rotate(k_BTNH, cos, sin), v_BTNH, valid_BT)
        return self.o_proj(take(y_BTNH.flatten(2), asked_M))


class SwiGLU(nn.Module):
    """Gated MLP. (arXiv:2002.05202)"""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width, mlp_width)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None, asked_M: Tensor | None = None
    ) -> Tensor:
        """Return x_BTD; given asked_M, positions of the batch counted as b T + t, x_MD there, and nothing is computed
        for others but their keys and values."""
        x = take(x_BTD, asked_M) + self.attention(self.attention_norm(x_BTD), cos, sin, valid_BT, asked_M)
        return x + self.mlp(self.mlp_norm(x))


class Blocks(nn.ModuleList):
    """Blocks one after the other.

    With `recompute`, training keeps the stream between blocks alone and computes what is inside them a second time in the
    backward pass: about a third more time for a fraction of the memory.
    """

    recompute = False

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None, asked_M: Tensor | None = None
    ) -> Tensor:
        """Return x_BTD, or x_MD at the asked positions (see `Block`)."""
        x = x_BTD
        for number, block in enumerate(self, start=1):
            inputs = (x, cos, sin, valid_BT, asked_M if number == len(self) else None)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return x


def initialise(module: nn.Module, num_layers: int, generator: torch.Generator) -> None:
    """Draw all weights from N(0, 0.02²); those that write to the residual stream from 0.02 / sqrt(2 x layers).

    Norm gains stay at one, biases become zero. (GPT-2's scheme, which keeps the stream's variance apart from depth)
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0 if "norm" in name else 0.0)
            continue
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INIT_STD / (2 * num_layers) ** 0.5 if writes_residual else INIT_STD
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
