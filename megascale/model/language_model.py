"""First weights from a language model: the layers of a EuroBERT-shaped encoder, one to one. (paper, section 3, future work)

Both sides compute the same: pre-norm RMSNorm, rotary positions that turn the pairs (i, i + H/2) of a head, SwiGLU, no
biases; only names differ. Embeddings and the patch projection stay ours. The safetensors are read as they are; the
package `transformers` is not needed.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megascale import hub
from megascale.errors import ConfigError
from megascale.model.config import ModelConfig
from megascale.model.layers import NORM_EPS
from megascale.model.mega_audioformer import GlobalEncoder

_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@torch.no_grad()
def load_language_model(encoder: GlobalEncoder, init_from: str) -> None:
    """Overwrite every block and the last norm of the global encoder with a language model's.

    Args:
        encoder: of the same shape: layers, width, heads, mlp_width, rope_theta.
        init_from: `hf:FOLDER_OR_ID`; a folder on this machine, or a repo on the Hugging Face hub, that holds config.json
            and model.safetensors, in one file or in shards with their index.

    Raises:
        ConfigError: not there, broken, or of another shape or kind; names the folder and the key.
        StorageError: the hub does not answer, or has no such repo.
    """
    where = init_from.removeprefix("hf:")
    if not Path(where).is_dir() and not hub.is_repo_id(where):
        raise ConfigError(f"model.init_from={init_from}: no such folder, and no id of a repo on the hub")
    _check_config(where, encoder.config)
    files = _list_tensors(where)
    prefix = "model." if "model.norm.weight" in files else ""  # of a model with its masked-token head on
    theirs_of = {"norm.weight": f"{prefix}norm.weight"}
    for i in range(encoder.config.layers):
        theirs_of |= {
            f"blocks.{i}.{ours}.weight": f"{prefix}layers.{i}.{theirs}.weight" for ours, theirs in _PARTS.items()
        }
    missing = [theirs for theirs in theirs_of.values() if theirs not in files]
    if missing:
        raise ConfigError(f"{where}: no tensor {missing[0]}: not a EuroBERT-shaped encoder")
    for key in files.keys() - set(theirs_of.values()):
        if key.startswith(f"{prefix}layers.") and not key.endswith("inv_freq"):
            raise ConfigError(
                f"{where}: tensor {key} has no place in model.layers={encoder.config.layers} of our blocks"
            )
    weights = dict(encoder.named_parameters())
    found = _read_tensors(where, {theirs: files[theirs] for theirs in theirs_of.values()})
    for ours, theirs in theirs_of.items():
        if found[theirs].shape != weights[ours].shape:
            raise ConfigError(
                f"{where}: {theirs} has the shape {tuple(found[theirs].shape)}, the model {tuple(weights[ours].shape)}"
            )
    for ours, theirs in theirs_of.items():  # all of them, or none
        weights[ours].copy_(found[theirs])


def _find(where: str, name: str) -> Path | None:
    if Path(where).is_dir():
        path = Path(where, name)
        return path if path.is_file() else None
    return hub.find_file(where, name)


def _need(where: str, name: str) -> Path:
    path = _find(where, name)
    if path is None:
        raise ConfigError(f"{where}: no {name}")
    return path


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as failure:
        raise ConfigError(f"{where}/{path.name}: not JSON: {failure}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}/{path.name}: holds no mapping")
    return tree


def _check_config(where: str, config: ModelConfig) -> None:
    """Compare what a language model says of itself with the model's shape, and with what our blocks can compute."""
    facts = _read_json(_need(where, _CONFIG), where)
    place = f"{where}/{_CONFIG}"
    for key, ours, value in (
        ("num_hidden_layers", "layers", config.layers),
        ("hidden_size", "width", config.width),
        ("num_attention_heads", "heads", config.heads),
        ("intermediate_size", "mlp_width", config.mlp_width),
    ):
        if facts.get(key) != value:
            raise ConfigError(f"{place}: {key}={facts.get(key)}, model.{ours}={value}")
    # transformers 5 keeps these together, 4 at the top
    rope = facts.get("rope_parameters") or facts.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    theta, kind = rope.get("rope_theta", facts.get("rope_theta")), rope.get("rope_type", rope.get("type", "default"))
    if theta != config.rope_theta:
        raise ConfigError(f"{place}: rope_theta={theta}, model.rope_theta={config.rope_theta:g}")
    grouped = facts.get("num_key_value_heads") or config.heads
    if grouped != config.heads:
        raise ConfigError(
            f"{place}: num_key_value_heads={grouped}: grouped-query attention; ours has keys for each of {config.heads} heads"
        )
    # absent, each is what EuroBERT's own config class says
    for key, found, needed in (
        ("model_type", facts.get("model_type", "eurobert"), "eurobert"),
        ("rope_type", kind, "default"),
        ("head_dim", facts.get("head_dim") or config.width // config.heads, config.width // config.heads),
        ("rms_norm_eps", facts.get("rms_norm_eps", NORM_EPS), NORM_EPS),
        ("hidden_act", facts.get("hidden_act", "silu"), "silu"),
        ("attention_bias", facts.get("attention_bias", False), False),
        ("mlp_bias", facts.get("mlp_bias", False), False),
    ):
        if found != needed:
            raise ConfigError(f"{place}: {key}={found}; our blocks compute {needed}")


def _list_tensors(where: str) -> dict[str, str]:
    """Return the file that holds each tensor."""
    whole = _find(where, _WHOLE)
    if whole is not None:
        with _opened(whole, where) as file:
            return dict.fromkeys(file.keys(), _WHOLE)
    index = _find(where, _INDEX)
    if index is None:
        raise ConfigError(f"{where}: neither {_WHOLE} nor {_INDEX}")
    files = _read_json(index, where).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in files.values()
    ):
        raise ConfigError(f"{where}/{_INDEX}: its weight_map does not name files of this folder")
    return files


def _read_tensors(where: str, files: dict[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        with _opened(_need(where, name), where) as file:
            held = set(file.keys())
            for key in (key for key, place in files.items() if place == name):
                if key not in held:
                    raise ConfigError(f"{where}/{name}: no tensor {key}, which {_INDEX} says is there")
                found[key] = file.get_tensor(key)
    return found


def _opened(path: Path, where: str) -> Any:
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as failure:
        raise ConfigError(f"{where}/{path.name}: not a whole safetensors file: {failure}") from None
