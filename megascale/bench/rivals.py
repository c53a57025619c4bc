"""The models that `make bench-train` holds ours against, each with the same width, depth, heads, and operations per layer.

B batch, T frames, Q codebooks, V codebook size, D width. A layer of ours is 4 D² of projections and 3 D M of SwiGLU, M the
MLP width. The flat Transformer is made of the same blocks. ModernBERT's GeGLU is gated, too: intermediate_size = M.
MEGABYTE's MLP of two matrices gets ff_mult = 3 M / 2 D (6 at the paper's size), which is right for both of its scales, since
ours have the same M / D; its constructor gives both scales one number of heads of one width, so that its local stage is
built again with our local heads, which makes it faster.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model.config import ModelConfig
from megascale.model.layers import NORM_EPS, Block, Blocks, initialise, rotary
from megascale.model.mega_audioformer import CodeEmbedding, MegaAudioFormer
from megascale.tokenize.codec import prepare_torchaudio
from megascale.tokens import CODEBOOK_SIZE

OURS, PLAIN, FLAT = "ours", "ours, computed plainly", "flat Transformer"
MODERNBERT, MEGABYTE, MEGABYTE_DEFAULT = "ModernBERT", "MEGABYTE, RoPE and flash", "MEGABYTE, defaults"
PEERS = {"transformers": (MODERNBERT,), "MEGABYTE_pytorch": (MEGABYTE, MEGABYTE_DEFAULT)}
Batch = dict[str, Tensor]
_IGNORED = -100  # cross_entropy's own: no loss there


class Rival(NamedTuple):
    """A model, and its loss (a scalar) for a batch of codes_BTQ and masked_BTQ."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]


def build(name: str, config: ModelConfig, num_codebooks: int, num_frames: int) -> Rival:
    """Build a rival by its name above, with random weights. Raises ImportError if its package is not installed."""
    if name == OURS:
        ours = MegaAudioFormer(config, num_codebooks, torch.Generator().manual_seed(0))
        return Rival(ours, lambda batch: ours(**batch).loss_Q.mean())
    if name == FLAT:
        flat = FlatTransformer(config, num_codebooks, torch.Generator().manual_seed(0))
        return Rival(flat, lambda batch: flat(batch["codes_BTQ"], batch["masked_BTQ"]))
    if name == MODERNBERT:
        return _modernbert(config, num_codebooks * num_frames)
    return _megabyte(config, num_codebooks, num_frames, default=name == MEGABYTE_DEFAULT)


def installed() -> list[str]:
    """Return the names of rivals from other packages that can be built here."""
    return [name for package, names in PEERS.items() if find_spec(package) for name in names]


def plain_loss(model: MegaAudioFormer, x_BTD: Tensor, batch: Batch) -> Tensor:
    """Compute our loss as one would write it first: the local encoder on every frame, logits of every token.

    Args:
        model: ours.
        x_BTD: the global encoder's output.
        batch: codes_BTQ, masked_BTQ.
    """
    codes_PQ, masked_PQ = batch["codes_BTQ"].flatten(0, 1), batch["masked_BTQ"].flatten(0, 1)
    h_PQL = model.local_encoder(x_BTD.flatten(0, 1), codes_PQ, masked_PQ)
    logits_QPV = h_PQL.transpose(0, 1) @ model.local_encoder.heads_QVL.transpose(1, 2)
    target_QP = codes_PQ.where(masked_PQ, _IGNORED).T
    return F.cross_entropy(logits_QPV.flatten(0, 1), target_QP.flatten(), ignore_index=_IGNORED)


def plain(model: MegaAudioFormer) -> Rival:
    """Return the same model computed plainly."""

    def loss(batch: Batch) -> Tensor:
        inputs = (batch["codes_BTQ"], batch["masked_BTQ"], batch["positions_BT"])
        return plain_loss(model, model.global_encoder(*inputs), batch)

    return Rival(model, loss)


class FlatTransformer(nn.Module):
    """One Transformer of our blocks over all T x Q tokens of a clip; logits at masked tokens alone."""

    def __init__(self, config: ModelConfig, num_codebooks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config, self.num_codebooks = config, num_codebooks
        self.embedding = CodeEmbedding(num_codebooks, config.width)
        self.blocks = Blocks(Block(config.width, config.heads, config.mlp_width) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.heads_QVD = nn.Parameter(torch.empty(num_codebooks, CODEBOOK_SIZE, config.width))
        initialise(self, config.layers, generator)

    def forward(self, codes_BTQ: Tensor, masked_BTQ: Tensor) -> Tensor:
        """Return the mean cross-entropy at masked tokens; each codebook has to hide equally many."""
        x_BSD = self.embedding(codes_BTQ, masked_BTQ).flatten(1, 2)  # S = T x Q, in time order
        positions_1S = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        cos, sin = rotary(positions_1S, self.config.width // self.config.heads, self.config.rope_theta)
        x_BTQD = self.norm(self.blocks(x_BSD, cos, sin, None)).view(*codes_BTQ.shape, -1)
        masked_QBT = masked_BTQ.permute(2, 0, 1)  # grouped by codebook, one batched product makes all logits
        x_QMD = x_BTQD.permute(2, 0, 1, 3)[masked_QBT].unflatten(0, (self.num_codebooks, -1))
        logits_QMV = x_QMD @ self.heads_QVD.transpose(1, 2)
        return F.cross_entropy(logits_QMV.flatten(0, 1), codes_BTQ.permute(2, 0, 1)[masked_QBT])


def _modernbert(config: ModelConfig, num_tokens: int) -> Rival:
    """ModernBERT with its own attention pattern: every third layer sees all, the others 64 tokens to each side (a mask,
    on CPUs). Its vocabulary is a code or the mask, the least that it can have; logits are made at masked tokens alone."""
    prepare_torchaudio()
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    model = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=CODEBOOK_SIZE + 1,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=num_tokens,
            sparse_prediction=True,
            attn_implementation="sdpa",
            **special,
        )
    )

    def loss(batch: Batch) -> Tensor:
        codes_BS, masked_BS = batch["codes_BTQ"].flatten(1), batch["masked_BTQ"].flatten(1)
        shown_BS = codes_BS.masked_fill(masked_BS, CODEBOOK_SIZE)
        return model(input_ids=shown_BS, labels=codes_BS.where(masked_BS, _IGNORED)).loss

    return Rival(model.train(), loss)


def _megabyte(config: ModelConfig, num_codebooks: int, num_frames: int, default: bool) -> Rival:
    """MEGABYTE predicts every token from those before it, so that it has a loss, logits, and local work everywhere; it
    looks back alone, which halves attention. `default`: no rotary positions, no flash attention."""
    from MEGABYTE_pytorch import MEGABYTE as Megabyte
    from MEGABYTE_pytorch.megabyte import Transformer

    flags: dict[str, Any] = {} if default else {"flash_attn": True, "rel_pos": True}
    multiple = 3 * config.mlp_width // (2 * config.width)
    model = Megabyte(
        num_tokens=CODEBOOK_SIZE,
        dim=(config.width, config.local_width),
        depth=(config.layers, config.local_layers),
        max_seq_len=(num_frames, num_codebooks),
        dim_head=config.width // config.heads,
        heads=config.heads,
        ff_mult=multiple,
        pad_id=-1,  # its default is code 0
        **flags,
    )
    model.transformers[1] = Transformer(
        dim=config.local_width,
        layers=config.local_layers,
        dim_head=config.local_width // config.local_heads,
        heads=config.local_heads,
        ff_mult=multiple,
        flash_attn=not default,
        rel_pos=not default,
    )
    return Rival(model, lambda batch: model(batch["codes_BTQ"], return_loss=True))
