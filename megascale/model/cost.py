"""What the masked-token model costs: floating-point operations, which MFU and the plan count, and activations.

B batch, T frames, Q codebooks, V codebook size, D width of the global encoder, L width of the local encoder, P frames
that hold a masked token. A matrix product of (m, k) by (k, n) is 2 m k n operations; norms, rotations, activations,
the softmax and the optimizer are left out, as is usual. (arXiv:2204.02311, appendix B)
"""

from typing import NamedTuple

from megascale.model.config import ModelConfig
from megascale.tokens import CODEBOOK_SIZE


class Work(NamedTuple):
    """What a model is given, summed over clips; padding counts, since it is computed like the rest.

    frames: sum of T. frame_pairs: sum of T², who attends to whom. local_frames: sum of P, the frames with a masked
    token. masked_tokens: tokens to predict, over all codebooks.
    """

    frames: float
    frame_pairs: float
    local_frames: float
    masked_tokens: float


def forward_flops(config: ModelConfig, num_codebooks: int, work: Work) -> float:
    """Return the operations of MegaAudioFormer's forward pass; a test holds them against torch's own count."""
    width, local_width = config.width, config.local_width
    block, keys_values = _block(width, config.mlp_width), 2 * width**2
    # the last block computes keys and values alone for frames without a masked token
    frame = width * width + (config.layers - 1) * block + keys_values
    # every query is held against every key, and every value is weighed: D multiplications each
    frame_pair = config.layers * 2 * width
    local_block = _block(local_width, config.local_mlp_width)
    local_keys_values = 2 * local_width**2  # the same for tokens that are not masked
    local_frame = (
        block
        - keys_values
        + width * local_width  # Q slots of D/Q
        + num_codebooks * ((config.local_layers - 1) * local_block + local_keys_values)
        + config.local_layers * 2 * local_width * num_codebooks**2
    )
    masked_token = local_block - local_keys_values + local_width * CODEBOOK_SIZE
    return 2 * (
        work.frames * frame
        + work.frame_pairs * frame_pair
        + work.local_frames * local_frame
        + work.masked_tokens * masked_token
    )


def training_flops(config: ModelConfig, num_codebooks: int, work: Work) -> float:
    """Return the operations of forward and backward: three times forward, as each product has two gradients.

    What is computed twice to save memory (activation checkpointing: once more forward; scores inside flash attention)
    is no progress of the training and is not counted.
    """
    return 3 * forward_flops(config, num_codebooks, work)


def activation_bytes(
    config: ModelConfig, num_codebooks: int, work: Work, element_bytes: int, recompute: bool = False
) -> float:
    """Estimate the bytes that forward keeps for backward, and the logits with their gradient.

    A block keeps, per position, 8 D + 4 x its MLP width: both norms' inputs and outputs, q, k, v, attention's output;
    gate, up, silu(gate), and their product. Each encoder's last block keeps 6 D per position, and 4 D + 4 x its MLP width
    per frame that holds a masked token, or per masked token. Scores are taken not to be kept (flash attention), norms to be
    fused; between two codebooks attention keeps differences of keys and values, L less per token and layer. What the
    allocator and kernels need besides is not in it.

    Args:
        config: the model's shape.
        num_codebooks: Q.
        work: of one micro-batch.
        element_bytes: 2 for bf16, 4 for fp32.
        recompute: every block keeps its input alone, and they are computed again one by one (activation checkpointing).
    """
    local_width = config.local_width
    block, local_block = _kept(config.width, config.mlp_width), _kept(local_width, config.local_mlp_width)
    pair = local_width if num_codebooks == 2 else 0
    local_tokens = work.local_frames * num_codebooks
    between = work.frames * config.width + work.local_frames * 2 * config.width  # the patch; the last norm, both sides
    between += work.masked_tokens * 2 * local_width  # the local one's
    within = [work.frames * block] * (config.layers - 1)
    within += [work.frames * 6 * config.width + work.local_frames * (block - 4 * config.width)]
    within += [local_tokens * (local_block - pair)] * (config.local_layers - 1)
    within += [local_tokens * (6 * local_width - pair) + work.masked_tokens * (local_block - 4 * local_width)]
    if recompute:
        inputs = work.frames * config.layers * config.width + local_tokens * config.local_layers * local_width
        elements = between + inputs + max(within)
    else:
        elements = between + sum(within)
    # per masked token: logits, their log-softmax in fp32, and its gradient
    return element_bytes * elements + work.masked_tokens * CODEBOOK_SIZE * (element_bytes + 4 + 4)


def _kept(width: int, mlp_width: int) -> int:
    return 8 * width + 4 * mlp_width


def _block(width: int, mlp_width: int) -> int:
    """Multiplications of one block for one position, but for attention's scores: q, k, v, o; gate, up, down."""
    return 4 * width * width + 3 * width * mlp_width
