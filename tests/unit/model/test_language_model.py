"""First weights from a EuroBERT-shaped language model: what is loaded, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from language_models import config_of, tensors, write
from tiny_model import TINY, generator
from torch import Tensor

from megascale.errors import ConfigError
from megascale.model.config import ModelConfig
from megascale.model.language_model import load_language_model
from megascale.model.layers import rotary
from megascale.model.mega_audioformer import GlobalEncoder
from megascale.tokenize.codec import prepare_torchaudio


def new_encoder(config: ModelConfig = TINY) -> GlobalEncoder:
    encoder = GlobalEncoder(config, 2)
    encoder.initialise(generator())
    return encoder


def through_blocks(encoder: GlobalEncoder, x_BTD: Tensor) -> Tensor:
    config = encoder.config
    positions_BT = torch.arange(x_BTD.shape[1])[None]
    cos, sin = rotary(positions_BT, config.width // config.heads, config.rope_theta)
    with torch.no_grad():
        return encoder.norm(encoder.blocks(x_BTD, cos, sin, None))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("masked_head", [False, True])
def test_with_the_same_weights_our_layers_equal_transformers_eurobert(tmp_path, sharded, masked_head):
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency (extra dev)")
    prepare_torchaudio()
    config = ModelConfig(layers=3, width=96, heads=4, mlp_width=160)
    torch.manual_seed(3)
    theirs = (transformers.EuroBertForMaskedLM if masked_head else transformers.EuroBertModel)(
        transformers.EuroBertConfig(
            vocab_size=60,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            pad_token_id=1,
        )
    ).eval()
    for parameter in theirs.parameters():  # weights of one size, and norms away from one, so that each of them counts
        parameter.data.copy_(torch.randn(parameter.shape) * (0.15 if parameter.dim() > 1 else 1.0))
    theirs.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded

    encoder = new_encoder(config)
    load_language_model(encoder, f"hf:{tmp_path}")
    x_BTD = torch.randn(2, 40, config.width)
    with torch.no_grad():
        base = theirs.model if masked_head else theirs
        expected_BTD = base(inputs_embeds=x_BTD).last_hidden_state
    # both sum in their own order, in fp32; outputs are of size one
    torch.testing.assert_close(through_blocks(encoder, x_BTD), expected_BTD, rtol=0, atol=1e-5)
    assert not torch.allclose(through_blocks(new_encoder(config), x_BTD), expected_BTD, atol=0.1)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_every_weight_of_blocks_and_last_norm_is_replaced_and_no_other(tmp_path, prefix):
    encoder, drawn = new_encoder(), dict(new_encoder().named_parameters())
    load_language_model(encoder, write(tmp_path / "lm", TINY, tensors(TINY, prefix)))
    kept = {name for name, value in encoder.named_parameters() if torch.equal(value, drawn[name])}
    assert kept == {"embedding.table.weight", "embedding.mask", "patch_proj.weight"}
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_half_precision_is_widened(tmp_path):
    halves = {name: value.bfloat16() for name, value in tensors(TINY).items()}
    encoder = new_encoder()
    load_language_model(encoder, write(tmp_path / "lm", TINY, halves))
    weight = encoder.blocks[1].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, halves["model.layers.1.mlp.up_proj.weight"].float())


def changed(**facts: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config_of(TINY) | facts))

    return change


def stored(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = tensors(TINY)
        edit(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def as_shards(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


ALL_IN_A = dict.fromkeys(tensors(TINY), "a.safetensors")
Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (shutil.rmtree, "no such folder, and no id of a repo"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (text("config.json", "{"), "config.json: not JSON"),
        (text("config.json", "[]"), "config.json: holds no mapping"),
        (changed(num_hidden_layers=3), "config.json: num_hidden_layers=3, model.layers=2"),
        (changed(hidden_size=64), "config.json: hidden_size=64, model.width=32"),
        (changed(intermediate_size=64), "config.json: intermediate_size=64, model.mlp_width=48"),
        (changed(num_attention_heads=4), "config.json: num_attention_heads=4, model.heads=2"),
        (changed(num_key_value_heads=1), "config.json: num_key_value_heads=1: grouped-query attention"),
        (changed(rope_theta=10000), "config.json: rope_theta=10000, model.rope_theta=250000"),
        (changed(rope_theta=None), "config.json: rope_theta=None, model.rope_theta=250000"),
        (
            changed(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 160000.0}),
            "rope_theta=160000.0, model.rope_theta=250000",
        ),
        (changed(rope_scaling={"type": "linear", "factor": 2.0}), "config.json: rope_type=linear"),
        (changed(model_type="modernbert"), "config.json: model_type=modernbert"),
        (changed(rms_norm_eps=1e-6), "config.json: rms_norm_eps=1e-06"),
        (changed(hidden_act="gelu"), "config.json: hidden_act=gelu"),
        (changed(mlp_bias=True), "config.json: mlp_bias=True"),
        (changed(head_dim=8), "config.json: head_dim=8"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "neither model.safetensors nor model.safetensors.index",
        ),
        (text("model.safetensors", "no tensors"), "model.safetensors: not a whole safetensors file"),
        (stored(lambda held: held.pop(Q_PROJ)), f"no tensor {Q_PROJ}"),
        (stored(lambda held: held.pop(NORM)), "no tensor norm.weight"),
        (
            stored(lambda held: held.update({NORM: torch.ones(31)})),
            f"{NORM} has the shape \\(31,\\), the model \\(32,\\)",
        ),
        (
            stored(lambda held: held.update({Q_PROJ.replace("weight", "bias"): torch.ones(32)})),
            "tensor model.layers.1.self_attn.q_proj.bias has no place",
        ),
        (as_shards(ALL_IN_A | {NORM: "b.safetensors"}), "no b.safetensors"),
        (as_shards(ALL_IN_A | {NORM: "../a.safetensors"}), "weight_map does not name files of this folder"),
        (as_shards({}), "no tensor layers.0.self_attn.q_proj.weight|no tensor norm.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, spoil, told):
    folder = tmp_path / "lm"
    name = write(folder, TINY)
    spoil(folder)
    encoder, drawn = new_encoder(), dict(new_encoder().named_parameters())
    with pytest.raises(ConfigError, match=told) as failure:
        load_language_model(encoder, name)
    assert str(folder) in str(failure.value) and "\n" not in str(failure.value)
    assert all(torch.equal(value, drawn[key]) for key, value in encoder.named_parameters())


def test_an_index_that_names_the_wrong_shard_is_told(tmp_path):
    folder = tmp_path / "lm"
    name = write(folder, TINY)
    as_shards(ALL_IN_A)(folder)
    load_language_model(new_encoder(), name)
    weights = tensors(TINY)
    del weights[NORM]
    safetensors.torch.save_file(weights, folder / "a.safetensors")
    with pytest.raises(ConfigError, match=f"a.safetensors: no tensor {NORM}, which model.safetensors.index.json says"):
        load_language_model(new_encoder(), name)


@pytest.mark.parametrize("init_from", ["EuroBERT/EuroBERT-210m", "hf:", "s3://bucket/model"])
def test_init_from_reads_hf_and_a_folder_or_id(init_from):
    with pytest.raises(ValueError, match="reads hf:FOLDER_OR_ID"):
        ModelConfig(init_from=init_from)


def test_the_shape_that_checkpoints_keep_leaves_out_where_first_weights_came_from():
    assert ModelConfig(**ModelConfig(init_from="hf:folder").shape()) == ModelConfig()
