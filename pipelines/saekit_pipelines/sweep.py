"""Sweeps of a recipe: one table of `[train]` that stands for several SAEs."""

import itertools
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from saekit.errors import ConfigError

__all__ = ["SWEEP_KEY", "expand_sweeps"]

SWEEP_KEY = "sweep"
"""`[train.<name>] sweep = { "sae.k" = [16, 32], "training.lr" = [1e-4, 3e-4] }`: an SAE for each combination."""
SECTIONS = ("sae", "training")

Table = dict[str, Any]


def expand_sweeps(values: Mapping[str, Any], *, fields: Mapping[str, frozenset[str]]) -> Table:
    """Returns a recipe's values with each swept table of `[train]` replaced by one table a combination.

    `[train.topk]` with `sweep = {k = [16, 32]}` becomes `[train.topk-k16]` and `[train.topk-k32]`. A key is a field of `sae` or
    of `training`, with the table before it where both have one of its name: `training.lr`.

    Args:
        values: the recipe's table.
        fields: names of the fields of `sae` and of `training`.

    Raises:
        ConfigError: a sweep without values, of an unknown field, of a field that is set as well, or one that gives two SAEs
            one name.
    """
    if not isinstance(values.get("train"), dict):
        return dict(values)
    runs: Table = {}
    for name, run in values["train"].items():
        made = _combinations(name, run, fields) if isinstance(run, dict) and SWEEP_KEY in run else {name: run}
        for swept, table in made.items():
            if swept in runs:
                raise ConfigError(
                    f"train.{name}.{SWEEP_KEY}: gives a second SAE called {swept!r}, needs different names"
                )
            runs[swept] = table
    return {**values, "train": runs}


def _combinations(name: str, run: Table, fields: Mapping[str, frozenset[str]]) -> dict[str, Table]:
    where = f"train.{name}.{SWEEP_KEY}"
    sweep = run[SWEEP_KEY]
    if not isinstance(sweep, dict) or not sweep:
        raise ConfigError(f"{where}: found {sweep!r}, needs a table of lists, e.g. {{ k = [16, 32, 64] }}")
    axes = []
    for key, choices in sweep.items():
        path = _path(where, key, run, fields)
        if not isinstance(choices, list) or not choices or any(isinstance(c, dict | list) for c in choices):
            raise ConfigError(f"{where}.{key}: found {choices!r}, needs a list of values")
        axes.append([(path, choice) for choice in choices])
    made: dict[str, Table] = {}
    for combination in itertools.product(*axes):
        table = deepcopy({key: value for key, value in run.items() if key != SWEEP_KEY})
        for (section, field), choice in combination:
            table.setdefault(section, {})[field] = choice
        swept = "-".join([name, *(f"{field}{choice}" for (_, field), choice in combination)])
        if swept in made:
            raise ConfigError(f"{where}: gives a second SAE called {swept!r}, needs different values")
        made[swept] = table
    return made


def _path(where: str, key: str, run: Table, fields: Mapping[str, frozenset[str]]) -> tuple[str, str]:
    """Returns the section and the field that a key of a sweep names."""
    section, dot, field = key.partition(".")
    found = [(s, key) for s in SECTIONS if key in fields[s]] if not dot else [(section, field)]
    known = [(s, f) for s, f in found if s in SECTIONS and f in fields[s]]
    if len(known) != 1:
        needs = " or ".join(f"'{s}.{key}'" for s, _ in known) or "a field of sae or training, e.g. k or lr"
        raise ConfigError(f"{where}: found key {key!r}, needs {needs}")
    section, field = known[0]
    if isinstance(run.get(section), dict) and field in run[section]:
        raise ConfigError(f"{where}.{key}: {section}.{field} is set as well, needs one of both")
    return section, field
