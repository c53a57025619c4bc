"""The Transformer block both encoders are made of: pre-norm, RMSNorm, rotary positions, SwiGLU, no biases.

B batch, T positions, D width, N heads, H head width. Block by block this is EuroBERT-210m's encoder, so layers of a
pretrained language model can be loaded one to one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-5
INIT_STD = 0.02


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


class Attention(nn.Module):
    """Bidirectional self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None) -> Tensor:
        q_BTNH, k_BTNH, v_BTNH = (
            proj(x_BTD).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTNH, k_BTNH = rotate(q_BTNH, cos, sin), rotate(k_BTNH, cos, sin)
        keys = None if valid_BT is None else valid_BT[:, None, None]  # True = may be attended to
        y_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2), k_BTNH.transpose(1, 2), v_BTNH.transpose(1, 2), attn_mask=keys
        )
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2))


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

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin, valid_BT)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Blocks(nn.ModuleList):
    """Blocks one after the other.

    With `recompute`, training keeps the stream between blocks alone and computes what is inside them a second time in the
    backward pass: about a third more time for a fraction of the memory.
    """

    recompute = False

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, valid_BT: Tensor | None) -> Tensor:
        for block in self:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cos, sin, valid_BT, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = block(x_BTD, cos, sin, valid_BT)
        return x_BTD


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
