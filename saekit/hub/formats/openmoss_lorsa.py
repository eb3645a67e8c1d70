"""llamascopium 2: low-rank sparse attention."""

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import threshold_over
from saekit.hub.formats.openmoss import check_width, decoder_bias, exponentiated, hook_scale, norm_names, openmoss_site
from saekit.hub.release import Release
from saekit.sae.activation import JumpReLU, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.lorsa import LorsaConfig, LorsaDictionary

__all__ = ["is_lorsa", "read_lorsa"]

_THRESHOLD = "activation_function.log_jumprelu_threshold"


def is_lorsa(release: Release) -> bool:
    """Whether these are a low-rank sparse attention's files."""
    return release.weights.has("W_Q", "W_K", "W_V", "W_O", "b_V")


def read_lorsa(release: Release) -> SAE:
    """Returns a low-rank sparse attention: activations of the normalised input, reconstruction in raw units.

    Queries and keys are rotated by the tables that the file holds.

    Raises:
        FormatError: a config that this function does not cover, or weights that do not fit it.
    """
    config, weights = release.need("config.json"), release.weights
    if config.get("sae_type") != "lorsa":
        raise FormatError(f"{release.ref!r}: config: sae_type is {config.get('sae_type')!r}, needs 'lorsa'")
    num_heads, d_in, d_head = weights.shape("W_Q", 3)
    d_sae, d_out = weights.shape("W_O", 2)
    check_width(release, d_in, d_sae)
    # Each group of the file may stand for several equal ones of the config.
    if release.get("n_qk_heads", int) % num_heads:
        raise FormatError(
            f"{release.ref!r}: config: n_qk_heads is {config['n_qk_heads']}, the weights have {num_heads}"
        )
    release.check("d_qk_head", d_head)
    if release.config.get("rotary_scale", 1) != 1:
        raise FormatError(f"{release.ref!r}: config: rotary_scale is {config['rotary_scale']!r}, needs 1")
    hook_in, hook_out = release.get("hook_point_in", str), release.get("hook_point_out", str)
    scale_in = hook_scale(release, config, hook_in, d_in)
    scale_out = hook_scale(release, config, hook_out, d_out)
    outputs = weights.take("W_O", d_sae, d_out)
    tensors: dict[str, Tensor] = {
        "W_query": weights.take("W_Q", num_heads, d_in, d_head).mul_(scale_in),
        "W_key": weights.take("W_K", num_heads, d_in, d_head).mul_(scale_in),
        "b_query": weights.take("b_Q", num_heads, d_head),
        "b_key": weights.take("b_K", num_heads, d_head),
        "W_enc": weights.take("W_V", d_sae, d_in).mul_(scale_in).T,
        "b_enc": weights.take("b_V", d_sae),
        "b_dec": decoder_bias(release, "b_D", d_out) / scale_out,
    }
    activation = _activation(release, tensors, torch.linalg.vector_norm(outputs, dim=1))
    tensors["W_dec"] = outputs / scale_out
    eps = _head_norms(release, tensors, num_heads, d_head)
    positions, width = _rotation(release, tensors)
    # The causal mask and its filling are written out too.
    weights.finish("mask", "IGNORE", *norm_names(release))
    cfg = LorsaConfig(
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out,
        num_heads=num_heads,
        d_head=d_head,
        score_divisor=d_head**0.5 if config.get("attn_scale") is None else release.get("attn_scale", float),
        rotary_positions=positions,
        rotary_width=width,
        rotates_neighbors=release.flag("rotary_adjacent_pairs", True),
        head_norm_eps=eps,
        activation=activation,
        site=openmoss_site(hook_in, release.ref),
        site_out=openmoss_site(hook_out, release.ref),
    )
    return LorsaDictionary(cfg, tensors, source={"units": "pre-activations of the normalised input"})


def _activation(release: Release, tensors: dict[str, Tensor], norms: Tensor) -> TopK | JumpReLU | ReLU:
    by_norm = release.flag("sparsity_include_decoder_norm", True)
    match release.get("act_fn", str):
        case "relu":
            return ReLU()
        case "jumprelu":
            threshold = exponentiated(release, _THRESHOLD, len(norms))
            tensors["threshold"] = threshold_over(threshold, norms) if by_norm else threshold
            return JumpReLU(negative="keep")
        case "topk":
            if by_norm:
                tensors["score_scale"] = norms
            return TopK(k=release.get("top_k", int))
        case other:
            raise FormatError(f"{release.ref!r}: config: act_fn is {other!r}, needs relu, jumprelu or topk for 'lorsa'")


def _head_norms(release: Release, tensors: dict[str, Tensor], num_heads: int, d_head: int) -> float | None:
    if not release.flag("use_post_qk_ln", False):
        return None
    if release.config.get("normalization_type") != "RMS":
        raise FormatError(
            f"{release.ref!r}: config: normalization_type is {release.config.get('normalization_type')!r}, needs 'RMS'"
        )
    tensors |= {f"{end}_gain": release.weights.take(f"ln_{end}.w", num_heads, d_head) for end in ("q", "k")}
    return release.get("eps", float)


def _rotation(release: Release, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Takes the tables; returns their positions and width, 0 where nothing is rotated."""
    kind, weights = release.config.get("positional_embedding_type", "rotary"), release.weights
    if kind == "none":
        return 0, 0
    if kind != "rotary":
        raise FormatError(f"{release.ref!r}: config: positional_embedding_type is {kind!r}, needs 'rotary' or 'none'")
    positions, width = weights.shape("rotary_cos", 2)
    tensors |= {name: weights.take(name, positions, width) for name in ("rotary_cos", "rotary_sin")}
    return positions, width
