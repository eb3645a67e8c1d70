"""Configs: one clear line for every mistake, TOML overrides, canonical hashes."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from saekit.config import Config, apply_overrides, changed_keys, config_sha256, read_toml
from saekit.errors import ConfigError


class Inner(Config):
    width: int = 4


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = 1.0


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Outer(Config):
    name: str
    num_tokens: int = Field(1, gt=0)
    inner: Inner = Inner()
    shape: Annotated[Square | Circle, Field(discriminator="kind")] = Square()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "num_token": 3}, "recipe: unknown key 'num_token'; did you mean 'num_tokens'?"),
        ({"name": "a", "inner": {"widht": 3}}, "recipe: unknown key 'inner.widht'; did you mean 'width'?"),
        ({"name": "a", "zzz": 3}, "recipe: unknown key 'zzz'; known keys: inner, name, num_tokens, shape"),
        (
            {"name": "a", "shape": {"kind": "circle", "radus": 3}},
            "recipe: unknown key 'shape.radus'; did you mean 'radius'?",
        ),
        (
            {"name": "a", "shape": {"kind": "cirle"}},
            "recipe: shape: unknown kind 'cirle', needs one of 'square', 'circle'",
        ),
        ({"name": "a", "shape": {"side": 2}}, "recipe: shape: no 'kind', needs one of 'circle', 'square'"),
        ({}, "recipe: missing key 'name'"),
        ({"name": "a", "num_tokens": True}, "recipe: num_tokens: found True, input should be a valid integer"),
        ({"name": "a", "num_tokens": "64"}, "recipe: num_tokens: found '64', input should be a valid integer"),
        (
            {"name": datetime.date(2024, 1, 1), "num_tokens": datetime.date(2024, 1, 1)},
            "recipe: num_tokens: found '2024-01-01'",
        ),
        ({"name": "a", "shape": {"kind": "square", "side": float("inf")}}, "recipe: shape.side: "),
        ({"name": "a", "num_tokens": "many"}, "recipe: num_tokens: found 'many', input should be a valid integer"),
        ({"name": "a", "num_tokens": 0}, "recipe: num_tokens: found 0, input should be greater than 0"),
    ],
)
def test_parse_names_key_found_and_needed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.parse(values, where="recipe")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_parse_counts_further_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"and 1 more"):
        Outer.parse({"name": "a", "x": 1, "y": 2})


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer(name="a").name = "b"  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=3", {"a": {"b": 3, "c": 2}}),
        ("a.b=1e-3", {"a": {"b": 1e-3, "c": 2}}),
        ("a.b=true", {"a": {"b": True, "c": 2}}),
        ('a.b=["x", "y"]', {"a": {"b": ["x", "y"], "c": 2}}),
        ("a.b=plain text/path=1", {"a": {"b": "plain text/path=1", "c": 2}}),
        ("n.m=1", {"a": {"b": 1, "c": 2}, "n": {"m": 1}}),
    ],
)
def test_apply_overrides_sets_one_value_and_copies(override: str, expected: dict[str, object]) -> None:
    table = {"a": {"b": 1, "c": 2}}
    assert apply_overrides(table, [override]) == expected
    assert table == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("override", "message"), [("a.b", "no '='"), ("=3", "no '='"), ("a.b.c=3", "'b' is a value, not a table")]
)
def test_apply_overrides_refuses(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"a": {"b": 1}}, [override])


def test_sha256_ignores_key_order_but_not_values() -> None:
    one = config_sha256({"a": 1, "b": {"c": 2, "d": 3}})
    assert one == config_sha256({"b": {"d": 3, "c": 2}, "a": 1})
    assert one != config_sha256({"a": 1, "b": {"c": 2, "d": 4}})


def test_changed_keys_names_leaves() -> None:
    changed = changed_keys({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}})
    assert changed == {"b.c": (2, 3), "b.d": (None, 4)}


def test_an_option_that_is_off_differs_from_none_that_is_on_only() -> None:
    assert changed_keys({"a": 1}, {"a": 1, "new": None}) == {}
    assert changed_keys({"a": 1, "new": 2}, {"a": 1, "new": None}) == {"new": (2, None)}
    assert changed_keys({"table": None}, {"table": {"x": 1}}) == {"table.x": (None, 1)}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"a = ", "not valid TOML"), (b'a = "\xff"', "cannot be read")]
)
def test_read_toml_refuses(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_toml(path)
