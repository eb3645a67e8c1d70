"""The known releases: names that stand for places on the hub, and what can be said of each without asking it."""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

__all__ = ["Entry", "known_entries", "known_names", "known_repos", "place_of", "width_of"]

_WIDTHS = {
    "4k": 4096,
    "16k": 16_384,
    "32k": 32_768,
    "64k": 65_536,
    "65k": 65_536,
    "80k": 81_920,
    "131k": 131_072,
    "262k": 262_144,
    "524k": 524_288,
    "1m": 1_048_576,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One known dictionary, or a folder of several that only the hub can list."""

    name: str
    """What `load_sae` takes: the release, and the place in it."""
    family: str
    """Whose release it is, e.g. `gemma-scope`."""
    ref: str
    """`owner/repo:sub/path`."""
    model: str | None
    """The language model, as the hub names it."""
    kind: str
    """`sae`, `transcoder`, `clt` or `crosscoder`."""
    site: str
    """Where it reads: resid_pre, resid_mid, resid_post, attn_z, attn_out, mlp_out, mlp, embed, or `any`."""
    layer: int | None
    """Layer of the model; None for several or where the names do not tell."""
    width: str | None
    """Features, as the release writes it: `16k`, `24576`; None where it does not."""
    l0: str | None
    """Active features a token, as the release writes it: a number, or small, medium, big; None where it does not."""
    below: str | None
    """What the names of the dictionaries in this folder look like; None: this is one dictionary."""

    def to_dict(self) -> dict[str, object]:
        """Returns the fields by name, the width also as a number."""
        fields: dict[str, object] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"d_sae": width_of(self.width)}


def width_of(text: str | None) -> int | None:
    """Returns the number that a width stands for: `16k` is 16384; None for what is none."""
    if text is None:
        return None
    plain = text.lower().replace("_", "").replace(",", "")
    return int(plain) if plain.isdigit() else _WIDTHS.get(plain)


def known_entries(
    *,
    model: str | None = None,
    family: str | None = None,
    site: str | None = None,
    width: str | None = None,
    l0: str | None = None,
) -> Iterator[Entry]:
    """Yields the known dictionaries that fit, in the order of their releases.

    Args:
        model: part of the model's name, upper or lower case, `-`, `_` and `.` alike.
        family: part of the family's or the release's name.
        site: part of the site's name.
        width: `16k` or `16384`.
        l0: `small`, `82`.
    """
    features = width_of(width)
    for entry in _entries():
        if (
            (model is None or _plain(model) in _plain(entry.model or ""))
            and (family is None or _plain(family) in _plain(f"{entry.family} {entry.name.split('/')[0]}"))
            and (site is None or site.lower() in entry.site)
            and (width is None or (features is not None and features == width_of(entry.width)))
            and (l0 is None or l0.lower() == entry.l0)
        ):
            yield entry


def known_names() -> list[str]:
    """Returns the names of the releases."""
    return [str(release["name"]) for release in _releases()]


def known_repos() -> list[str]:
    """Returns the repositories of the releases, each once."""
    return list(dict.fromkeys(str(release["repo"]) for release in _releases()))


def place_of(name: str) -> str | None:
    """Returns `owner/repo:sub/path` of a known name, None for any other text.

    A release's name alone is its repository; what follows is a name that `known_entries` gives, or any path there.
    """
    head, _, rest = name.strip("/").partition("/")
    release = next((release for release in _releases() if release["name"] == head), None)
    if release is None or ":" in name or ".." in name:
        return None
    named = next((entry.ref for entry in _entries() if entry.name == f"{head}/{rest}"), None)
    if named is not None:
        return named
    return f"{release['repo']}:{rest}" if rest else str(release["repo"])


@functools.cache
def _releases() -> tuple[dict[str, object], ...]:
    text = resources.files("saekit.hub").joinpath("registry.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["releases"])


@functools.cache
def _entries() -> tuple[Entry, ...]:
    return tuple(entry for release in _releases() for entry in _expanded(release))


def _expanded(release: dict[str, object]) -> Iterator[Entry]:
    groups = release["groups"]
    assert isinstance(groups, list)
    for group in groups:
        axes = {axis: _values(group[axis]) for axis in ("layer", "width", "l0") if axis in group}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            path = group["path"].format(**chosen)
            if path in group.get("except", ()):
                continue
            shown = group["as"].format(**chosen) if "as" in group else path
            yield Entry(
                name=f"{release['name']}/{shown}".rstrip("/"),
                family=str(release["family"]),
                ref=f"{release['repo']}:{path}".rstrip(":"),
                model=None if release["model"] is None else str(release["model"]),
                kind=group["kind"],
                site=group["site"],
                layer=int(chosen["layer"]) if "layer" in chosen else None,
                width=chosen.get("width"),
                l0=chosen.get("l0"),
                below=group.get("below"),
            )


def _values(text: str) -> list[str]:
    """Returns `0-2` as 0, 1, 2, and `16k,65k` as both."""
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found:
        return [str(number) for number in range(int(found.group(1)), int(found.group(2)) + 1)]
    return text.split(",")


def _plain(text: str) -> str:
    return re.sub(r"[-_.]", "", text.lower())
