"""OpenMOSS: Llama Scope, Llama-Scope-R1 and llamascopium 2, whose files hold activations normalised by a dataset's mean norm."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from saekit.errors import FormatError
from saekit.hub.canonical import Canonical, checked_scale, threshold_over
from saekit.hub.headers import is_true
from saekit.hub.release import Release
from saekit.sae.activation import Activation, BatchTopK, JumpReLU, ReLU, TopK
from saekit.sae.base import SAE
from saekit.sae.hook_names import tl_site
from saekit.sae.site import Site

__all__ = [
    "check_width",
    "decoder_bias",
    "exponentiated",
    "hook_scale",
    "is_llama_scope",
    "is_llama_scope_r1",
    "is_llamascopium",
    "norm_names",
    "openmoss_site",
    "read_llama_scope",
    "read_llama_scope_r1",
    "read_llamascopium",
]

_NORM_PREFIX = "dataset_average_activation_norm."


def is_llama_scope(release: Release) -> bool:
    """Whether these are Llama Scope's files."""
    return "hyperparams.json" in release.configs and release.weights.has("encoder.weight", "decoder.weight")


def read_llama_scope(release: Release) -> SAE:
    """Returns an SAE or transcoder of Llama Scope, as its own loader makes it.

        n = |decoder row|;  q = (s_in * x @ W_enc + b_enc) * n / s_out;  a = q where q > threshold
        x_hat = a @ (W_dec / n) + b_dec / s_out

    The one threshold of the config was set for exactly these activations.

    Source: OpenMOSS Language-Model-SAEs, the `from_pretrained` of the release.

    Raises:
        FormatError: a config that this function does not cover.
    """
    config, weights = release.need("hyperparams.json"), release.weights
    canonical = _linear(release, config)
    for key, found in (("d_model", canonical.W_enc.shape[0]), ("d_sae", canonical.W_enc.shape[1])):
        release.check(key, found, config=config)
    _needs(release, config, "act_fn", "jumprelu")
    _needs(release, config, "norm_activation", "dataset-wise")
    _needs(release, config, "sparsity_include_decoder_norm", True)
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise FormatError(
            f"{release.ref!r}: config: dataset_average_activation_norm is {norms!r}, needs 'in' and 'out'"
        )
    s_in, s_out = (
        _scale(release, release.get(side, float, config=norms), width)
        for side, width in (("in", canonical.W_enc.shape[0]), ("out", canonical.W_dec.shape[1]))
    )
    if release.flag("apply_decoder_bias_to_pre_encoder", False, config=config):
        canonical.subtract_from_input(canonical.b_dec)
    weights.finish()
    canonical.scale_input(s_in)
    canonical.scale_output(1 / s_out)
    # The rows are those of the file divided by s_out by now, so their norms are n / s_out.
    canonical.scale_features(canonical.decoder_norms())
    threshold = release.get("jump_relu_threshold", float, config=config)
    canonical.extra["threshold"] = canonical.b_enc.new_full((len(canonical.b_enc),), threshold)
    site, site_out = _sites(config, "llama")
    units = "pre-activations of raw input times decoder norm, in units of raw output"
    return canonical.build(JumpReLU(negative="keep"), units=units, site=site, site_out=site_out)


def is_llama_scope_r1(release: Release) -> bool:
    """Whether these are Llama-Scope-R1's files."""
    return release.weights.has("encoder.weight", "decoder.weight", "log_jumprelu_threshold")


def read_llama_scope_r1(release: Release) -> SAE:
    """Returns an SAE of Llama-Scope-R1: activations of the normalised input, reconstruction in raw units.

    Raises:
        FormatError: a config that this function does not cover.
    """
    config = release.configs.get("config.json", {})
    canonical = _linear(release, config)
    _needs(release, config, "act_fn", "jumprelu")
    release.check("d_model", canonical.W_enc.shape[0], config=config)
    return _normalised(release, config, canonical, threshold="log_jumprelu_threshold")


def is_llamascopium(release: Release) -> bool:
    """Whether these are a llamascopium 2 SAE's or transcoder's files."""
    return release.weights.has("W_E", "W_D") and len(release.weights.headers["W_E"].shape) == 2


def read_llamascopium(release: Release) -> SAE:
    """Returns an SAE or transcoder of llamascopium 2: activations of the normalised input, reconstruction in raw units.

    Raises:
        FormatError: a config that this function does not cover.
    """
    config, weights = release.configs.get("config.json", {}), release.weights
    _needs(release, config, "sae_type", "sae")
    d_in, d_sae = weights.shape("W_E", 2)
    d_out = weights.shape("W_D", 2)[1]
    check_width(release, d_in, d_sae)
    canonical = Canonical(
        W_enc=weights.matrix("W_E", d_in, d_sae),
        b_enc=weights.take("b_E", d_sae),
        W_dec=weights.matrix("W_D", d_sae, d_out),
        b_dec=decoder_bias(release, "b_D", d_out),
    )
    if release.flag("use_glu_encoder", False, config=config):
        canonical.extra |= {"W_glu": weights.take("W_E_glu", d_in, d_sae), "b_glu": weights.take("b_E_glu", d_sae)}
    return _normalised(release, config, canonical, threshold="activation_function.log_jumprelu_threshold")


def openmoss_site(name: object, model: str) -> Site | None:
    """Returns the site of a hook name of OpenMOSS; `model` is a model's name, or a reference that holds one."""
    return tl_site(name, model) if isinstance(name, str) else None


def hook_scale(release: Release, config: Mapping[str, object], hook: str, width: int) -> float:
    """Returns what the activations at a hook point are multiplied by: sqrt(width) / their mean norm in the dataset.

    Raises:
        FormatError: another kind of normalisation, or no norm in the weights.
    """
    match config.get("norm_activation"):
        case "dataset-wise":
            return _scale(release, release.weights.scalar(_NORM_PREFIX + hook), width)
        case "inference":
            return 1.0
        case "batch-wise":
            reason = "what a token becomes depends on its batch"
        case "token-wise":
            reason = "only the norm of one and the same token can be undone"
        case _:
            reason = "not a kind that is known"
    found = config.get("norm_activation")
    raise FormatError(
        f"{release.ref!r}: config: norm_activation is {found!r}, needs 'dataset-wise' or 'inference'; {reason}"
    )


def check_width(release: Release, d_in: int, d_sae: int) -> None:
    """Checks the sizes of llamascopium's config, which gives the number of features as `expansion_factor`.

    Raises:
        FormatError: config and weights disagree.
    """
    config = release.config
    release.check("d_model", d_in)
    if config.get("expansion_factor") is not None:
        needed = int(d_in * release.get("expansion_factor", float))
        if needed != d_sae:
            raise FormatError(
                f"{release.ref!r}: config: expansion_factor makes {needed} features, the weights need {d_sae}"
            )


def exponentiated(release: Release, name: str, *shape: int) -> Tensor:
    """Returns thresholds of which the file holds the logarithm.

    Raises:
        FormatError: one is more than float32 holds.
    """
    threshold = torch.exp(release.weights.take(name, *shape))
    if not is_true(torch.isfinite(threshold).all()):
        raise FormatError(f"{release.weights.where}: {name} is up to {threshold.log().max()}, needs finite thresholds")
    return threshold


def decoder_bias(release: Release, name: str, *shape: int) -> Tensor:
    """Returns the bias of the decoder; zeros where the config says that there is none.

    Raises:
        FormatError: the config asks for it and the weights have none.
    """
    if release.flag("use_decoder_bias", True):
        return release.weights.take(name, *shape)
    return torch.zeros(shape)


def norm_names(release: Release) -> list[str]:
    """Returns the names of the stored norms; without dataset-wise normalisation they are memory that nobody set."""
    return [name for name in release.weights.headers if name.startswith(_NORM_PREFIX)]


def _normalised(release: Release, config: Mapping[str, object], canonical: Canonical, *, threshold: str) -> SAE:
    weights = release.weights
    d_in, d_sae = canonical.W_enc.shape
    hook_in = release.get("hook_point_in", str, config=config)
    hook_out = release.get("hook_point_out", str, config=config)
    norms = canonical.decoder_norms()
    by_norm = release.flag("sparsity_include_decoder_norm", True, config=config)
    kind = release.get("act_fn", str, config=config)
    activation: Activation
    match kind:
        case "relu":
            activation = ReLU()
        case "jumprelu":
            activation = JumpReLU(negative="keep")
            compared = exponentiated(release, threshold, d_sae)
            canonical.extra["threshold"] = threshold_over(compared, norms) if by_norm else compared
        case "topk" | "batchtopk":
            k = release.get("top_k", int, config=config)
            activation = TopK(k=k) if kind == "topk" else BatchTopK(k=k)
            if by_norm:
                canonical.extra["score_scale"] = norms
        case _:
            raise FormatError(f"{release.ref!r}: config: act_fn is {kind!r}, needs relu, jumprelu, topk or batchtopk")
    if release.flag("apply_decoder_bias_to_pre_encoder", False, config=config):
        canonical.subtract_from_input(canonical.b_dec)
    norm: Mapping[str, object] = {}
    if config.get("norm_activation") == "token-wise" and hook_in == hook_out:
        norm = {"norm": "constant_norm"}
    else:
        canonical.scale_input(hook_scale(release, config, hook_in, d_in))
        canonical.scale_output(1 / hook_scale(release, config, hook_out, canonical.W_dec.shape[1]))
    weights.finish(*norm_names(release))
    site, site_out = _sites(config, release.ref)
    units = "pre-activations of the normalised input"
    return canonical.build(activation, units=units, site=site, site_out=site_out, options=norm)


def _linear(release: Release, config: Mapping[str, object]) -> Canonical:
    weights = release.weights
    d_sae, d_in = weights.shape("encoder.weight", 2)
    d_out = weights.shape("decoder.weight", 2)[0]
    b_dec = weights.take_if("decoder.bias", d_out)
    extra: dict[str, Tensor] = {}
    if release.flag("use_glu_encoder", False, config=config):
        extra["W_glu"] = weights.take("encoder_glu.weight", d_sae, d_in).T
        extra["b_glu"] = weights.take("encoder_glu.bias", d_sae)
    return Canonical(
        W_enc=weights.matrix("encoder.weight", d_sae, d_in).T,
        b_enc=weights.take("encoder.bias", d_sae),
        W_dec=weights.matrix("decoder.weight", d_out, d_sae).T,
        b_dec=torch.zeros(d_out) if b_dec is None else b_dec,
        extra=extra,
    )


def _scale(release: Release, norm: float, width: int) -> float:
    if norm <= 0:
        raise FormatError(f"{release.ref!r}: mean activation norm is {norm}, needs more than 0")
    return checked_scale(math.sqrt(width) / norm)


def _needs(release: Release, config: Mapping[str, object], key: str, value: object) -> None:
    if config.get(key) != value:
        raise FormatError(f"{release.ref!r}: config: {key} is {config.get(key)!r}, needs {value!r}")


def _sites(config: Mapping[str, object], model: str) -> tuple[Site | None, Site | None]:
    return openmoss_site(config.get("hook_point_in"), model), openmoss_site(config.get("hook_point_out"), model)
