"""YAML to typed, validated config: dotted overrides, errors that name the key, help text, a dump of what was resolved.

Each part of the package declares its own section as a `Section`; a job's schema is a `Section` of sections. Only this
file knows how text becomes a config.
"""

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from megascale.errors import ConfigError


class Section(BaseModel):
    """One block of a config. Unknown keys are refused, values are frozen, and every field carries a description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )


S = TypeVar("S", bound=Section)

# a bare name before the @ is a secret in http(s) alone: Azure's abfs://container@account and sftp://user@host have one
_CREDENTIALS = re.compile(
    r"://[^/?#@]*:[^/?#@]*@|^https?://[^/?#]*@|[?&](X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|Signature|sig)=",
    re.IGNORECASE,
)


def load_config(schema: type[S], job: str, path: str | None, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file, apply `dotted.key=value` overrides, and validate the result against `schema`.

    Args:
        schema: the job's config class.
        job: the job's name; error messages begin with it.
        path: the YAML file, or None for defaults and overrides alone.
        overrides: each `dotted.key=value`; the value is read as YAML.

    Raises:
        ConfigError: missing file, broken YAML, unknown key, or bad value; one line that names it.
    """
    tree = _read_yaml(path) if path is not None else {}
    for override in overrides:
        tree = _with_override(tree, override)
    return validate(schema, job, tree)


def validate(schema: type[S], job: str, tree: dict[str, Any]) -> S:
    """Build `schema` from a tree of plain values. Raises ConfigError naming the first offending key."""
    _refuse_credentials(job, tree)
    try:
        return schema.model_validate(_fill(schema, tree, {}))
    except ValidationError as failure:
        raise ConfigError(_explain(schema, job, failure)) from None


def has_credentials(url: str) -> bool:
    """Return whether a URL carries a password, or a signature that is as good as one."""
    return _CREDENTIALS.search(url) is not None


def dump_config(config: Section) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_keys(schema: type[Section]) -> str:
    """Return one line per key (dotted name, type, default, meaning): the body of a job's `--help`."""
    return "\n".join(
        f"  {name:<28} {kind:<30} default {default}\n      {meaning}" for name, kind, default, meaning in _walk(schema)
    )


def _refuse_credentials(where: str, value: Any) -> None:
    """Raise ConfigError, without the value, if a string in the tree is a URL with credentials: outputs hold the config."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_credentials(f"{where}.{key}", inner)
    elif isinstance(value, str) and has_credentials(value):
        raise ConfigError(
            f"{where}: a URL with credentials in it, which would stand in every output; leave them to the store's own "
            "chain (environment, credentials file, role)"
        )


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read this config: {reason}") from None
    try:
        tree = _parse(text)
    except ValueError as failure:
        raise ConfigError(f"{path}: not valid YAML{failure}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this is a {type(tree).__name__}")
    return tree


def _parse(text: str) -> Any:
    """Read YAML. Raises ValueError, whose message tells in one line where the text is wrong, and how."""
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as failure:
        where = f" at line {failure.problem_mark.line + 1}" if failure.problem_mark is not None else ""
        raise ValueError(f"{where}: {failure.problem}") from None
    except Exception as failure:  # what its constructors raise comes through: a date that does not exist, `!!int x`
        raise ValueError(f": {(str(failure) or type(failure).__name__).splitlines()[0]}") from None


def _with_override(tree: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override}: an override reads dotted.key=value")
    try:
        value = _parse(text)
    except ValueError:
        raise ConfigError(f"{override}: the value is not valid YAML; quote it") from None
    if isinstance(value, str) and text.strip()[:1] not in ("'", '"'):
        value = text.strip()  # YAML would take what follows ` #` in a path for a comment
    return _replaced(tree, name.split("."), value, override)


def _replaced(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    """Return a copy with one value replaced; the tree itself may stand at several keys, by a YAML anchor."""
    key, *rest = keys
    if rest:
        child = tree.get(key) or {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override}: {key!r} is a value, not a section")
        value = _replaced(child, rest, value, override)
    return {**tree, key: value}


def _fill(schema: type[Section], given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Put a section's given keys over the defaults its job gives it; a section left empty is all defaults."""
    tree = {**defaults, **given}
    for field_name, field in schema.model_fields.items():
        name = field.alias or field_name
        inner = _inner_section(field.annotation)
        if inner is None or name not in given or not isinstance(given[name], dict | None):
            continue
        own = field.default.model_dump() if isinstance(field.default, Section) else {}
        tree[name] = _fill(inner, given[name] or {}, defaults.get(name, own))
    return tree


def _explain(schema: type[Section], job: str, failure: ValidationError) -> str:
    first = failure.errors()[0]
    keys = [str(key) for key in first["loc"]]
    where = ".".join([job, *keys])
    if first["type"] == "extra_forbidden":
        fields = _section_at(schema, keys[:-1]).model_fields
        known = [field.alias or name for name, field in fields.items()]
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
        return f"{where}={first['input']}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{where}: required, and not set"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{where}: {message}"
    hint = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        choices = [choice.strip(" '") for choice in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(first["input"], choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}={first['input']!r}: {message}{hint}"


def _section_at(schema: type[Section], keys: Sequence[str]) -> type[Section]:
    for key in keys:
        if key in schema.model_fields:
            annotation = schema.model_fields[key].annotation
            schema = _inner_section(annotation) or _named_section(annotation) or schema
    return schema


def _named_section(annotation: Any) -> type[Section] | None:
    """Return the section of a mapping from names that the user chooses."""
    return _inner_section(typing.get_args(annotation)[1]) if typing.get_origin(annotation) is dict else None


def _inner_section(annotation: Any) -> type[Section] | None:
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _walk(schema: type[Section], prefix: str = "", defaults: Section | None = None) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for field_name, field in schema.model_fields.items():
        name = field.alias or field_name
        required = field.default is PydanticUndefined and field.default_factory is None
        value = getattr(defaults, field_name) if defaults is not None else None if required else field.get_default()
        inner, named = _inner_section(field.annotation), _named_section(field.annotation)
        if inner is not None:
            rows += _walk(inner, f"{prefix}{name}.", value)
            continue
        if named is not None:
            rows += _walk(named, f"{prefix}{name}.NAME.")
            continue
        assert field.description, f"{schema.__name__}.{name} has no description; --help needs one"
        default = "(required)" if required and defaults is None else repr(value)
        rows.append((prefix + name, _type_name(field.annotation), default, field.description))
    return rows


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if _is_union(annotation):
        return " | ".join(_type_name(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    return str(annotation) if typing.get_origin(annotation) else annotation.__name__
