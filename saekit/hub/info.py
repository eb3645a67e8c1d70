"""What a dictionary is, from its config and the headers of its files: no weight is read or downloaded."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from saekit.errors import FormatError
from saekit.hub.discover import config_names, dictionaries
from saekit.hub.download import fetch
from saekit.hub.outline import file_sizes, open_outline
from saekit.hub.patience import patiently
from saekit.hub.place import Place, locate
from saekit.hub.release import Release, read_mapping
from saekit.hub.resolve import read_release, the_one
from saekit.hub.table import recognise
from saekit.progress import NO_PROGRESS
from saekit.sae.base import SAE, SAEConfig
from saekit.sae.checkpoint import CFG_NAME, AnySAEConfig
from saekit.sae.peer_surface import model_name
from saekit.sae.released import RELEASED_KINDS, build_released
from saekit.sae.site import Site
from saekit.sae.sites import SitesConfig

__all__ = ["DictionaryInfo", "dictionary_info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryInfo:
    """What is known of one dictionary without its weights; None where neither its files nor the hub say."""

    ref: str
    """What was asked for, as a place."""
    repo: str | None
    """Hub repository."""
    revision: str | None
    """Commit."""
    format: str
    """Whose files these are."""
    kind: str | None
    """`sae`, `transcoder`, `multilayer`, `temporal` or `lorsa`."""
    architecture: Mapping[str, object] | None
    """The nonlinearity and its figures."""
    d_in: int | None
    """Width of the input."""
    d_sae: int | None
    """Features; of one layer where there are several."""
    d_out: int | None
    """Width of the reconstruction."""
    num_layers: int | None
    """Layers that a multi-layer dictionary reads."""
    hook_point: str | list[str] | None
    """Where it reads, a module path in the Hugging Face model; one a layer where there are several."""
    hook_point_out: str | list[str] | None
    """Where the reconstruction belongs, if elsewhere."""
    transform: str | None
    """A step between the module and the input, such as a norm without its gain."""
    normalisation: str | None
    """What each token goes through first."""
    units: str | None
    """What the activations are measured in."""
    model: str | None
    """The language model."""
    licence: str | None
    """As the repository's card says it."""
    num_bytes: int
    """All weights files together."""
    files: Mapping[str, tuple[int, str | None]]
    """Weights files: bytes, and sha256 where the hub says it."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """dtype and shape of each tensor in the files."""

    def to_dict(self) -> dict[str, object]:
        """Returns the fields by name."""
        return asdict(self)


def dictionary_info(ref: str | Path, *, revision: str | None = None) -> DictionaryInfo:
    """Returns what can be said of a dictionary from its config and the headers of its files.

    On the hub the configs are downloaded, and of the weights a few kilobytes are read by ranges. The reader of the format
    runs on tensors without numbers, so that what is said here is what `load_sae` gives.

    Args:
        ref, revision: as in `load_sae`.

    Raises:
        FormatError: `ref` names nothing that can be read, several dictionaries, or files that are not what they claim.
    """
    place = locate(ref, revision)
    name = the_one(place)
    files = list(dictionaries(place.names)[name])
    configs = config_names(place.names, files)
    folder = place.folder
    if place.hub is not None:
        wanted = [(place.folder / config).as_posix() for config in configs]
        folder = fetch(*place.hub, wanted, NO_PROGRESS) / place.folder
    contents = {Path(config).name: read_mapping(folder / config) for config in configs}
    release = Release(
        folder=folder,
        files=tuple(files),
        configs=contents,
        ref=place.name_of(name),
        repo=place.repo,
        revision=place.revision,
        opener=functools.partial(open_outline, place),
    )
    sizes = file_sizes(place, files, folder)
    header = contents.get(CFG_NAME, {})
    is_own = header.get("format") == "saekit"
    tensors = {
        key: (entry.dtype, entry.shape) for file in files for key, entry in sorted(release.open(file).headers.items())
    }
    facts = _own_facts(header, release) if is_own else _facts(release)
    return DictionaryInfo(
        ref=release.ref,
        repo=place.repo,
        revision=place.revision,
        licence=_licence(place, folder),
        num_bytes=sum(size for size, _ in sizes.values()),
        files=sizes,
        tensors=tensors,
        **facts,  # type: ignore[arg-type]  # the fields that are not above, by name
    )


def _facts(release: Release) -> dict[str, object]:
    """Returns what the reader of the format makes of tensors without numbers."""
    try:
        # What a reader allocates has no numbers either.
        with torch.device("meta"):
            sae = read_release(release)
    except FormatError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        # The reader looks at numbers that are not here.
        record = {"configs": dict(release.configs), **release.values}
        return _described(None, None, {"format": recognise(release), "metadata": record})
    return _described(sae.cfg, sae, sae.source)


def _own_facts(header: Mapping[str, object], release: Release) -> dict[str, object]:
    """Returns what a folder of saekit's own says of itself."""
    source, values = header.get("source"), header.get("sae")
    record = {**(source if isinstance(source, dict) else {}), "format": "saekit"}
    if isinstance(values, dict) and values.get("kind") in RELEASED_KINDS:
        outlines = {name: entry.outline for name, entry in release.weights.headers.items()}
        sae = build_released(header, outlines, where=repr(release.ref))
        return _described(sae.cfg, sae, record)
    try:
        cfg: SAEConfig = TypeAdapter(AnySAEConfig).validate_python(values)
    except ValidationError as error:
        raise FormatError(f"{release.ref!r}: {error.errors()[0]['msg']}, needs a config of this version") from error
    target = record.get("target_hook_point")
    point = header.get("hook_point")
    shown = {
        "hook_point": point.split(",") if isinstance(cfg, SitesConfig) and isinstance(point, str) else point,
        "hook_point_out": target if isinstance(target, str) else None,
    }
    return _described(cfg, None, {"units": "pre-activations of raw input", **record}) | shown


def _described(cfg: SAEConfig | None, sae: SAE | None, source: Mapping[str, object]) -> dict[str, object]:
    values: dict[str, object] = {} if cfg is None else cfg.to_dict()
    site, site_out = getattr(cfg, "site", None), getattr(cfg, "site_out", None)
    kind = None if cfg is None else cfg.kind
    if isinstance(cfg, SitesConfig):
        kind = "multilayer"
    elif kind not in {None, "lorsa", "multilayer", "temporal", "transcoder"}:
        d_out, has_skip = values.get("d_out", values["d_in"]), getattr(sae, "W_skip", None) is not None
        kind = "transcoder" if has_skip or site_out not in {None, site} or values["d_in"] != d_out else "sae"
    activation = values.get("activation")
    figures = {key: values[key] for key in ("kind", "k", "target_l0") if values.get(key) is not None}
    return {
        "format": source["format"],
        "kind": kind,
        "architecture": activation if isinstance(activation, dict) else figures or None,
        "d_in": values.get("d_in"),
        "d_sae": values.get("d_sae"),
        "d_out": values.get("d_out") or values.get("d_in"),
        "num_layers": values.get("num_layers_in", values.get("num_sites")),
        "hook_point": _shown(site, getattr(cfg, "sites", None)),
        "hook_point_out": _shown(site_out, getattr(cfg, "sites_out", None)),
        "transform": site.transform if isinstance(site, Site) and site.transform != "none" else None,
        "normalisation": values.get("norm"),
        "units": source.get("units"),
        "model": model_name(source),
    }


def _shown(site: Site | None, sites: tuple[Site, ...] | None) -> str | list[str] | None:
    if sites is not None:
        return [str(one) for one in sites]
    return None if site is None else str(site)


def _licence(place: Place, folder: Path) -> str | None:
    """Returns the licence that the card names: by the hub, or in a README.md beside the files."""
    if place.hub is not None and place.hub[1].snapshot is None:
        return _hub_licence(place.hub[0].repo, place.revision)
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        card = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        return str(card["license"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None


def _hub_licence(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    try:
        info = patiently(lambda: HfApi().model_info(repo, revision=revision, expand=["tags"]))
    except Exception:
        # One fact less; what is asked for is the dictionary.
        return None
    return next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), None)
