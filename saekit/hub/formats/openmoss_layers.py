"""llamascopium 2: crosscoders and cross-layer transcoders."""

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import threshold_over
from saekit.hub.formats.openmoss import check_width, decoder_bias, exponentiated, hook_scale, norm_names, openmoss_site
from saekit.hub.release import Release
from saekit.sae.activation import Activation, BatchTopK, JumpReLU, LayerTopK, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.multilayer import MultiLayerConfig, MultiLayerDictionary
from saekit.sae.site import Site

__all__ = ["is_llamascopium_layers", "read_llamascopium_layers"]

_THRESHOLD = "activation_function.log_jumprelu_threshold"
_UNITS = "pre-activations of the normalised input"


def is_llamascopium_layers(release: Release) -> bool:
    """Whether these are the files of a crosscoder or cross-layer transcoder of llamascopium 2."""
    return "W_E" in release.weights and len(release.weights.headers["W_E"].shape) == 3


def read_llamascopium_layers(release: Release) -> SAE:
    """Returns a crosscoder or cross-layer transcoder: activations of the normalised input, reconstruction in raw units.

    Raises:
        FormatError: a config that this function does not cover.
    """
    config = release.configs.get("config.json", {})
    match config.get("sae_type"):
        case "crosscoder":
            return _crosscoder(release)
        case "clt":
            return _cross_layer_transcoder(release)
        case other:
            raise FormatError(
                f"{release.ref!r}: config: sae_type is {other!r}, these weights need 'crosscoder' or 'clt'"
            )


def _crosscoder(release: Release) -> SAE:
    """Pre-activations summed over the layers; each layer has its own activations, scored by its own decoder norm."""
    weights = release.weights
    num, d_in, d_sae = weights.shape("W_E", 3)
    d_out = weights.shape("W_D", 3)[2]
    check_width(release, d_in, d_sae)
    hooks = _hooks(release, "hook_points", num)
    scale = torch.tensor([hook_scale(release, release.config, hook, d_in) for hook in hooks])
    decoder = weights.take("W_D", num, d_sae, d_out)
    norms = torch.linalg.vector_norm(decoder, dim=2)  # [H, F]
    # Every layer adds its own bias to the sum.
    b_enc = weights.take("b_E", num, d_sae).sum(dim=0)
    tensors: dict[str, Tensor] = {
        "W_enc": weights.take("W_E", num, d_in, d_sae).mul_(scale[:, None, None]),
        "b_enc": b_enc.expand(num, d_sae).clone(),
        "b_dec": decoder_bias(release, "b_D", num, d_out) / scale[:, None],
    }
    activation = _activation(release, tensors, norms)
    for layer in range(num):
        tensors[f"decoders.{layer}"] = (decoder[layer] / scale[layer])[:, None]
    weights.finish(*norm_names(release))
    sites = _sites(release, hooks)
    cfg = MultiLayerConfig.of(tensors, encoder="sum_per_layer", activation=activation, sites=sites)
    return MultiLayerDictionary(cfg, tensors, source={"units": _UNITS})


def _cross_layer_transcoder(release: Release) -> SAE:
    """`W_D.<to>` holds the decoders into one layer from it and all before; ours hold those from one layer into the rest."""
    weights = release.weights
    num, d_in, d_sae = weights.shape("W_E", 3)
    d_out = weights.shape("W_D.0", 3)[2]
    check_width(release, d_in, d_sae)
    hooks_in, hooks_out = _hooks(release, "hook_points_in", num), _hooks(release, "hook_points_out", num)
    scale_in = torch.tensor([hook_scale(release, release.config, hook, d_in) for hook in hooks_in])
    scale_out = torch.tensor([hook_scale(release, release.config, hook, d_out) for hook in hooks_out])
    tensors: dict[str, Tensor] = {
        "W_enc": weights.take("W_E", num, d_in, d_sae).mul_(scale_in[:, None, None]),
        "b_enc": weights.take("b_E", num, d_sae),
        "b_dec": torch.stack([decoder_bias(release, f"b_D.{to}", d_out) for to in range(num)]) / scale_out[:, None],
    }
    squares = torch.zeros(num, d_sae, dtype=torch.float64)
    for source in range(num):
        tensors[f"decoders.{source}"] = torch.empty(d_sae, num - source, d_out)
    for to in range(num):
        into = weights.take(f"W_D.{to}", to + 1, d_sae, d_out)
        squares[: to + 1] += into.double().square().sum(dim=2)
        into.div_(scale_out[to])
        for source in range(to + 1):
            tensors[f"decoders.{source}"][:, to - source] = into[source]
    activation = _activation(release, tensors, squares.sqrt().float())
    weights.finish(*norm_names(release))
    sites, sites_out = _sites(release, hooks_in), _sites(release, hooks_out)
    cfg = MultiLayerConfig.of(tensors, encoder="own", activation=activation, sites=sites, sites_out=sites_out)
    return MultiLayerDictionary(cfg, tensors, source={"units": _UNITS})


def _activation(release: Release, tensors: dict[str, Tensor], norms: Tensor) -> Activation:
    """Takes the thresholds, or the scores of top-k, into `tensors`; norms [S, F] of the decoders as they are stored."""
    kind, weights = release.get("act_fn", str), release.weights
    by_norm = release.flag("sparsity_include_decoder_norm", True)
    sources, d_sae = tensors["b_enc"].shape
    match kind:
        case "relu":
            return ReLU()
        case "jumprelu":
            shared = len(weights.shape(_THRESHOLD, len(weights.headers[_THRESHOLD].shape))) == 1
            stored = exponentiated(release, _THRESHOLD, *((d_sae,) if shared else (sources, d_sae)))
            threshold = stored.expand(sources, d_sae).clone()
            tensors["threshold"] = threshold_over(threshold, norms) if by_norm else threshold
            return JumpReLU(negative="keep")
    if by_norm:
        tensors["score_scale"] = norms
    k, is_crosscoder = release.get("top_k", int), release.config.get("sae_type") == "crosscoder"
    match kind:
        case "topk":
            return TopK(k=k)
        case "layertopk" if not is_crosscoder:
            return LayerTopK(k=k, by_layer=False)
        case "batchtopk":
            # A crosscoder counts every layer of a token as a token of its own, and lets them compete.
            return BatchTopK(k=k * sources) if is_crosscoder else BatchTopK(k=k, by_layer=True)
        case "batchlayertopk" if not is_crosscoder:
            return BatchTopK(k=k)
        case _:
            known = "relu, jumprelu, topk or batchtopk" + ("" if is_crosscoder else ", layertopk or batchlayertopk")
            raise FormatError(f"{release.ref!r}: config: act_fn is {kind!r}, needs {known}")


def _hooks(release: Release, key: str, num: int) -> list[str]:
    names = release.get(key, list)
    if len(names) != num or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{release.ref!r}: config: {key} is {names!r}, the weights need {num} hook points")
    return names


def _sites(release: Release, hooks: list[str]) -> tuple[Site, ...] | None:
    sites = [openmoss_site(hook, release.ref) for hook in hooks]
    return None if None in sites else tuple(site for site in sites if site is not None)
