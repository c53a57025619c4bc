"""Config: what a user writes becomes a typed value, or one line that says what to change."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from megascale.config import Section, describe_keys, dump_config, load_config
from megascale.downstream.table1_config import Table1Config
from megascale.downstream.watch import WatchConfig
from megascale.errors import ConfigError
from megascale.tokenize.plan import TokenizeConfig

RECIPES = Path(__file__).parents[2] / "configs"
TOKENIZE = ["source.kind=files", "source.url=corpus", "codec.weights=calibrate", "output.url=tokens"]
TABLE1 = [
    "data.gtzan=a",
    "data.nsynth=b",
    "data.music_speech=c",
    "checkpoints.1k5=run-1k5",
    "checkpoints.12k=run-12k",
    "output.url=out",
]


class OptimConfig(Section):
    lr: float = Field(1e-3, gt=0, description="learning rate")
    betas: list[float] = Field([0.9, 0.95], min_length=2, max_length=2, description="moments")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="shape over time")


class ModelConfig(Section):
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    layers: int = Field(description="depth")
    name: str | None = Field(None, description="what to call it")
    tied: bool = Field(False, description="share weights")


class TrainConfig(Section):
    model: ModelConfig = Field(description="the model")
    steps: int = Field(100, ge=1, description="updates")


def load(*overrides: str, path: Path | None = None) -> TrainConfig:
    return load_config(TrainConfig, "train", None if path is None else str(path), ["model.layers=2", *overrides])


def message(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as failure:
        load(*overrides, path=path)
    text = str(failure.value)
    assert "\n" not in text, "a user's mistake is told in one line"
    return text


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return names


def test_override_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = recipe(tmp_path, "steps: 7\nmodel:\n  layers: 3\n  optim: {lr: 0.5}\n")
    config = load_config(TrainConfig, "train", str(path), ["model.optim.lr=0.25"])
    assert (config.steps, config.model.layers, config.model.optim.lr) == (7, 3, 0.25)
    assert config.model.optim.schedule == "cosine"


def test_path_with_a_number_sign_is_kept_whole():
    config = load_config(TokenizeConfig, "tokenize", None, [*TOKENIZE, "output.url=/x/take #2"])
    assert config.output.url == "/x/take #2"


def test_later_override_wins():
    assert load("steps=5", "steps=6").steps == 6


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("model.optim.lr=3e-4", lambda c: c.model.optim.lr, 3e-4),  # YAML 1.1 reads 3e-4 as text
        ("model.optim.lr=1E-05", lambda c: c.model.optim.lr, 1e-5),
        ("model.optim.lr=1", lambda c: c.model.optim.lr, 1.0),
        ("model.optim.betas=[0.8, 9e-1]", lambda c: c.model.optim.betas, [0.8, 0.9]),
        ("model.layers=12", lambda c: c.model.layers, 12),
        ("model.tied=true", lambda c: c.model.tied, True),
        ("model.name=null", lambda c: c.model.name, None),
        ("model.name=", lambda c: c.model.name, None),
        ("model.name=s3://bucket/run=1", lambda c: c.model.name, "s3://bucket/run=1"),
        ("model.name='12'", lambda c: c.model.name, "12"),
        ("model.optim={lr: 0.125}", lambda c: c.model.optim.lr, 0.125),
    ],
)
def test_override_text_becomes_the_type_of_its_key(override, read, value):
    got = read(load(override))
    assert got == value
    assert type(got) is type(value)


def test_float_in_a_file_may_be_written_with_an_exponent_alone(tmp_path):
    assert load(path=recipe(tmp_path, "model: {optim: {lr: 3e-4}}")).model.optim.lr == 3e-4


def test_unknown_key_names_the_nearest():
    assert message("model.optim.lrr=3e-4") == "train.model.optim.lrr=3e-4: unknown key; did you mean 'lr'?"
    assert message("stepz=3") == "train.stepz=3: unknown key; did you mean 'steps'?"


def test_unknown_key_in_a_file_names_the_nearest(tmp_path):
    text = message(path=recipe(tmp_path, "model:\n  optim:\n    shedule: cosine\n"))
    assert text == "train.model.optim.shedule=cosine: unknown key; did you mean 'schedule'?"


def test_unknown_key_like_no_other_lists_the_known_ones_of_its_section():
    assert message("model.optim.zzzz=1") == "train.model.optim.zzzz=1: unknown key; known keys: lr, betas, schedule"


def test_unknown_key_of_a_job_names_the_nearest_at_each_level():
    for override, hint in [
        ("codec.weigths=x", "'weights'"),
        ("source.knd=x", "'kind'"),
        ("workrs.count=1", "'workers'"),
    ]:
        with pytest.raises(ConfigError, match=f"unknown key; did you mean {hint}"):
            load_config(TokenizeConfig, "tokenize", None, [*TOKENIZE, override])


def test_bad_choice_names_the_nearest():
    text = message("model.optim.schedule=cosin")
    assert text.startswith("train.model.optim.schedule='cosin': ")
    assert text.endswith("; did you mean 'cosine'?")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("model.layers=many", "train.model.layers='many': "),
        ("model.layers=2.5", "train.model.layers=2.5: "),
        ("steps=0", "train.steps=0: "),
        ("model.optim.lr=-1", "train.model.optim.lr=-1: "),
        ("model.optim.lr=.inf", "train.model.optim.lr=inf: "),
        ("model.optim.lr=.nan", "train.model.optim.lr=nan: "),
        ("model.optim.betas=[0.9]", "train.model.optim.betas=[0.9]: "),
        ("model.optim.betas=[0.9, x]", "train.model.optim.betas.1='x': "),
        ("model.name=[1]", "train.model.name=[1]: "),
    ],
)
def test_bad_value_names_its_key_and_the_value(override, start):
    assert message(override).startswith(start)


def test_missing_required_key_is_named():
    with pytest.raises(ConfigError) as failure:
        load_config(TrainConfig, "train", None, ["model.tied=true"])
    assert str(failure.value) == "train.model.layers: required, and not set"


def test_error_of_a_whole_section_names_what_contradicts():
    with pytest.raises(ConfigError, match=r"source\.audio_url is required for source\.kind=audioset"):
        load_config(TokenizeConfig, "tokenize", None, [*TOKENIZE, "source.kind=audioset"])


@pytest.mark.parametrize("override", ["steps", "=5", "--steps"])
def test_override_without_key_or_value_is_refused(override):
    assert message(override) == f"{override}: an override reads dotted.key=value"


def test_override_inside_a_value_is_refused():
    assert message("model.layers.x=1") == "model.layers.x=1: 'layers' is a value, not a section"


@pytest.mark.parametrize("value", ["[1", "{a: ", "'open", "2024-13-45", "a\x01b"])
def test_override_that_is_not_yaml_is_refused(value):
    assert f"model.name={value}" in message(f"model.name={value}")


def test_broken_yaml_names_the_file_and_the_line(tmp_path):
    path = recipe(tmp_path, "steps: 1\nmodel:\n  layers: 2\n bad: [\n")
    text = message(path=path)
    assert text.startswith(f"{path}: not valid YAML at line 4: ")


@pytest.mark.parametrize(
    "text", ["model: {name: 2024-13-45}", "steps: 1\x01", "? [a]\n: 1", "model: !!python/name:os.system"]
)
def test_text_that_yaml_cannot_read_names_the_file(tmp_path, text):
    path = recipe(tmp_path, text)
    assert message(path=path).startswith(f"{path}: not valid YAML")


@pytest.mark.parametrize(("text", "kind"), [("- a", "list"), ("hello", "str"), ("3", "int")])
def test_file_that_is_no_mapping_is_refused(tmp_path, text, kind):
    path = recipe(tmp_path, text)
    assert message(path=path) == f"{path}: a config is a mapping of keys to values, this is a {kind}"


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    assert message(path=path) == f"{path}: cannot read this config: No such file or directory"


def test_folder_or_binary_file_as_config_is_refused(tmp_path):
    assert message(path=tmp_path) == f"{tmp_path}: cannot read this config: Is a directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert message(path=binary) == f"{binary}: cannot read this config: not UTF-8 text"


def test_empty_file_is_the_defaults(tmp_path):
    assert load(path=recipe(tmp_path, "# nothing yet\n")) == load()


def test_section_left_empty_in_a_file_is_its_defaults(tmp_path):
    # all lines of a section commented out leave `model:` with nothing under it
    assert load("model.layers=2", path=recipe(tmp_path, "model:\n  # layers: 4\n")) == load()


def test_key_of_a_section_leaves_the_other_defaults_its_job_gives_it(tmp_path):
    overrides = [*TABLE1, "tasks.gtzan.protocol=stratified"]
    tasks = load_config(Table1Config, "table1", None, overrides).tasks
    assert (tasks.gtzan.label, tasks.gtzan.protocol, tasks.nsynth.protocol) == ("genre", "stratified", "official")
    empty = recipe(tmp_path, "tasks: {nsynth:, gtzan: {protocol: stratified}}")
    assert load_config(Table1Config, "table1", str(empty), TABLE1).tasks == tasks


def test_override_changes_no_other_key_that_shares_a_yaml_anchor(tmp_path):
    class Pair(Section):
        a: OptimConfig = Field(description="one")
        b: OptimConfig = Field(description="other")

    path = recipe(tmp_path, "a: &same {lr: 0.5}\nb: *same\n")
    pair = load_config(Pair, "pair", str(path), ["a.lr=0.25"])
    assert (pair.a.lr, pair.b.lr) == (0.25, 0.5)


def test_resolved_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("schema", "overrides"),
    [
        (TokenizeConfig, TOKENIZE),
        (TokenizeConfig, [*TOKENIZE, "clips.seconds=null", "codec.bitrate_kbps=1.5", "quarantine.max_share=3e-4"]),
        (TokenizeConfig, [*TOKENIZE, "source.url='2024'", "output.url='é: #\"1e-3'", "storage.endpoint_url='null'"]),
        (Table1Config, TABLE1),
        (Table1Config, [*TABLE1, "cells.lrs=[3e-5]", "cells.finetune={train: {epochs: 2}}", "seeds=[0, 1, 2]"]),
    ],
)
def test_dumped_config_loads_back_equal(tmp_path, schema, overrides):
    config = load_config(schema, "job", None, overrides)
    path = recipe(tmp_path, dump_config(config))
    assert load_config(schema, "job", str(path)) == config


@pytest.mark.parametrize(
    "path", [path for job in ("tokenize", "table1", "watch") for path in sorted(RECIPES.glob(f"{job}/*.yaml"))], ids=str
)
def test_recipe_in_the_repository_is_valid(path):
    schemas = {"tokenize": TokenizeConfig, "table1": Table1Config, "watch": WatchConfig}
    config = load_config(schemas[path.parent.name], path.parent.name, str(path))
    assert yaml.safe_load(dump_config(config))["output"]["url"]


def test_sections_that_the_user_names_are_told_and_checked_like_others():
    assert "  tasks.NAME.url " in describe_keys(WatchConfig)
    mine = ["tasks.mine.url=t", "tasks.mine.urll=t", "tasks.mine.task.label=l"]
    with pytest.raises(ConfigError, match=r"^watch\.tasks\.mine\.urll=t: unknown key; did you mean 'url'\?$"):
        load_config(WatchConfig, "watch", None, ["run=r", "output.url=o", *mine])


def test_key_that_python_cannot_spell_is_written_by_its_alias():
    config = load_config(Table1Config, "table1", None, TABLE1)
    assert (config.checkpoints.kbps_1k5, config.checkpoints.kbps_12k) == ("run-1k5", "run-12k")
    assert yaml.safe_load(dump_config(config))["checkpoints"] == {"1k5": "run-1k5", "12k": "run-12k"}


def test_errors_spell_an_aliased_key_as_the_user_does():
    with pytest.raises(ConfigError) as failure:
        load_config(Table1Config, "table1", None, [o for o in TABLE1 if "1k5" not in o])
    assert str(failure.value) == "table1.checkpoints.1k5: required, and not set"
    with pytest.raises(ConfigError, match=r"table1\.checkpoints\.1k6=x: unknown key; did you mean '1k5'\?"):
        load_config(Table1Config, "table1", None, [*TABLE1, "checkpoints.1k6=x"])


@pytest.mark.parametrize(
    ("schema", "overrides"),
    [(TokenizeConfig, TOKENIZE), (Table1Config, [*TABLE1, "further.NAME.1k5=a", "further.NAME.12k=b"])],
)
def test_help_has_every_key_with_type_default_and_meaning(schema, overrides):
    lines = describe_keys(schema).splitlines()
    heads, meanings = lines[0::2], lines[1::2]
    assert all(meaning.strip() for meaning in meanings)
    assert all(" default " in head for head in heads)
    tree = yaml.safe_load(dump_config(load_config(schema, "job", None, overrides)))
    assert sorted(head.split()[0] for head in heads) == sorted(leaves(tree))


def test_help_tells_required_keys_defaults_and_choices():
    by_name = {line.split()[0]: line for line in describe_keys(TrainConfig).splitlines()[0::2]}
    assert by_name["model.layers"].split() == ["model.layers", "int", "default", "(required)"]
    assert by_name["model.name"].split() == ["model.name", "str", "|", "null", "default", "None"]
    assert by_name["steps"].split() == ["steps", "int", "default", "100"]
    choices = ["model.optim.schedule", "cosine", "|", "constant", "default", "'cosine'"]
    assert by_name["model.optim.schedule"].split() == choices
    assert "\n      learning rate\n" in describe_keys(TrainConfig)


def test_help_shows_the_defaults_a_job_gives_a_shared_section():
    help_text = describe_keys(Table1Config)
    labels = [line.split()[-1] for line in help_text.splitlines() if line.split()[0].endswith(".label")]
    assert labels == ["'genre'", "'instrument_family_str'", "'class'"]


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("source.url", "https://me:hunter2@host/audio"),
        ("source.url", "s3://me:hunter2@bucket/audio"),
        ("storage.endpoint_url", "http://hunter2@host:9000"),
        ("output.url", "https://host/tokens?X-Amz-Signature=hunter2"),
        ("codec.weights", "https://host/c.th?sv=1&sig=hunter2"),
    ],
)
def test_url_with_credentials_is_refused_and_not_repeated(key, url):
    with pytest.raises(ConfigError, match=f"^tokenize.{key}: a URL with credentials in it") as failure:
        load_config(TokenizeConfig, "tokenize", None, [*TOKENIZE, f"{key}={url}"])
    assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a@b:c/x.wav", "abfs://container@account.dfs.core.windows.net/x", "sftp://me@host/x", "/data/a:b@c"],
)
def test_url_without_credentials_passes(url):
    assert load_config(TokenizeConfig, "tokenize", None, [*TOKENIZE, f"source.url={url}"]).source.url == url
