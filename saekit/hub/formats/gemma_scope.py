"""Gemma Scope 1 (`params.npz`) and 2 (`params.safetensors`, or one file a layer for crosscoders and cross-layer transcoders)."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release, Weights
from saekit.sae.activation import JumpReLU
from saekit.sae.base import SAE
from saekit.sae.hook_names import hf_site, tl_site
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.site import Site

__all__ = [
    "is_gemma_scope",
    "is_gemma_scope_2",
    "is_gemma_scope_2_layers",
    "read_gemma_scope",
    "read_gemma_scope_2",
    "read_gemma_scope_2_layers",
]

_UNITS = "pre-activations of the file"
_NAMES = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
# Repository suffix -> hook names of input and output, as the release defines them.
_SITES_1 = {
    "res": ("hook_resid_post", None),
    "mlp": ("hook_mlp_out", None),
    "att": ("attn.hook_z", None),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}
# Folder -> module paths of input and output below a layer, for repositories whose config is missing.
_SITES_2 = {
    "resid_post": (".output", None),
    "mlp_out": (".post_feedforward_layernorm.output", None),
    "attn_out": (".self_attn.o_proj.input", None),
    "transcoder": (".pre_feedforward_layernorm.output", ".post_feedforward_layernorm.output"),
}


def is_gemma_scope(release: Release) -> bool:
    """Whether this is a file of Gemma Scope 1."""
    return release.name.endswith(".npz") and {name.lower() for name in release.weights.headers} == _NAMES


def read_gemma_scope(release: Release) -> SAE:
    """Returns an SAE or transcoder of Gemma Scope 1.

    The SAEs of the embedding were trained before Gemma multiplies it by sqrt(d_in); ours read what enters the first layer.

    Raises:
        FormatError: tensors of other shapes than the format has.
    """
    canonical = _jump_relu(release.weights)
    release.weights.finish()
    if re.search(r"(^|[/:])embedding/", release.ref):
        scale = math.sqrt(canonical.W_enc.shape[0])
        canonical.scale_input(1 / scale)
        canonical.scale_output(scale)
        return canonical.build(JumpReLU(), units=_UNITS, site=Site(path="model.layers.0", side="input"))
    site, site_out = _sites_1(release)
    return canonical.build(JumpReLU(), units=_UNITS, site=site, site_out=site_out, options=_heads(site))


def is_gemma_scope_2(release: Release) -> bool:
    """Whether this is a dictionary of one site of Gemma Scope 2."""
    return release.name == "params.safetensors" and release.weights.has(*_NAMES)


def read_gemma_scope_2(release: Release) -> SAE:
    """Returns an SAE or transcoder of Gemma Scope 2.

    Raises:
        FormatError: config and weights disagree.
    """
    weights = release.weights
    canonical = _jump_relu(weights)
    skip = weights.take_if("affine_skip_connection", canonical.W_enc.shape[0], canonical.W_dec.shape[1])
    _check_config(release, canonical.W_enc.shape[1], has_skip=skip is not None, kinds=("sae", "transcoder"))
    weights.finish()
    if skip is not None:
        canonical.extra["W_skip"] = skip
    site, site_out = _sites_2(release)
    return canonical.build(JumpReLU(), units=_UNITS, site=site, site_out=site_out, options=_heads(site))


def is_gemma_scope_2_layers(release: Release) -> bool:
    """Whether these are a crosscoder's or cross-layer transcoder's files of Gemma Scope 2."""
    return release.name.startswith("params_layer_")


def read_gemma_scope_2_layers(release: Release) -> SAE:
    """Returns a crosscoder or cross-layer transcoder of Gemma Scope 2.

    Decoders reach all layers, or only a layer's own and later ones where the files leave the others out.

    Raises:
        FormatError: a layer is missing, or layers do not fit each other or the config.
    """
    files = {int(re.sub(r"\D", "", PurePosixPath(name).name)): name for name in release.files}
    if sorted(files) != list(range(len(files))):
        raise FormatError(f"{release.ref!r}: has layers {sorted(files)}, needs 0 to {len(files) - 1} without gaps")
    opened = [release.open(name) for _, name in sorted(files.items())]
    num = len(opened)
    d_in, d_sae = opened[0].shape("w_enc", 2)
    d_out = opened[0].shape("b_dec", 1)[0]
    has_skip = "affine_skip_connection" in opened[0]
    _check_config(release, d_sae * num, has_skip=has_skip, kinds=("clt", "crosscoder"))
    tensors: dict[str, Tensor] = {"W_enc": torch.stack([w.take("w_enc", d_in, d_sae) for w in opened])}
    for ours, theirs in (("b_enc", "b_enc"), ("threshold", "threshold")):
        tensors[ours] = torch.stack([w.take(theirs, d_sae) for w in opened])
    tensors["b_dec"] = torch.stack([w.take("b_dec", d_out) for w in opened])
    if has_skip:
        tensors["W_skip"] = torch.stack([w.take("affine_skip_connection", d_in, d_out) for w in opened])
    for layer, weights in enumerate(opened):
        reach = weights.shape("w_dec", 3)[1]
        if reach not in {num, num - layer}:
            raise FormatError(f"{weights.where}: w_dec reaches {reach} layers, needs {num} or {num - layer}")
        tensors[f"decoders.{layer}"] = weights.take("w_dec", d_sae, reach, d_out)
        weights.finish()
    sites, sites_out = _layer_sites(release, num)
    cfg = MultiLayerConfig.of(tensors, encoder="own", activation=JumpReLU(), sites=sites, sites_out=sites_out)
    return MultiLayerDictionary(cfg, tensors, source={"units": _UNITS})


def _jump_relu(weights: Weights) -> Canonical:
    encoder, decoder = ("w_enc", "w_dec") if "w_enc" in weights else ("W_enc", "W_dec")
    d_in, d_sae = weights.shape(encoder, 2)
    d_out = weights.shape(decoder, 2)[1]
    return Canonical(
        W_enc=weights.matrix(encoder, d_in, d_sae),
        b_enc=weights.take("b_enc", d_sae),
        W_dec=weights.matrix(decoder, d_sae, d_out),
        b_dec=weights.take("b_dec", d_out),
        extra={"threshold": weights.take("threshold", d_sae)},
    )


def _sites_1(release: Release) -> tuple[Site | None, Site | None]:
    layer = re.search(r"layer_(\d+)/", f"{release.ref}/")
    repo = re.search(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)\b", release.ref)
    if layer is None or repo is None:
        return None, None
    name_in, name_out = _SITES_1[repo.group(1)]
    block = f"blocks.{layer.group(1)}."
    site_out = tl_site(block + name_out, "gemma-2-2b") if name_out else None
    return tl_site(block + name_in, "gemma-2-2b"), site_out


def _heads(site: Site | None) -> Mapping[str, object]:
    """TransformerLens keeps the heads apart in what the attention's output projection reads."""
    return {"joins_heads": site is not None and site.path.endswith("self_attn.o_proj") and site.side == "input"}


def _check_config(release: Release, width: int, *, has_skip: bool, kinds: Sequence[str]) -> None:
    config = release.config
    release.check("width", width)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{release.ref!r}: config: architecture is {config['architecture']!r}, needs 'jump_relu'")
    if config.get("type", kinds[0]) not in kinds:
        raise FormatError(f"{release.ref!r}: config: type is {config['type']!r}, these files need {' or '.join(kinds)}")
    if release.flag("affine_connection", has_skip) != has_skip:
        raise FormatError(f"{release.ref!r}: config: affine_connection is {not has_skip}, the weights say {has_skip}")


def _sites_2(release: Release) -> tuple[Site | None, Site | None]:
    config = release.config
    model, name_in, name_out = (config.get(key) for key in ("model_name", "hf_hook_point_in", "hf_hook_point_out"))
    if not isinstance(name_in, str):
        found = re.search(r"(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)_", release.ref)
        if found is None:
            return None, None
        tail_in, tail_out = _SITES_2[found.group(1)]
        layer = f"model.layers.{found.group(2)}"
        model, name_in, name_out = release.ref, layer + tail_in, layer + tail_out if tail_out else None
    text = model if isinstance(model, str) else None
    return hf_site(name_in, text), hf_site(name_out, text) if isinstance(name_out, str) else None


def _layer_sites(release: Release, num: int) -> tuple[tuple[Site, ...] | None, tuple[Site, ...] | None]:
    model: object = release.config.get("model_name")
    ends: tuple[object, object] = release.config.get("hf_hook_point_in"), release.config.get("hf_hook_point_out")
    if ends == (None, None):
        model, ends = release.ref, _layer_names(release.ref)
    found = []
    for end in ends:
        braces = re.search(r"\{([^}]*)\}", end) if isinstance(end, str) else None
        if braces is None or not isinstance(end, str):
            return None, None
        layers = [str(n) for n in range(num)] if braces.group(1) == "all" else braces.group(1).split(",")
        if len(layers) != num:
            raise FormatError(f"{release.ref!r}: {end!r} names {len(layers)} layers, the weights need {num}")
        names = [end.replace(braces.group(0), layer.strip()) for layer in layers]
        sites = [hf_site(name, model if isinstance(model, str) else None) for name in names]
        found.append(tuple(site for site in sites if site is not None))
    return found[0], found[1]


def _layer_names(ref: str) -> tuple[str | None, str | None]:
    """The module paths that a folder means where no config says them."""
    crosscoder = re.search(r"crosscoder/layer_(\d+(?:_\d+)*)_width_", ref)
    if crosscoder is not None:
        layers = f"model.layers.{{{crosscoder.group(1).replace('_', ',')}}}.output"
        return layers, layers
    if re.search(r"(^|[/:])clt/", ref):
        name_in, name_out = _SITES_2["transcoder"]
        return f"model.layers.{{all}}{name_in}", f"model.layers.{{all}}{name_out}"
    return None, None
