"""circuit-tracer: transcoders a layer (`layer_<i>.safetensors`), cross-layer transcoders, and ByteDance's joint top-k kind."""

import re

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release
from saekit.sae.activation import Activation, JumpReLU, LayerTopK, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.site import Site

__all__ = [
    "is_cross_layer",
    "is_transcoder_set",
    "read_cross_layer",
    "read_transcoder_set",
]

_UNITS = "pre-activations of the file"
_THRESHOLD = "activation_function.threshold"
# Their config names no activation; the repository's card gives k.
_TOPK_REPOS = {"facebook/crv-8b-instruct-transcoders": 128}


def is_transcoder_set(release: Release) -> bool:
    """Whether this is one layer of a set of transcoders."""
    return re.fullmatch(r"layer_\d+\.safetensors", release.name) is not None and release.weights.has("W_enc", "W_dec")


def read_transcoder_set(release: Release) -> SAE:
    """Returns one layer of a set of transcoders.

    Raises:
        FormatError: an activation that is not known, or weights that do not fit the config.
    """
    config, weights = release.configs.get("config.yaml", {}), release.weights
    kind = config.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise FormatError(f"{release.ref!r}: config: model_kind is {kind!r}, needs 'transcoder_set'")
    d_sae, d_in = weights.shape("W_enc", 2)
    d_out = weights.shape("W_dec", 2)[1]
    for key, found in (("d_feature", d_sae), ("d_model", d_in)):
        for name in ("wandb-config.yaml", "wanb-config.yaml"):
            entry = release.configs.get(name, {}).get(key)
            release.check("value", found, config=entry if isinstance(entry, dict) else {})
    canonical = Canonical(
        W_enc=weights.matrix("W_enc", d_sae, d_in).T,
        b_enc=weights.take("b_enc", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_out),
        b_dec=weights.take("b_dec", d_out),
    )
    activation = _activation(release, canonical)
    skip = weights.take_if("W_skip", d_out, d_in)
    if skip is not None:
        canonical.extra["W_skip"] = skip.T
    weights.finish()
    layer = int(re.sub(r"\D", "", release.name))
    site, site_out = (_site(release, key, layer) for key in ("feature_input_hook", "feature_output_hook"))
    return canonical.build(activation, units=_UNITS, site=site, site_out=site_out)


def is_cross_layer(release: Release) -> bool:
    """Whether these are a cross-layer transcoder's files."""
    return release.weights.has("W_enc_0", "W_dec_0")


def read_cross_layer(release: Release) -> SAE:
    """Returns a cross-layer transcoder; with `W_dec_norm_<l>` beside the decoders, ByteDance's, top-k over all layers.

    Raises:
        FormatError: a layer is missing, or layers do not fit each other or the config.
    """
    weights = release.weights
    num = sum(name.startswith("W_enc_") for name in weights.headers)
    d_sae, d_in = weights.shape("W_enc_0", 2)
    d_out = weights.shape("W_dec_0", 3)[2]
    tensors: dict[str, Tensor] = {
        "W_enc": torch.empty(num, d_in, d_sae),
        "b_enc": torch.zeros(num, d_sae),
        "b_dec": torch.zeros(num, d_out),
    }
    is_joint = "W_dec_norm_0" in weights
    if is_joint:
        tensors["score_scale"] = torch.empty(num, d_sae)
    elif "threshold_0" in weights:
        tensors["threshold"] = torch.empty(num, d_sae)
    for layer in range(num):
        tensors["W_enc"][layer] = weights.take(f"W_enc_{layer}", d_sae, d_in).T
        tensors[f"decoders.{layer}"] = weights.take(f"W_dec_{layer}", d_sae, num - layer, d_out)
        if is_joint:
            tensors["score_scale"][layer] = weights.take(f"W_dec_norm_{layer}", d_sae)
            continue
        tensors["b_enc"][layer] = weights.take(f"b_enc_{layer}", d_sae)
        tensors["b_dec"][layer] = weights.take(f"b_dec_{layer}", d_out)
        if "threshold" in tensors:
            tensors["threshold"][layer] = weights.take(f"threshold_{layer}", d_sae)
    # The norms stand a second time in a file of their own, and the factors are folded into the weights already.
    weights.finish("W_dec_norm", "mlp_out_l2", "resid_mid_l2")
    sites, sites_out = (_sites(release, key, num) for key in ("feature_input_hook", "feature_output_hook"))
    activation: Activation = JumpReLU(negative="keep") if "threshold" in tensors else ReLU()
    if is_joint:
        activation = LayerTopK(k=release.get("k", int))
    for key, found in (("n_layers", num), ("d_model", d_in), ("d_feature", d_sae)):
        release.check(key, found)
    cfg = MultiLayerConfig.of(tensors, encoder="own", activation=activation, sites=sites, sites_out=sites_out)
    return MultiLayerDictionary(cfg, tensors, source={"units": _UNITS})


def _activation(release: Release, canonical: Canonical) -> Activation:
    config, weights = release.configs.get("config.yaml", {}), release.weights
    name = config.get("activation", "relu")
    stored = int(weights.scalar("k")) if "k" in weights else None
    fixed = _TOPK_REPOS.get(release.repo or "")
    if _THRESHOLD in weights:
        if name not in {"relu", "jumprelu", "jump_relu"} or stored is not None:
            raise FormatError(f"{release.ref!r}: config: activation is {name!r}, the thresholds need 'jumprelu'")
        canonical.extra["threshold"] = weights.take(_THRESHOLD, len(canonical.b_enc))
        return JumpReLU(negative="keep")
    if name == "topk" or stored is not None or fixed is not None:
        k = release.get("k", int, config=config) if "k" in config else stored or fixed
        if k is None or stored not in {None, k}:
            raise FormatError(f"{release.ref!r}: config: k is {config.get('k')!r}, the weights say {stored!r}")
        return TopK(k=k, negative="keep")
    if name != "relu":
        raise FormatError(
            f"{release.ref!r}: config: activation is {name!r}, needs relu, topk, or thresholds in the weights"
        )
    return ReLU()


def _site(release: Release, key: str, layer: int) -> Site | None:
    hook, model = release.config.get(key), release.config.get("model_name")
    if not isinstance(hook, str) or not isinstance(model, str):
        return None
    return tl_site(f"blocks.{layer}.{hook}", model)


def _sites(release: Release, key: str, num: int) -> tuple[Site, ...] | None:
    sites = [_site(release, key, layer) for layer in range(num)]
    return None if None in sites else tuple(site for site in sites if site is not None)
