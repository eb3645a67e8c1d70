"""Any reference to a dictionary -> the dictionary: a folder, a weights file, or a place on the Hugging Face hub."""

import fnmatch
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from saekit.errors import ConfigError, FormatError
from saekit.hub.discover import config_names, dictionaries, unreadable
from saekit.hub.hashes import hashed
from saekit.hub.headers import is_true, reason
from saekit.hub.patience import first_line
from saekit.hub.place import Place, locate, shown
from saekit.hub.release import Release, read_mapping
from saekit.hub.strict import parse_json
from saekit.hub.table import FORMATS, recognise
from saekit.sae.base import SAE
from saekit.sae.checkpoint import CFG_NAME, WEIGHTS_NAME, load_sae_folder
from saekit.sae.dictionary import Dictionary
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.places import num_places
from saekit.sae.released import RELEASED_KINDS, build_released
from saekit.sae.sequence import SequenceSAE
from saekit.sae.site import Site, parse_site

__all__ = ["load_sae", "load_saes", "read_release", "the_one"]

log = logging.getLogger(__name__)


def load_sae(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    hook_point: str | None = None,
    format: str | None = None,
    sha256: str | Mapping[str, str] | None = None,
) -> SAE:
    """Returns the dictionary that `ref` names, computing what its release defines.

    A folder that saekit wrote gives the class that was trained. Anything else is read by its format, into a `Dictionary`, a
    `MultiLayerDictionary` (the layer is the last axis but one of its input), or a `TemporalDictionary` or `LorsaDictionary`
    (whole sequences), without gradients.
    Nothing in the files is run: pickles are read as tensors, numbers and texts only.

    Args:
        ref: the output folder of a training run, any folder or weights file of a release, or `owner/repo:sub/path` on the
            Hugging Face hub, of which only the needed files are downloaded.
        device: where to put the weights.
        dtype: what to store them in; None: float32. Folds are computed in float32 whatever it is; matrices that the file has in
            the same half precision, and that no fold changes, are never larger than that in memory.
        revision: branch, tag or commit on the hub.
        hook_point: overrides where the dictionary reads: a module path, or one with ":input"; with commas between them where
            it reads several.
        format: a name of `saekit.hub.table.FORMATS`, for files that are not recognised.
        sha256: what the weights file must hash to; a mapping from file name where there are several, in which configs may
            stand too. Whether it is demanded or not, `.source` records what the bytes on the disk hash to, also where the hub's
            cache names a file by a hash; they are hashed while they are read.

    Raises:
        FormatError: `ref` names nothing that can be read, several dictionaries, or files that are not what they claim; or a
            revision of a local folder.
        ConfigError: no such device, or another number of hook points than the dictionary reads.
    """
    _check_device(device)
    place = locate(ref, revision)
    sae = _load(place, the_one(place), format=format, sha256=sha256, dtype=dtype)
    if hook_point is not None:
        _place_at(sae, hook_point)
    return sae.to(device=device, dtype=dtype)


def load_saes(
    ref: str | Path,
    *,
    pattern: str = "*",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    format: str | None = None,
) -> dict[str, SAE]:
    """Returns every dictionary under a folder or repository by its name there: its folder, or its file.

    Args:
        pattern: which names, as in a shell: `layer_*/width_16k/*`.
        ref, device, dtype, revision, format: as in `load_sae`.

    Raises:
        FormatError: no dictionary is there, none has such a name, or one cannot be read.
    """
    _check_device(device)
    place = locate(ref, revision)
    found = dictionaries(place.names)
    names = [name for name in found if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise FormatError(
            f"sae {place.ref!r}: none is named like {pattern!r}, needs one of {shown(list(found), place)}"
        )
    return {
        name: _load(place, name, format=format, sha256=None, dtype=dtype).to(device=device, dtype=dtype)
        for name in names
    }


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"sae: device {str(device)!r} cannot be used: {first_line(error)}") from error


def _place_at(sae: SAE, hook_point: str) -> None:
    sites = tuple(parse_site(point) for point in hook_point.split(","))
    needed = num_places(sae)
    if len(sites) != needed:
        raise ConfigError(
            f"sae: hook_point {hook_point!r} names {len(sites)} places, needs the {needed} that the dictionary reads, with commas"
            " between them"
        )
    sae.hook_point = hook_point
    if isinstance(sae, MultiLayerDictionary):
        sae.cfg = sae.cfg.model_copy(update={"sites": sites})
    elif isinstance(sae, Dictionary | SequenceSAE):
        sae.cfg = sae.cfg.model_copy(update={"site": sites[0]})


def the_one(place: Place) -> str:
    """Returns the name of the one dictionary of a place.

    Raises:
        FormatError: there is none, or there are several, which the message names.
    """
    found = dictionaries(place.names)
    if "" in found:
        return ""
    if not found:
        known = unreadable(place.names)
        raise FormatError(
            f"sae {place.ref!r}: no {CFG_NAME} and no weights of a dictionary, needs the output folder of a training run"
            f" or a release{f'; {known}' if known else ''}"
        )
    if len(found) > 1:
        kind = "SAEs" if any(name in place.names for name in found) else "SAE folders"
        raise FormatError(
            f"sae {place.ref!r}: holds {len(found)} {kind}, needs one; use {shown(list(found), place)}, or load_saes for all"
        )
    return next(iter(found))


def _load(
    place: Place,
    name: str,
    *,
    format: str | None,
    sha256: str | Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> SAE:
    files = dictionaries(place.names)[name]
    folder = place.folder_of(files)
    configs = {Path(config).name: folder / config for config in config_names(place.names, files)}
    _check_links(place, folder, [*files, *(path.relative_to(folder).as_posix() for path in configs.values())])
    own = folder / name
    is_own = format in {None, "saekit"} and _is_own(own / CFG_NAME)
    if is_own and sha256 is None and place.repo is None:
        # Our own folders here have manifests that say what was written.
        return _load_own(own)
    with hashed(place.name_of(name), {file: folder / file for file in files}, configs, sha256) as hashes:
        if is_own:
            sae = _load_own(own)
        else:
            release = Release(
                folder=folder,
                files=files,
                configs={config: read_mapping(path) for config, path in configs.items()},
                ref=place.name_of(name),
                repo=place.repo,
                revision=place.revision,
                dtype=dtype,
            )
            sae = read_release(release, format)
    if is_own:
        if place.repo is not None and "format" not in sae.source:
            sae.source |= {
                "format": "saekit",
                "ref": place.name_of(name),
                "repo": place.repo,
                "revision": place.revision,
                "files": hashes,
            }
        return sae
    _warn_of_transform(release.ref, sae)
    sae.source["files"] = hashes
    return sae.requires_grad_(False).eval()


def read_release(release: Release, format: str | None = None) -> SAE:
    """Returns the dictionary of a release, with its record but for the hashes of its files.

    Args:
        format: as in `load_sae`.

    Raises:
        FormatError: the files are of no known format, or not what they claim.
    """
    name = recognise(release, format)
    try:
        sae = FORMATS[name].read(release)
    except (ConfigError, ValidationError) as error:
        # A value of the peer's config that ours does not admit, such as k = 0.
        cause = str(error) if isinstance(error, ConfigError) else "; ".join(e["msg"] for e in error.errors())
        raise FormatError(
            f"{release.ref!r}: read as {name!r}: {cause}, needs a config that fits its weights"
        ) from error
    except FormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # A config may hold a list where a text belongs, and so on: it is input that nobody checked before.
        raise FormatError(
            f"{release.ref!r}: read as {name!r}: {type(error).__name__}: {reason(error)}, needs a config and weights of that format"
        ) from error
    pickled = {"pickled": release.values} if release.values else {}
    sae.source = {
        "format": name,
        "ref": release.ref,
        "repo": release.repo,
        "revision": release.revision,
        "units": sae.source["units"],
        "prepend_bos": _prepends_bos(release),
        "metadata": _record(release.ref, {**release.configs, **pickled}),
    }
    _check_finite(release.ref, sae)
    return sae


def _record(ref: str, values: Mapping[str, object]) -> object:
    """Returns values through JSON, so that they can be saved; what JSON cannot hold stands there as text."""
    try:
        return json.loads(json.dumps(values, default=str, skipkeys=True), parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{ref!r}: config: {reason(error)}, needs values that JSON can hold") from error


def _check_finite(ref: str, sae: SAE) -> None:
    """Checks what the folds have made; the large matrices were finite when they were read, and their scales are."""
    for name, parameter in sae.named_parameters():
        is_vector = not name.startswith(("W_", "decoders", "attention"))
        if is_vector and not is_true(torch.isfinite(parameter).all()):
            raise FormatError(
                f"{ref!r}: {name} has NaN or Inf after its scales, needs others in the config or the weights"
            )


def _check_links(place: Place, folder: Path, names: Sequence[str]) -> None:
    """Refuses links that lead out of the folder: whoever made it would choose what of the reader's disk is read and kept."""
    home = folder.resolve()
    allowed = [home]
    if place.is_file and place.hub is None:
        allowed.append((folder / place.names[0]).resolve().parent)
    # The hub's cache holds a revision as links into its own blobs.
    allowed += [above.parent.parent / "blobs" for above in (home, *home.parents) if above.parent.name == "snapshots"]
    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(root) for root in allowed):
            raise FormatError(f"{str(folder / name)!r}: a link to {str(target)!r}, needs a file inside {str(folder)!r}")


def _prepends_bos(release: Release) -> bool | None:
    """Whether the release's texts began with a BOS token; None where its files do not say."""
    pickled = release.values.get("cfg")
    for config in (*release.configs.values(), pickled):
        if isinstance(config, dict):
            for values in (config, config.get("metadata")):
                if isinstance(values, dict) and isinstance(values.get("prepend_bos"), bool):
                    return bool(values["prepend_bos"])
    return None


def _warn_of_transform(ref: str, sae: SAE) -> None:
    site = getattr(sae.cfg, "site", None) or next(iter(getattr(sae.cfg, "sites", None) or ()), None)
    if isinstance(site, Site) and site.transform != "none":
        log.warning("%s: reads %s after the step %r; saekit.capture takes it", ref, site, site.transform)


def _is_own(path: Path) -> bool:
    try:
        header = parse_json(path.read_text(encoding="utf-8"))
        return isinstance(header, dict) and header.get("format") == "saekit"
    except (OSError, ValueError):
        return False


def _load_own(folder: Path) -> SAE:
    header = read_mapping(folder / CFG_NAME)
    values = header.get("sae")
    if not isinstance(values, dict) or values.get("kind") not in RELEASED_KINDS:
        return load_sae_folder(folder)
    path = folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{str(path)!r}: cannot be read: {error}, needs an unbroken safetensors file") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{str(path)!r}: {name} has NaN or Inf or is not floating point, needs finite weights")
    return build_released(header, tensors, where=repr(str(folder))).requires_grad_(False).eval()
