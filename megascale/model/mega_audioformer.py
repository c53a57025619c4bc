"""Mega-AudioFormer: a global encoder over frames, a local encoder inside each frame, a linear classifier.

B batch, T frames, Q codebooks, V codebook size, D width of the global encoder, L width of the local encoder,
S slot width D/Q, P frames that hold a masked token, A masked tokens of the batch, M = A/Q of each codebook, C classes.

codes_BTQ int64 in 0..V-1; masked_BTQ bool, True = predict (the code there is never looked at); positions_BT int64, each
frame's place in its clip, with a gap where a chunk was dropped; valid_BT bool, True = a real frame, False = padding.

How the two scales meet (our choices where the paper leaves them open): a frame's patch embedding concatenates one
D/Q-wide embedding per codebook, as MegaByte does; going down, slot q of the frame's global output is projected and
added to the local embedding of token q, which for a masked token is the mask embedding. (paper, section 3, figure 1a)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.model.config import ModelConfig, Pooling
from megascale.model.layers import INIT_STD, NORM_EPS, Block, Blocks, initialise, rotary
from megascale.tokens import CODEBOOK_SIZE

_COMPILED_VERSIONS = 64  # torch's own limit is 8, and beyond it a block runs eager
_CODE_STD = 0.2  # of the codes' embeddings; everything else starts at INIT_STD or below
_TINY_VARIANCE = 1e-6  # a feature that never changes has a finite gradient, too


class MaskedTokenOutput(NamedTuple):
    """What pretraining needs, per codebook: loss_Q, the mean over clips of each clip's mean cross-entropy (nats) at its
    masked tokens; correct_Q, how many of them were predicted; count_Q, how many there are."""

    loss_Q: Tensor
    correct_Q: Tensor
    count_Q: Tensor


class CodeEmbedding(nn.Module):
    """One table per codebook, and one mask embedding per codebook: codes_BTQ to (B, T, Q, width)."""

    first_row_Q: Tensor

    def __init__(self, num_codebooks: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_codebooks * CODEBOOK_SIZE, width)
        self.mask = nn.Parameter(torch.empty(num_codebooks, width))
        self.register_buffer("first_row_Q", torch.arange(num_codebooks) * CODEBOOK_SIZE, persistent=False)

    def forward(self, codes_BTQ: Tensor, masked_BTQ: Tensor | None) -> Tensor:
        embedded = self.table(codes_BTQ + self.first_row_Q)
        return embedded if masked_BTQ is None else torch.where(masked_BTQ[..., None], self.mask, embedded)


class GlobalEncoder(nn.Module):
    """Frames to contextual vectors: what pretraining is for, and all that fine-tuning keeps."""

    def __init__(self, config: ModelConfig, num_codebooks: int) -> None:
        super().__init__()
        if config.width % num_codebooks:
            raise ValueError(f"model.width={config.width} must be a multiple of the {num_codebooks} codebooks")
        self.config, self.num_codebooks = config, num_codebooks
        self.embedding = CodeEmbedding(num_codebooks, config.width // num_codebooks)
        self.patch_proj = nn.Linear(config.width, config.width, bias=False)
        self.blocks = Blocks(Block(config.width, config.heads, config.mlp_width) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw first weights; codes stand out from the stream they start, and the patch keeps its slots apart."""
        initialise(self, self.config.layers, generator)
        self.embedding.table.weight.data.mul_(_CODE_STD / INIT_STD)
        self.patch_proj.weight.data.add_(torch.eye(self.config.width))

    def forward(
        self,
        codes_BTQ: Tensor,
        masked_BTQ: Tensor | None = None,
        positions_BT: Tensor | None = None,
        valid_BT: Tensor | None = None,
        asked_P: Tensor | None = None,
    ) -> Tensor:
        """Return x_BTD; given asked_P, frames counted as b T + t, x_PD for these. Without positions, frames count from 0;
        without valid, every frame is real."""
        if positions_BT is None:
            positions_BT = torch.arange(codes_BTQ.shape[1], device=codes_BTQ.device)[None]
        cos, sin = rotary(positions_BT, self.config.width // self.config.heads, self.config.rope_theta)
        x_BTD = self.patch_proj(self.embedding(codes_BTQ, masked_BTQ).flatten(2))
        return self.norm(self.blocks(x_BTD, cos, sin, valid_BT, asked_P))


class LocalEncoder(nn.Module):
    """The tokens of one frame, given the frame's global vector; only for pretraining."""

    def __init__(self, config: ModelConfig, num_codebooks: int) -> None:
        super().__init__()
        self.config, self.num_codebooks = config, num_codebooks
        width = config.local_width
        self.embedding = CodeEmbedding(num_codebooks, width)
        self.slot_proj = nn.Linear(config.width // num_codebooks, width, bias=False)
        self.blocks = Blocks(
            Block(width, config.local_heads, config.local_mlp_width) for _ in range(config.local_layers)
        )
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.heads_QVL = nn.Parameter(torch.empty(num_codebooks, CODEBOOK_SIZE, width))

    def forward(self, x_PD: Tensor, codes_PQ: Tensor, masked_PQ: Tensor, asked_A: Tensor | None = None) -> Tensor:
        """Return h_PQL, a vector per token of each frame; given asked_A, tokens counted as p Q + q, h_AL for these."""
        positions_1Q = torch.arange(self.num_codebooks, device=x_PD.device)[None]
        cos, sin = rotary(positions_1Q, self.config.local_width // self.config.local_heads, self.config.rope_theta)
        slots_PQS = x_PD.unflatten(-1, (self.num_codebooks, -1))
        h_PQL = self.embedding(codes_PQ, masked_PQ) + self.slot_proj(slots_PQS)
        return self.norm(self.blocks(h_PQL, cos, sin, None, asked_A))


class MegaAudioFormer(nn.Module):
    """Both encoders and the masked-token objective."""

    def __init__(self, config: ModelConfig, num_codebooks: int, generator: torch.Generator) -> None:
        super().__init__()
        self.global_encoder = GlobalEncoder(config, num_codebooks)
        self.local_encoder = LocalEncoder(config, num_codebooks)
        self.global_encoder.initialise(generator)
        initialise(self.local_encoder, config.local_layers, generator)
        self._align_heads()

    def _align_heads(self) -> None:
        """Let a logit begin as the likeness of slot q of the frame to the code's own embedding.

        Then what attention carries over from other frames counts as a prediction from the first step on. With heads
        drawn apart from the embeddings, each code has to be learned for itself: after 300 steps of 16 clips of 2 s,
        held-out accuracy of codebook 0 was 6% in place of 56% (README, "What the first weights do").
        """
        num_codebooks, _, width = self.local_encoder.heads_QVL.shape
        table_QVS = self.global_encoder.embedding.table.weight.data.view(num_codebooks, CODEBOOK_SIZE, -1)
        alike_QVL = table_QVS @ self.local_encoder.slot_proj.weight.data.T
        alike_QVL *= width**-0.5 / alike_QVL.std()  # logits of unit variance
        self.local_encoder.heads_QVL.data.add_(alike_QVL)

    def forward(
        self, codes_BTQ: Tensor, masked_BTQ: Tensor, positions_BT: Tensor, valid_BT: Tensor | None = None
    ) -> MaskedTokenOutput:
        """Predict the masked tokens. Each clip must hide equally many tokens of every codebook, at least one."""
        # frames without a masked token have no loss, and frames don't see each other in the local encoder
        frame_P = masked_BTQ.any(dim=-1).flatten().nonzero()[:, 0]
        x_PD = self.global_encoder(codes_BTQ, masked_BTQ, positions_BT, valid_BT, frame_P)
        return self.predict(x_PD, frame_P, codes_BTQ, masked_BTQ)

    def predict(self, x_PD: Tensor, frame_P: Tensor, codes_BTQ: Tensor, masked_BTQ: Tensor) -> MaskedTokenOutput:
        """Do what comes after the global encoder, whose output x_PD is for frames frame_P (int64, counted as b T + t), all
        that hold a masked token."""
        num_frames, num_codebooks = codes_BTQ.shape[1:]
        codes_PQ, masked_PQ = (x.flatten(0, 1).index_select(0, frame_P) for x in (codes_BTQ, masked_BTQ))
        # (q, p) order groups the masked tokens by codebook; equally many of each make one batched product
        q_A, p_A = masked_PQ.T.nonzero(as_tuple=True)
        asked_A = p_A * num_codebooks + q_A
        h_QML = self.local_encoder(x_PD, codes_PQ, masked_PQ, asked_A).unflatten(0, (num_codebooks, -1))
        target_QM = codes_PQ.flatten()[asked_A].unflatten(0, (num_codebooks, -1))
        clip_QM = (frame_P // num_frames)[p_A].unflatten(0, (num_codebooks, -1))
        logits_QMV = h_QML @ self.local_encoder.heads_QVL.transpose(1, 2)

        loss_QM = F.cross_entropy(logits_QMV.flatten(0, 1).float(), target_QM.flatten(), reduction="none")
        # clips weigh the same however many tokens they hide, so the gradient of a global batch does not depend on how
        # it is cut into micro-batches and ranks
        tokens_B = masked_BTQ[..., 0].sum(dim=1)
        weight_QM = 1.0 / (tokens_B[clip_QM] * len(tokens_B))
        loss_Q = (loss_QM.view_as(weight_QM) * weight_QM).sum(dim=1)
        correct_Q = (logits_QMV.argmax(dim=-1) == target_QM).sum(dim=1)
        return MaskedTokenOutput(loss_Q, correct_Q, torch.full_like(correct_Q, target_QM.shape[1]))


class AudioClassifier(nn.Module):
    """The global encoder, pooling over frames, one linear layer. (paper, section 3: the mean)"""

    def __init__(
        self,
        config: ModelConfig,
        num_codebooks: int,
        num_classes: int,
        generator: torch.Generator,
        pooling: Pooling = "mean",
    ) -> None:
        """`pooling`: as `pool_frames`."""
        super().__init__()
        self.global_encoder = GlobalEncoder(config, num_codebooks)
        self.pooling = pooling
        self.head = nn.Linear(pooled_width(config.width, pooling), num_classes)
        self.global_encoder.initialise(generator)
        initialise(self.head, 1, generator)

    def forward(self, codes_BTQ: Tensor, positions_BT: Tensor | None = None, valid_BT: Tensor | None = None) -> Tensor:
        """Return logits_BC."""
        return self.head(self.pool(codes_BTQ, positions_BT, valid_BT))

    def pool(self, codes_BTQ: Tensor, positions_BT: Tensor | None = None, valid_BT: Tensor | None = None) -> Tensor:
        """Return what the linear layer sees of each clip, as `pool_frames`."""
        return pool_frames(self.global_encoder(codes_BTQ, None, positions_BT, valid_BT), self.pooling, valid_BT)


def mean_over_frames(x_BTD: Tensor, valid_BT: Tensor | None = None) -> Tensor:
    """Return the mean over a clip's real frames, x_BD: what it is embedded as."""
    if valid_BT is None:
        return x_BTD.mean(dim=1)
    weight_BT = valid_BT / valid_BT.sum(dim=1, keepdim=True)
    return torch.einsum("btd,bt->bd", x_BTD, weight_BT.to(x_BTD.dtype))


def pool_frames(x_BTD: Tensor, pooling: Pooling, valid_BT: Tensor | None = None) -> Tensor:
    """Return what a classifier sees of each clip: the mean over its real frames, (B, D), or with their deviation, (B, 2D)."""
    mean_BD = mean_over_frames(x_BTD, valid_BT)
    if pooling == "mean":
        return mean_BD
    variance_BD = mean_over_frames((x_BTD - mean_BD[:, None]).square(), valid_BT)
    return torch.cat([mean_BD, (variance_BD + _TINY_VARIANCE).sqrt()], dim=-1)


def pooled_width(width: int, pooling: Pooling) -> int:
    """Return how many numbers `pool_frames` gives for a clip."""
    return 2 * width if pooling == "mean_std" else width


def prepare_training(module: nn.Module, recompute: bool, compile: bool) -> None:
    """Set how every Transformer block is run; weights and their names stay as they are.

    Args:
        module: any model of this file.
        recompute: trade time for activation memory (`Blocks`).
        compile: compile each block by itself, so that all blocks of a kind share one compilation.
    """
    for part in module.modules():
        if isinstance(part, Blocks):
            part.recompute = recompute
            if compile:
                # all blocks share one function, and each shape class (dropped, padded, validated, last block) is a version
                torch._dynamo.config.recompile_limit = _COMPILED_VERSIONS
                for block in part:
                    block.compile()


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())
