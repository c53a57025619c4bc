"""The model card of an exported model: what its config and its run say, and nothing else."""

from dataclasses import dataclass, field
from typing import Any

import yaml

from megascale.hub import is_repo_id
from megascale.tokens import FRAMES_PER_SECOND, KBPS_PER_CODEBOOK, PUBLISHED_NAME

CODEC_FILE = "codec.safetensors"
# of a config: they say where, not what
_PLACES = ("output", "storage", "log", "checkpoint", "data.url", "data.cache", "task.lists", "zero.deepspeed_json")
_POOLING = {"mean": "the mean", "mean_std": "mean and standard deviation"}
_NO_SCORES = ("checkpoint", "codec", "wall_seconds")


@dataclass(frozen=True)
class RunFacts:
    """What is known of the run that made a model; each is empty where it is not.

    config: its resolved config. step, clips: updates and clips behind the weights. validation: numbers at that step.
    result: of a fine-tuning run, its scores on the test split.
    """

    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    clips: int | None = None
    validation: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def model_card(facts: dict[str, Any], run: RunFacts, codec_included: bool) -> str:
    """Return the card as Markdown with the hub's YAML header.

    Args:
        facts: the model's `config.json`.
        run: what is known of its run.
        codec_included: whether `codec.safetensors` lies beside the model.
    """
    classifier = "classes" in facts
    header = {
        "library_name": "megascale",
        "pipeline_tag": "audio-classification" if classifier else "feature-extraction",
        "tags": ["audio", "encodec", "mega-audioformer"],
    }
    kbps = facts["num_codebooks"] * KBPS_PER_CODEBOOK
    title = f"Mega-AudioFormer, {kbps:g} kbps" + (f", {facts['label']}" if "label" in facts else "")
    what = (
        f"A classifier of {len(facts['classes'])} classes: the global encoder, {_POOLING[facts.get('pooling', 'mean')]} over "
        "frames, one linear layer."
        if classifier
        else "A multi-scale masked Transformer over EnCodec tokens, pretrained to predict hidden ones."
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {title}",
        f"{what} Made with `megascale`, after *Multi-scale Transformer language modeling for music classification tasks*.",
        _table(_rows(facts, run, kbps)),
        "## Codec\n\n" + _codec(facts, codec_included),
        "## Use\n\n" + _use(classifier, codec_included),
        *([f"## Scores on the test split\n\n{_table(_scores(run.result))}"] if run.result else []),
        *([f"## Config of the run\n\n```yaml\n{_config_text(run.config)}```"] if run.config else []),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _rows(facts: dict[str, Any], run: RunFacts, kbps: float) -> list[tuple[str, str]]:
    shape = facts["model"]
    rows = [
        ("bitrate", f"{kbps:g} kbps: {facts['num_codebooks']} codebooks, {FRAMES_PER_SECOND} frames a second"),
        ("global encoder", f"{shape['layers']} layers of width {shape['width']}, {shape['heads']} heads"),
    ]
    if "corpus" in facts:
        rows.append(("tokens trained on (fingerprint)", f"`{facts['corpus']}`"))
    if facts.get("init_from"):
        rows.append(("first weights of the global encoder", f"`{_first_weights(facts['init_from'])}`"))
    if "classes" in facts:
        rows.append(("classes", ", ".join(map(str, facts["classes"]))))
    if run.step is not None:
        planned = run.config.get("train", {}).get("steps")
        rows.append(("updates", f"{run.step:,}" + (f" of {planned:,}" if planned else "")))
    if run.clips is not None:
        rows.append(("clips seen", f"{run.clips:,}"))
    return rows + [(f"`{name}`", f"{value:.4f}") for name, value in run.validation.items()]


def _codec(facts: dict[str, Any], included: bool) -> str:
    codec = facts["codec"]
    named = f"`{codec['name']}`, fingerprint `{codec['fingerprint']}` ({codec['origin']})."
    if codec["name"] == PUBLISHED_NAME:
        return (
            f"{named} These are EnCodec's published weights, which are licensed CC BY-NC 4.0. They are not in this folder; "
            "they are needed for raw audio, not for `.ecdc` streams and token shards."
        )
    here = f"It is `{CODEC_FILE}` in this folder." if included else "It is not in this folder."
    return (
        f"{named} These are not EnCodec's published weights. {here} Only tokens of this codec mean anything to the model; "
        "a calibrated codec's tokens do not decode to audio."
    )


def _use(classifier: bool, codec_included: bool) -> str:
    name = "AudioClassifier" if classifier else "MegaAudioFormer"
    place = "FOLDER_OR_ID" if codec_included else "FOLDER_OR_ID::CODEC"
    return (
        "```python\n"
        f"from megascale.export import {name}\n\n"
        f'model = {name}.from_pretrained("FOLDER_OR_ID")\n\n'
        "from megascale import hear  # HEAR 2021's interface: audio to embeddings\n\n"
        f'embeddings = hear.get_scene_embeddings(audio, hear.load_model("{place}"))\n'
        "```"
    )


def _scores(result: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {k: v for k, v in result.items() if isinstance(v, int | float | str) and k not in _NO_SCORES}
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in shown.items()]


def _config_text(config: dict[str, Any]) -> str:
    """Return what was computed as YAML; where things lay is left out, for cards are public."""
    kept = config
    if isinstance(config.get("checkpoint"), str):  # which gave the shape: the config's own was not used
        kept = _without(kept, "model")
    for place in _PLACES:
        kept = _without(kept, place)
    model = kept.get("model")
    if isinstance(model, dict) and model.get("init_from"):
        kept = kept | {"model": model | {"init_from": _first_weights(model["init_from"])}}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _without(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    """Return a copy without a key, which may lie in a section."""
    key, _, rest = dotted.partition(".")
    if not rest:
        return {name: value for name, value in tree.items() if name != key}
    inner = tree.get(key)
    return tree | {key: _without(inner, rest)} if isinstance(inner, dict) else tree


def _first_weights(init_from: str) -> str:
    """Return the id of a hub's repo as it is; of a folder only that it was one."""
    return init_from if is_repo_id(init_from.removeprefix("hf:")) else "hf:FOLDER"
