"""JSON and YAML read so that nothing in them is ambiguous, too deep, or more than it seems."""

import json
from collections.abc import Iterable

import yaml

__all__ = ["parse_json", "parse_yaml", "printable"]


def parse_json(text: str | bytes) -> object:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is no JSON, names a key twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_yaml(text: str) -> object:
    """Returns the value of a YAML text of plain values.

    Raises:
        ValueError: it is no YAML, asks for an object, holds an alias, names a key twice, or is nested too deeply.
    """
    try:
        # A few nested aliases can stand for more text than fits the memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("holds an alias, needs every value written out")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def printable(names: Iterable[str], most: int = 12) -> str:
    """Returns names that a file chose, for one line of a message: what a terminal would act on is escaped."""
    listed = [name if name.isprintable() and len(name) < 100 else repr(name[:100]) for name in sorted(names)]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"names {twice!r} twice")
    return found


def _check_keys(root: yaml.Node | None) -> None:
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            nodes += [value for _, value in node.value]
