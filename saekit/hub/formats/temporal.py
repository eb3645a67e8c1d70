"""Temporal dictionaries: SAELens' folders, and the original `conf.yaml` with `latest_ckpt.safetensors`."""

import re
from collections.abc import Mapping

from saekit.errors import FormatError
from saekit.hub.formats.saelens import saelens_sites
from saekit.hub.release import Release
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site
from saekit.sae.site import Site
from saekit.sae.temporal import TemporalConfig, TemporalDictionary

__all__ = ["is_saelens_temporal", "is_temporal", "read_saelens_temporal", "read_temporal"]


def is_saelens_temporal(release: Release) -> bool:
    """Whether these are a temporal dictionary's files as SAELens writes them."""
    return release.weights.has("W_dec", "b_dec", "attn_layers.0.k_ctx.weight")


def is_temporal(release: Release) -> bool:
    """Whether these are a temporal dictionary's files as its authors write them."""
    return release.weights.has("D", "b", "attn_layers.0.k_ctx.weight")


def read_saelens_temporal(release: Release) -> SAE:
    """Returns a temporal dictionary of SAELens.

    Raises:
        FormatError: config and weights disagree, or a normalisation that is not known.
    """
    config = release.configs.get("cfg.json", {})
    if config.get("architecture") != "temporal":
        raise FormatError(f"{release.ref!r}: config: architecture is {config.get('architecture')!r}, needs 'temporal'")
    match config.get("normalize_activations", "none"):
        case "constant_scalar_rescale":
            scale = release.get("activation_normalization_factor", float, config=config)
        case "none":
            scale = 1.0
        case other:
            raise FormatError(
                f"{release.ref!r}: config: normalize_activations is {other!r}, needs constant_scalar_rescale"
            )
    site = saelens_sites(release, config)[0]
    subtracts = release.flag("apply_b_dec_to_input", True, config=config)
    return _read(release, config, ("W_dec", "b_dec", "W_enc"), scale=scale, site=site, subtracts=subtracts)


def read_temporal(release: Release) -> SAE:
    """Returns a temporal dictionary of its authors' own format.

    Raises:
        FormatError: config and weights disagree.
    """
    config = release.configs.get("conf.yaml", {})
    sae = config.get("sae")
    if not isinstance(sae, dict):
        raise FormatError(f"{release.ref!r}: no section 'sae' in conf.yaml, needs one")
    found = re.search(r"([^/:]+)/layer_(\d+)/", f"{release.ref}/")
    site = tl_site(f"blocks.{found.group(2)}.hook_resid_post", found.group(1)) if found else None
    scale = release.get("scaling_factor", float, config=sae)
    return _read(release, sae, ("D", "b", "E"), scale=scale, site=site, subtracts=True)


def _read(
    release: Release,
    config: Mapping[str, object],
    names: tuple[str, str, str],
    *,
    scale: float,
    site: Site | None,
    subtracts: bool,
) -> SAE:
    decoder, bias, encoder = names
    weights = release.weights
    d_sae, d_in = weights.shape(decoder, 2)
    release.check("d_in", d_in, config=config)
    release.check("d_sae", d_sae, config=config)
    if scale <= 0:
        raise FormatError(f"{release.ref!r}: config: input scale is {scale}, needs more than 0")
    W_dec = weights.take(decoder, d_sae, d_in)
    tied = release.flag("tied_weights", True, config=config)
    if not tied and encoder not in weights:
        raise FormatError(f"{release.ref!r}: config: tied_weights is false, needs a tensor {encoder}")
    num_layers = release.get("n_attn_layers", int, config=config)
    width = d_sae // release.get("bottleneck_factor", int, config=config)
    tensors = {
        "W_enc": W_dec.T.clone() if tied else weights.take(encoder, d_in, d_sae),
        "W_dec": W_dec,
        # One file of this release was seen with the bias as a row.
        "b_dec": weights.take(bias, *weights.headers[bias].shape).reshape(-1),
    }
    for layer in range(num_layers):
        for name in ("k_ctx", "q_target", "v_ctx", "c_proj"):
            rows = width if name in {"k_ctx", "q_target"} else d_sae
            stored = f"attn_layers.{layer}.{name}"
            tensors[f"attention.{layer}_{name}_weight"] = weights.take(f"{stored}.weight", rows, d_sae)
            tensors[f"attention.{layer}_{name}_bias"] = weights.take(f"{stored}.bias", rows)
    weights.finish(*([encoder] if tied else []))
    kind = config.get("sae_diff_type")
    if kind not in {"topk", "relu"}:
        raise FormatError(f"{release.ref!r}: config: sae_diff_type is {kind!r}, needs topk or relu")
    cfg = TemporalConfig(
        d_in=d_in,
        d_sae=d_sae,
        apply_b_dec_to_input=subtracts,
        num_heads=release.get("n_heads", int, config=config),
        num_attention_layers=num_layers,
        d_bottleneck=width,
        k=release.get("kval_topk", int, config=config)
        if kind == "topk" and config.get("kval_topk") is not None
        else None,
        input_scale=scale,
        site=site,
    )
    return TemporalDictionary(cfg, tensors, source={"units": "novel codes of the scaled input"})
