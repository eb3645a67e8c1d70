"""Configs: frozen pydantic models read from TOML, changed by `key=value`, hashed for manifests."""

import copy
import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from saekit.errors import ConfigError

__all__ = ["Config", "apply_overrides", "changed_keys", "config_sha256", "read_toml"]


class Config(BaseModel):
    """Base of every config: immutable, no unknown keys, each field described by the string under it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def parse(cls, values: Mapping[str, object], *, where: str = "config") -> Self:
        """Returns a checked config.

        Raises:
            ConfigError: one line that names the key, what was found, what is needed, and the nearest known key.
        """
        try:
            # As JSON and strict: `k = true` is no 1, and `d_sae = "64"` no 64, but a list may stand for a tuple.
            return cls.model_validate_json(json.dumps(dict(values), default=_plain), strict=True)
        except ValidationError as error:
            raise ConfigError(_one_line(cls, error, where)) from error

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values, defaults included."""
        return self.model_dump(mode="json")


def _plain(value: object) -> object:
    """What JSON has no form for: configs as tables, dates and the like as text."""
    return value.to_dict() if isinstance(value, Config) else str(value)


def _one_line(cls: type[Config], error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(_written_path(cls, path))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}{hint}{more}"
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        context = first.get("ctx", {})
        found = f"unknown kind {context.get('tag')!r}" if "tag" in context else "no 'kind'"
        expected = context.get("expected_tags") or ", ".join(_tags(cls, path))
        return f"{where}: {key}: {found}, needs one of {expected}{more}"
    if first["type"] == "missing":
        return f"{where}: missing key {key!r}{more}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key:
        return f"{where}: {message}{more}"
    return f"{where}: {key}: found {first['input']!r}, {message}{more}"


def _models_in(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _written_path(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Returns a location as it stands in the file: without the tags of discriminated unions that pydantic puts in."""
    models: list[type[BaseModel]] = [cls]
    written = []
    for part in path:
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        if any(part in model.model_fields for model in models) or not tagged:
            written.append(part)
        models = inner or tagged or models
    return written


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    models: list[type[BaseModel]] = [cls]
    for part in path:
        inner = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
        if inner:
            models = inner
            continue
        # Inside a discriminated union the location holds the tag of the chosen member, not a field name.
        tagged = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        models = tagged or models
    return sorted({name for model in models for name in model.model_fields})


def _tags(cls: type[BaseModel], path: list[str]) -> list[str]:
    models: list[type[BaseModel]] = [cls]
    for part in path:
        models = [
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        ]
    return sorted(repr(m.model_fields["kind"].default) for m in models if "kind" in m.model_fields)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Returns the table in a TOML file.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {str(path)!r}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r}: cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {str(path)!r}: not valid TOML: {error}") from error


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of `table` with each `dotted.key=value` set.

    The value is read as TOML (`3`, `1e-3`, `true`, `["a", "b"]`, `"quoted"`); what is not TOML is taken as a plain string,
    so that `train.sae.kind=jumprelu` needs no quotes inside quotes.

    Raises:
        ConfigError: an override without `=`, or one that reaches through a value that is not a table.
    """
    result: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r}: no '=', needs the form key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, last = key.strip().split(".")
        table_at = result
        for part in parents:
            table_at = table_at.setdefault(part, {})
            if not isinstance(table_at, dict):
                raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
        table_at[last] = value
    return result


def config_sha256(config: Config | Mapping[str, object]) -> str:
    """Returns the sha256 of a config's canonical JSON (sorted keys, defaults included)."""
    values = config.to_dict() if isinstance(config, Config) else dict(config)
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def changed_keys(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Returns `dotted.key -> (old value, new value)` for every leaf that differs.

    A leaf on one side only is None on the other: folders stay usable when a later version brings an option that is off by default.
    """
    before, after = _leaves(old), _leaves(new)
    pairs = {key: (before.get(key), after.get(key)) for key in sorted(before.keys() | after.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
