"""The model card of a published dictionary, from what its folder records of its making."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import yaml

from saekit.hub.info import DictionaryInfo
from saekit.manifest import Manifest, manifest_sha256, read_manifest

__all__ = ["Provenance", "provenance", "public_name", "render_card"]

# How each library loads an export that lies in a folder of its name.
_LOADERS = {
    "saelens": (
        "SAELens",
        'from sae_lens import SAE\n\nsae = SAE.from_pretrained(release="{repo}", sae_id="saelens")',
    ),
    "sparsify": (
        "sparsify",
        'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub("{repo}", hookpoint="sparsify")',
    ),
    "dictionary_learning": (
        "dictionary_learning",
        "from dictionary_learning.utils import load_dictionary\n"
        "from huggingface_hub import snapshot_download\n\n"
        'folder = snapshot_download("{repo}", allow_patterns="dictionary_learning/*")\n'
        'sae, config = load_dictionary(f"{{folder}}/dictionary_learning", device="cpu")',
    ),
}
# What training notes of the finished dictionary, and how the card calls it.
_FIGURES = {
    "fvu": "FVU on held-out tokens",
    "l0": "L0 on held-out tokens",
    "dead_fraction": "dead features",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What a training run's folders say beyond the dictionary itself; None where they do not."""

    model: str | None
    """The language model."""
    dataset: str | None
    """The texts, as the hub names them."""
    text: str | None
    """The texts, for people."""
    tokens: int | None
    """Training tokens."""
    steps: int | None
    """Training steps."""
    figures: Mapping[str, float]
    """Figures that training noted at its end."""
    versions: Mapping[str, str]
    """Packages that wrote the dictionary."""


def provenance(folder: Path, info: DictionaryInfo) -> Provenance:
    """Returns what a folder's manifest says, and that of the cache beside it which it was trained on.

    Args:
        folder: what training wrote, `<run>/train/<name>`; any other folder only says less.
    """
    manifest = read_manifest(folder)
    counts = {} if manifest is None else manifest.counts
    cache = None if manifest is None else _cache(folder, manifest)
    config: Mapping[str, object] = {} if cache is None else cache.config
    model, text = config.get("model"), config.get("text")
    name = str(model["name"]) if isinstance(model, dict) and "name" in model else info.model
    dataset, shown = _text(text if isinstance(text, dict) else {})
    return Provenance(
        model=None if name is None else public_name(name),
        dataset=dataset,
        text=shown,
        tokens=_whole(counts.get("tokens")),
        steps=_whole(counts.get("steps")),
        figures={key: float(value) for key in _FIGURES if isinstance(value := counts.get(key), int | float)},
        versions={} if manifest is None else manifest.versions,
    )


def public_name(name: str) -> str:
    """Returns a model's or file's name without the folders of the machine that it lies on."""
    if Path(name).exists():
        return Path(name).resolve().name
    if name.startswith(("/", "~", ".")) or PureWindowsPath(name).drive:
        return PureWindowsPath(name).name if "\\" in name else Path(name).name
    return name


def render_card(
    repo: str,
    info: DictionaryInfo,
    made: Provenance,
    *,
    exports: Sequence[str] = (),
    licence: str | None = None,
    licences: Mapping[str, str | None] | None = None,
    metrics: str | None = None,
) -> str:
    """Returns the card: a YAML header for the hub, then Markdown.

    Args:
        repo: where it will be.
        exports: formats of `saekit.hub.export.TARGETS` that lie in folders of the same name.
        licence: of the dictionary, as the hub spells it; None: not said.
        licences: of model and text, by name; None where they are not known.
        metrics: a Markdown table of an evaluation.
    """
    title = repo.split("/")[-1]
    architecture = str((info.architecture or {}).get("kind", info.kind))
    header: dict[str, object] = {"library_name": "saekit", "tags": _tags(info, architecture)}
    if licence is not None:
        header["license"] = licence
    if made.model is not None and made.model.count("/") == 1:
        header["base_model"] = made.model
    if made.dataset is not None:
        header["datasets"] = [made.dataset]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=True)}---\n",
        f"# {title}\n",
        _summary(info, made, architecture),
        _facts(info, made, licences or {}),
        _loading(repo, info, exports),
        _measures(made, metrics),
    ]
    return "\n".join(part for part in parts if part)


def _cache(folder: Path, manifest: Manifest) -> Manifest | None:
    """Returns the manifest of the cache that a run was trained on, where it lies in the run's folder."""
    wanted = manifest.inputs.get("cache")
    place = folder.resolve().parent.parent / "cache"
    cache = read_manifest(place)
    return cache if cache is not None and cache.status == "complete" and manifest_sha256(place) == wanted else None


def _text(text: Mapping[str, object]) -> tuple[str | None, str | None]:
    if text.get("kind") == "huggingface":
        name = public_name(str(text["name"]))
        part = text.get("config_name")
        shown = f"{name}, {part}" if part else name
        return (name if name.count("/") == 1 else None), f"{shown}, split {text.get('split', 'train')}"
    paths = text.get("paths")
    if isinstance(paths, list | tuple):
        return None, ", ".join(public_name(str(path)) for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
    return None, None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _tags(info: DictionaryInfo, architecture: str) -> list[str]:
    kind = "sparse-autoencoder" if info.kind == "sae" else str(info.kind)
    return list(dict.fromkeys(["interpretability", "saekit", kind, architecture]))


def _summary(info: DictionaryInfo, made: Provenance, architecture: str) -> str:
    what = {"sae": "sparse autoencoder", "transcoder": "transcoder"}.get(str(info.kind), "sparse dictionary")
    sentence = f"A {what}" if what == architecture else f"A {architecture} {what}"
    if info.d_sae is not None:
        sentence += f" of {info.d_sae:,} features"
    if info.hook_point is not None:
        point = f"`{info.hook_point}`" if isinstance(info.hook_point, str) else f"{len(info.hook_point)} places"
        sentence += f" that reads {point}"
    if made.model is not None:
        sentence += f" of {_linked(made.model)}"
    if made.tokens is not None:
        sentence += f", trained on {made.tokens:,} tokens" + (f" of {made.text}" if made.text else "")
    version = made.versions.get("saekit")
    return f"{sentence}. Written by saekit{f' {version}' if version else ''}.\n"


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if name.count("/") == 1 else name


def _facts(info: DictionaryInfo, made: Provenance, licences: Mapping[str, str | None]) -> str:
    out = info.hook_point_out
    rows: list[tuple[str, object]] = [
        ("model", None if made.model is None else _linked(made.model)),
        ("hook point", _code(info.hook_point)),
        ("predicts", f"`{out}`" if isinstance(out, str) and info.kind == "transcoder" else None),
        ("input, features", f"{info.d_in:,}, {info.d_sae:,}" if info.d_in and info.d_sae else None),
        ("architecture", f"`{json.dumps(dict(info.architecture))}`" if info.architecture else None),
        ("training tokens, steps", None if made.tokens is None else f"{made.tokens:,}, {made.steps or 0:,}"),
        ("text", made.text),
        ("activations", info.units),
        ("weights", f"{info.num_bytes / 1e6:,.1f} MB, float32"),
    ]
    rows += [(f"licence of {name}", licence or "not known here") for name, licence in licences.items()]
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows if value is not None)
    return f"| | |\n|---|---|\n{lines}"


def _code(point: str | list[str] | None) -> str | None:
    return ", ".join(f"`{one}`" for one in point) if isinstance(point, list) else point and f"`{point}`"


def _loading(repo: str, info: DictionaryInfo, exports: Sequence[str]) -> str:
    code = (
        f'import saekit as sk\n\nsae = sk.load_sae("{repo}")\nfeature_acts = sae.encode(x)  # x: {_input_shape(info)}'
    )
    text = f"## Load\n\nIt takes the model's raw activations: normalisation is folded in.\n\n```python\n{code}\n```\n"
    for target in exports:
        library, snippet = _LOADERS.get(target, (target, ""))
        text += f"\nIn {library}, from the folder `{target}`:\n"
        text += f"\n```python\n{snippet.format(repo=repo)}\n```\n" if snippet else ""
    # The others know one place and one token at a time.
    is_plain = info.kind in {"sae", "transcoder"}
    others = [target for target in _LOADERS if target not in exports and is_plain]
    if others:
        command = f"saekit convert {repo} dictionary --to {others[0]}"
        more = f" (or {', '.join(others[1:])})" if others[1:] else ""
        text += f"\nFor other libraries: `{command}`{more}, which refuses what the library cannot express.\n"
    return text


def _input_shape(info: DictionaryInfo) -> str:
    if info.num_layers is not None:
        return f"[..., {info.num_layers}, {info.d_in}]"
    return f"[B, T, {info.d_in}]" if info.kind in {"lorsa", "temporal"} else f"[..., {info.d_in}]"


def _measures(made: Provenance, metrics: str | None) -> str:
    if metrics is not None:
        return f"## Evaluation\n\n{metrics.strip()}\n"
    if made.figures:
        lines = "".join(f"| {_FIGURES[key]} | {value:.4g} |\n" for key, value in made.figures.items())
        return f"## Figures at the end of training\n\n| | |\n|---|---:|\n{lines}"
    return "## Evaluation\n\nNone came with it.\n"
