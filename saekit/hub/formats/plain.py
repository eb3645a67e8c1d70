"""Releases that are one file of `encoder.*` and `decoder.*` or `W_enc` and `W_dec`, their rules known by their publisher."""

import re

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical
from saekit.hub.release import Release
from saekit.sae.activation import Activation, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site

__all__ = [
    "is_apollo",
    "is_connor",
    "is_deepseek",
    "is_dunefsky",
    "is_goodfire",
    "is_openai",
    "is_qwen_scope",
    "read_apollo",
    "read_connor",
    "read_deepseek",
    "read_dunefsky",
    "read_goodfire",
    "read_openai",
    "read_qwen_scope",
]

_UNITS = "pre-activations of the file"
_OPENAI_SITES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def is_openai(release: Release) -> bool:
    """Whether this is one of OpenAI's GPT-2 dictionaries."""
    return release.weights.has("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")


def read_openai(release: Release) -> SAE:
    """Returns one of OpenAI's GPT-2 dictionaries; those with top-k normalise each token.

    Raises:
        FormatError: an activation that is not known.
    """
    weights = release.weights
    canonical = _linear(release, "encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    canonical.subtract_from_input(canonical.b_dec)
    weights.finish("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    state = weights.values.get("activation_state_dict")
    kind, after = (
        weights.values.get("activation"),
        state.get("postact_fn", "ReLU") if isinstance(state, dict) else "ReLU",
    )
    found = re.search(r"(mlp_post_act|resid_(?:delta|post)_(?:attn|mlp))[^/]*/autoencoders/(\d+)\.pt$", release.ref)
    site = tl_site(f"blocks.{found.group(2)}.{_OPENAI_SITES[found.group(1)]}", "gpt2") if found else None
    if kind == "ReLU":
        return canonical.build(ReLU(), units=_UNITS, site=site)
    if kind != "TopK" or not isinstance(state, dict) or after != "ReLU":
        raise FormatError(f"{release.ref!r}: activation {kind!r} then {after!r}, needs 'ReLU', or 'TopK' then 'ReLU'")
    activation = TopK(k=release.get("k", int, config=state))
    units = "pre-activations of the normalised input"
    return canonical.build(activation, units=units, site=site, options={"norm": "layer_norm"})


def is_goodfire(release: Release) -> bool:
    """Whether this is one of Goodfire's SAEs."""
    return "encoder_linear.weight" in release.weights


def read_goodfire(release: Release) -> SAE:
    """Returns one of Goodfire's SAEs: relu, or top-k where the file's name says k, without a bias on the input.

    Raises:
        FormatError: tensors of other shapes than the format has.
    """
    decoder = "decoder_linear" if "decoder_linear.weight" in release.weights else "decoder"
    names = ("encoder_linear.weight", "encoder_linear.bias", f"{decoder}.weight", f"{decoder}.bias")
    top = re.search(r"topk_sae_.*_k(\d+)\.pth?$", release.name)
    if (decoder == "decoder") != (top is not None):
        raise FormatError(f"{release.ref!r}: has {decoder}.weight, the file's name says {'top-k' if top else 'relu'}")
    canonical = _linear(release, *names)
    release.weights.finish()
    layer = re.search(r"-?[lL](\d+)[._]", release.name) or re.search(r"_l(\d+)_", release.name)
    site = tl_site(f"blocks.{layer.group(1)}.hook_resid_post", release.ref) if layer else None
    return canonical.build(TopK(k=int(top.group(1))) if top else ReLU(), units=_UNITS, site=site)


def is_deepseek(release: Release) -> bool:
    """Whether this is one of qresearch's SAEs of DeepSeek-R1 distillations."""
    names = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    return "DeepSeek-R1" in release.name and release.weights.headers.keys() == names


def read_deepseek(release: Release) -> SAE:
    """Returns one of qresearch's SAEs: relu, without a bias on the input.

    Raises:
        FormatError: tensors of other shapes than the format has.
    """
    canonical = _linear(release, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    release.weights.finish()
    layer = re.search(r"-l(\d+)\.", release.name)
    site = tl_site(f"blocks.{layer.group(1)}.hook_resid_post", release.name) if layer else None
    return canonical.build(ReLU(), units=_UNITS, site=site)


def is_qwen_scope(release: Release) -> bool:
    """Whether this is a layer of Qwen-Scope."""
    return re.fullmatch(r"layer\d+\.sae\.pt", release.name) is not None


def read_qwen_scope(release: Release) -> SAE:
    """Returns a layer of Qwen-Scope: the k largest pre-activations whatever their sign, as its model card says.

    Raises:
        FormatError: neither the config nor the repository's name says k.
    """
    weights, config = release.weights, release.configs.get("config.json", {})
    canonical = _linear(release, "W_enc", "b_enc", "W_dec", "b_dec")
    weights.finish()
    named = re.search(r"L0_(\d+)", release.ref)
    if "k" not in config and named is None:
        raise FormatError(f"{release.ref!r}: no k, needs it in config.json or in the repository's name (L0_<k>)")
    k = release.get("k", int, config=config) if "k" in config else int(named.group(1)) if named else 0
    for key, found in (("d_model", canonical.W_enc.shape[0]), ("d_sae", canonical.W_enc.shape[1])):
        release.check(key, found, config=config)
    place = config.get("hook_point", "resid_post")
    layer = re.sub(r"\D", "", release.name)
    site = tl_site(f"blocks.{layer}.hook_resid_post", "qwen") if place == "resid_post" else None
    return canonical.build(TopK(k=k, negative="keep"), units=_UNITS, site=site)


def is_connor(release: Release) -> bool:
    """Whether this is one of Connor Kissane's attention SAEs."""
    return release.weights.headers.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"} and any(
        {"act_name", "act_size"} <= config.keys() for config in release.configs.values()
    )


def read_connor(release: Release) -> SAE:
    """Returns one of Connor Kissane's attention SAEs; heads are joined, as at the output projection's input, or apart.

    Raises:
        FormatError: config and weights disagree.
    """
    stem = release.name.removesuffix(".pt")
    config = release.configs.get(f"{stem}_cfg.json", release.config)
    weights = release.weights
    d_in, d_sae = weights.shape("W_enc", 2)
    release.check("act_size", d_in, config=config)
    release.check("dict_size", d_sae, config=config)
    canonical = Canonical(
        W_enc=weights.matrix("W_enc", d_in, d_sae),
        b_enc=weights.take("b_enc", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_in),
        b_dec=weights.take("b_dec", d_in),
    )
    canonical.subtract_from_input(canonical.b_dec)
    weights.finish()
    site = tl_site(release.get("act_name", str, config=config), release.get("model_name", str, config=config))
    return canonical.build(ReLU(), units=_UNITS, site=site, options={"joins_heads": True})


def is_apollo(release: Release) -> bool:
    """Whether this is a file of Apollo's end-to-end SAEs."""
    return any(name.endswith(".encoder.0.weight") for name in release.weights.headers)


def read_apollo(release: Release) -> SAE:
    """Returns one of Apollo's end-to-end SAEs: relu; decoder rows are brought to unit norm, as its forward does.

    Raises:
        FormatError: the file holds SAEs of several hook points.
    """
    weights, tail = release.weights, ".encoder.0.weight"
    hooks = [name.removesuffix(tail) for name in weights.headers if name.endswith(tail)]
    if len(hooks) != 1:
        raise FormatError(f"{release.ref!r}: holds SAEs of {', '.join(hooks)}, needs one in a file")
    names = (f"{hooks[0]}.{part}" for part in ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"))
    canonical = _linear(release, *names)
    weights.finish()
    norms = canonical.decoder_norms()
    canonical.W_dec = canonical.W_dec.float().div_(norms.clamp_min(1e-12)[:, None])
    model = release.config.get("tlens_model_name")
    site = tl_site(hooks[0].replace("-", "."), model) if isinstance(model, str) else None
    return canonical.build(ReLU(), units=_UNITS, site=site)


def is_dunefsky(release: Release) -> bool:
    """Whether this is one of Dunefsky's transcoders."""
    return release.weights.has("W_enc", "W_dec", "b_dec", "b_dec_out")


def read_dunefsky(release: Release) -> SAE:
    """Returns one of Dunefsky's transcoders: `b_dec` belongs to the input, `b_dec_out` to the output.

    Raises:
        FormatError: tensors of other shapes than the format has.
    """
    weights = release.weights
    d_in, d_sae = weights.shape("W_enc", 2)
    d_out = weights.shape("W_dec", 2)[1]
    canonical = Canonical(
        W_enc=weights.matrix("W_enc", d_in, d_sae),
        b_enc=weights.take("b_enc", d_sae),
        W_dec=weights.matrix("W_dec", d_sae, d_out),
        b_dec=weights.take("b_dec_out", d_out),
    )
    canonical.subtract_from_input(weights.take("b_dec", d_in))
    weights.finish()
    config = weights.values.get("cfg")
    values = config if isinstance(config, dict) else {}
    site, site_out = (
        tl_site(str(values.get(key)), str(values.get("model_name"))) for key in ("hook_point", "out_hook_point")
    )
    activation: Activation = ReLU()
    return canonical.build(activation, units=_UNITS, site=site, site_out=site_out)


def _linear(release: Release, encoder: str, encoder_bias: str, decoder: str, decoder_bias: str) -> Canonical:
    """Takes an encoder [F, d_in] and a decoder [d_out, F]."""
    weights = release.weights
    d_sae, d_in = weights.shape(encoder, 2)
    d_out = weights.shape(decoder, 2)[0]
    return Canonical(
        W_enc=weights.matrix(encoder, d_sae, d_in).T,
        b_enc=weights.take(encoder_bias, d_sae),
        W_dec=weights.matrix(decoder, d_out, d_sae).T,
        b_dec=weights.take(decoder_bias, d_out),
    )
