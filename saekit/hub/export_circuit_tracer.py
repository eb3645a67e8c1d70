"""Transcoders written for circuit-tracer: a set with one a layer, or one cross-layer transcoder."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors.torch import save as save_safetensors
from torch import Tensor

from saekit.errors import ConfigError
from saekit.hub.containers import open_container
from saekit.hub.export_terms import inexpressible
from saekit.hub.release import read_mapping
from saekit.manifest import atomic_write
from saekit.sae.activation import Activation, JumpReLU, ReLU
from saekit.sae.dictionary import Dictionary
from saekit.sae.hook_names import tl_name
from saekit.sae.multilayer import MultiLayerDictionary
from saekit.sae.peer_surface import model_name
from saekit.sae.site import Site

__all__ = ["check_set", "write_cross_layer", "write_layer"]

_TARGET = "circuit-tracer"
_CONFIG = "config.yaml"
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")


def write_layer(sae: Dictionary, folder: Path) -> None:
    """Writes one layer of a set of transcoders, beside those that are in the folder already.

    Raises:
        ConfigError: circuit-tracer cannot express it, or it does not fit the layers beside it.
        ResourceError: the folder cannot be written.
    """
    if not sae.is_transcoder:
        raise inexpressible(_TARGET, "an SAE that writes where it reads; it replaces MLPs by transcoders")
    if sae.d_in != sae.d_out:
        raise inexpressible(_TARGET, f"{sae.d_in} wide input and {sae.d_out} wide output")
    extra = [name for name in ("W_glu", "score_scale") if getattr(sae, name) is not None]
    if extra or sae.cfg.norm != "none":
        raise inexpressible(_TARGET, ", ".join(extra) or f"norm {sae.cfg.norm!r}")
    layer, hook_in = _hook(sae.cfg.site)
    layer_out, hook_out = _hook(sae.cfg.site_out or sae.cfg.site)
    if layer != layer_out:
        raise inexpressible(_TARGET, f"reading layer {layer} and writing layer {layer_out}")
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    threshold = _threshold(sae.cfg.activation, sae.threshold)
    if threshold is not None:
        tensors["activation_function.threshold"] = threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    _check_beside(folder, f"layer_{layer}.safetensors", {name: list(t.shape) for name, t in tensors.items()})
    _write_config(folder, "transcoder_set", sae.source, hook_in, hook_out)
    _write_tensors(folder / f"layer_{layer}.safetensors", tensors)


def write_cross_layer(sae: MultiLayerDictionary, folder: Path) -> None:
    """Writes a cross-layer transcoder.

    Raises:
        ConfigError: circuit-tracer cannot express it.
        ResourceError: the folder cannot be written.
    """
    cfg, num = sae.cfg, sae.cfg.num_layers_in
    if cfg.encoder != "own" or cfg.num_layers_out != num:
        raise inexpressible(_TARGET, "features that read several layers")
    if cfg.d_in != cfg.d_out:
        raise inexpressible(_TARGET, f"{cfg.d_in} wide input and {cfg.d_out} wide output")
    extra = [name for name in ("W_skip", "score_scale") if getattr(sae, name) is not None]
    if extra:
        raise inexpressible(_TARGET, f"a cross-layer transcoder with {', '.join(extra)}")
    threshold = _threshold(cfg.activation, sae.threshold)
    hook_in, hook_out = (_common_hook(sites) for sites in (cfg.sites, cfg.sites_out or cfg.sites))
    decoders = [_own_and_later(sae, layer) for layer in range(num)]
    _write_config(folder, "cross_layer_transcoder", sae.source, hook_in, hook_out)
    for layer in range(num):
        tensors = {
            f"W_enc_{layer}": sae.W_enc[layer].T,
            f"b_enc_{layer}": sae.b_enc[layer],
            f"b_dec_{layer}": sae.b_dec[layer],
        }
        if threshold is not None:
            tensors[f"threshold_{layer}"] = threshold[layer]
        _write_tensors(folder / f"W_enc_{layer}.safetensors", tensors)
        _write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": decoders[layer]})


def check_set(folder: Path) -> None:
    """Checks that a folder holds the layers 0 to the last, as circuit-tracer needs them; nothing for other formats.

    Raises:
        ConfigError: a layer is missing.
    """
    layers = sorted(int(found.group(1)) for path in folder.iterdir() if (found := _LAYER_FILE.fullmatch(path.name)))
    if layers and layers != list(range(len(layers))):
        raise ConfigError(
            f"export: {str(folder)!r} has layers {layers}, circuit-tracer needs 0 to {layers[-1]} without gaps"
        )


def _threshold(activation: Activation, threshold: Tensor | None) -> Tensor | None:
    match activation:
        case ReLU():
            return None
        case JumpReLU() if threshold is not None:
            # Its JumpReLU lets negative pre-activations through where a threshold is below 0.
            return threshold if activation.negative == "keep" else threshold.clamp_min(0)
    raise inexpressible(_TARGET, f"activation {activation.to_dict()}; its releases have relu and jumprelu")


def _hook(site: Site | None) -> tuple[int, str]:
    if site is None:
        raise inexpressible(_TARGET, "a transcoder that does not say where it reads; load it with hook_point")
    name = None if site.transform == "centered" else tl_name(site)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name or "")
    if found is None:
        step = "" if site.transform == "none" else f" after the step {site.transform!r}"
        raise inexpressible(_TARGET, f"{str(site)!r}{step}, for which TransformerLens has no name in all models")
    return int(found.group(1)), found.group(2)


def _common_hook(sites: tuple[Site, ...] | None) -> str:
    hooks = [_hook(site) for site in sites or (None,)]
    if [layer for layer, _ in hooks] != list(range(len(hooks))) or len({name for _, name in hooks}) != 1:
        raise inexpressible(
            _TARGET, f"sites {[str(site) for site in sites or ()]}; it has one kind, in layers 0 to the last"
        )
    return hooks[0][1]


def _own_and_later(sae: MultiLayerDictionary, layer: int) -> Tensor:
    """Returns the decoders of a layer's features into it and all later layers, [F, L - layer, d_out]."""
    num, (first, count) = sae.cfg.num_layers_out, sae.cfg.targets[layer]
    decoder: Tensor = sae.decoders[layer].detach()
    if first + count != num or first > layer:
        raise inexpressible(_TARGET, f"features of layer {layer} that write to {count} layers from {first} on")
    if bool(decoder[:, : layer - first].any()):
        raise inexpressible(_TARGET, f"features of layer {layer} that write back to earlier layers")
    return decoder[:, layer - first :]


def _check_beside(folder: Path, name: str, shapes: Mapping[str, list[int]]) -> None:
    other = next((path for path in sorted(folder.glob("layer_*.safetensors")) if path.name != name), None)
    if other is None:
        return
    found = {key: list(header.shape) for key, header in open_container(other).headers.items()}
    if found != shapes:
        raise ConfigError(
            f"export: {name} has {dict(shapes)}, circuit-tracer needs the shapes of {other.name}, {found}"
        )


def _write_config(folder: Path, kind: str, source: Mapping[str, object], hook_in: str, hook_out: str) -> None:
    model = model_name(source)
    config = {
        "model_name": model,
        "model_kind": kind,
        "feature_input_hook": hook_in,
        "feature_output_hook": hook_out,
        "scan": model,
    }
    path = folder / _CONFIG
    if path.is_file():
        found = read_mapping(path)
        if found != config:
            raise ConfigError(f"export: {str(path)!r} says {dict(found)}, this dictionary needs {config}")
        return
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(config, sort_keys=False).encode())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(save_safetensors(stored))
