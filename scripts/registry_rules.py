"""What a rule of the registry gives: a release of groups, each a template of paths and what goes into it."""

Group = dict[str, object]
"""`path` with {layer}, {width} and {l0} in it, and the values of each: "0-25", "16k,65k"; `as`, what the names say in its
place; `below`, what the hub lists there; `except`, paths that are missing; and `site` and `kind`."""
Release = dict[str, object]
"""Name, family, repository, model and groups."""


def release(name: str, family: str, repo: str, model: str | None, groups: list[Group], *, kind: str = "sae") -> Release:
    """Returns a release whose groups have `kind` where they name none."""
    filled = [{"kind": kind, **group} for group in groups]
    return {"name": name, "family": family, "repo": repo, "model": model, "groups": filled}
