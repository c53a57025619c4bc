"""EuroBERT-shaped language models as they lie on the hub: random weights under the names of the published files."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megascale.model.config import ModelConfig


def config_of(shape: ModelConfig) -> dict[str, Any]:
    """The config.json; rope_theta stands where transformers 4 keeps it, and so the published models."""
    return {
        "model_type": "eurobert",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.mlp_width,
        "rope_theta": int(shape.rope_theta),
        "rope_scaling": None,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
    }


def tensors(shape: ModelConfig, prefix: str = "model.") -> dict[str, Tensor]:
    """Every tensor of a model with its masked-token head on."""
    rng, width, inner = torch.Generator().manual_seed(5), shape.width, shape.mlp_width
    sizes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (50, width), "lm_head.weight": (50, width)}
    for i in range(shape.layers):
        layer = f"{prefix}layers.{i}"
        sizes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        sizes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        sizes |= {f"{layer}.mlp.down_proj.weight": (width, inner)}
        sizes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    sizes[f"{prefix}norm.weight"] = (width,)
    return {name: torch.randn(size, generator=rng) for name, size in sizes.items()}


def write(folder: Path, shape: ModelConfig, weights: dict[str, Tensor] | None = None) -> str:
    """Write one; return what `model.init_from` calls it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    safetensors.torch.save_file(tensors(shape) if weights is None else weights, folder / "model.safetensors")
    return f"hf:{folder}"
